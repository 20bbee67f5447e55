"""Running a skipped update again, to find what isn't finite and where it began.

The update's forward and backward are computed with its own weights, packing and loss; nothing is sampled, scored or
stepped. What came in, every module's output, the log-probabilities, the loss of every row and the gradients are looked
at in this order, which is the order in which a broken number travels.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sapwood.algorithms import Algorithm, Forward, RowBatch, Totals
from sapwood.errors import StorageError
from sapwood.evidence import PER_TOKEN, Evidence
from sapwood.models.forward import causal_lm
from sapwood.models.load import load_policy
from sapwood.models.roles import Models, build_critic
from sapwood.resume import trained
from sapwood.sections import CriticSection
from sapwood.tree import pack
from sapwood.types import Row

#: Places that are told of each kind; more are counted.
TOLD = 3
#: Activations above it are those of broken weights: trained ones stay below a few thousand.
LARGE = 1e5


@dataclass(frozen=True)
class Setup:
    """How a replay computes. dtype: of the weights ("auto" as the recipe means it); tree: not by plain rows."""

    dtype: str
    autocast: str
    tree: bool
    device: str

    def describe(self) -> str:
        """In words."""
        products = "" if self.autocast == "none" else f", products in {self.autocast}"
        weights = "of the device's own type" if self.dtype == "auto" else f"in {self.dtype}"
        return f"weights {weights}{products}, {'by the token tree' if self.tree else 'by plain rows'}"


@dataclass(frozen=True)
class Outcome:
    """What one replay found. cause: the first key of `found`, in the order of CAUSES, or "none".

    found: sentences by kind; module: the first one whose output isn't finite; parameters: names of those whose gradient
    isn't, from the loss backwards; largest: the largest value of a module's finite outputs.
    """

    setup: Setup
    cause: str
    found: dict[str, tuple[str, ...]]
    loss: float
    grad_norm: float
    module: str | None = None
    parameters: tuple[str, ...] = ()
    largest: float = 0.0


@dataclass(frozen=True)
class Replay:
    """The outcome of the run's own setup and of others, and what to try."""

    outcome: Outcome
    variants: tuple[tuple[str, Outcome], ...]
    remedies: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that aren't finite as text."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [plain(item) for item in value]
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        return {
            **plain(asdict(self.outcome)),
            "variants": {name: plain(asdict(outcome)) for name, outcome in self.variants},
            "remedies": list(self.remedies),
        }


def replay(
    evidence: Evidence,
    dtype: str | None = None,
    device: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Replay:
    """Run it as the run did, or in `dtype` alone; then in float32 and by plain rows, where these are something else.

    progress: told what is computed. Raises SapwoodError for a model that can't be opened here.
    """
    model = evidence.recipe.model
    own = Setup(dtype or model.dtype, "none" if dtype else model.autocast, model.tree, device or model.device)
    tell = progress or (lambda text: None)
    tell(own.describe())
    outcome = _run(evidence, own)
    used = outcome.setup
    variants: list[tuple[str, Outcome]] = []
    if outcome.cause not in ("none", "weights", "arrays") and dtype is None:
        coarse = used.dtype != "float32" or used.autocast != "none"
        others = {
            "in float32": replace(own, dtype="float32", autocast="none") if coarse else None,
            "by plain rows": replace(own, tree=False) if used.tree else None,
        }
        for name, setup in others.items():
            if setup is not None:
                tell(setup.describe())
                variants.append((name, _run(evidence, setup)))
    return Replay(outcome, tuple(variants), _remedies(evidence, outcome, dict(variants)))


# --- one run -----------------------------------------------------------------------------------------------------


def _run(evidence: Evidence, setup: Setup) -> Outcome:
    """One replay with models of its own."""
    algorithm = evidence.recipe.build_algorithm()
    models = _models(evidence, setup, algorithm)
    algorithm.begin(evidence.step, evidence.steps)
    algorithm.load_state(evidence.algorithm)
    if algorithm.learns_from != "rollouts":
        algorithm.credit(evidence.groups, evidence.rows)  # what it keeps of a batch for its loss (AOT's ranks)
    if evidence.rng is not None:
        torch.set_rng_state(evidence.rng)
    used = str(causal_lm(models.policy.model).get_input_embeddings().weight.dtype).removeprefix("torch.")
    setup = replace(setup, dtype=used, tree=models.policy.fallback is None)
    return _Update(evidence, setup, models, algorithm).run()


def _models(evidence: Evidence, setup: Setup, algorithm: Algorithm) -> Models:
    """The models of the update, with its weights."""
    recipe, folder = evidence.recipe, evidence.folder
    changes = {"dtype": setup.dtype, "tree": setup.tree, "device": setup.device, "autocast": setup.autocast}
    section = recipe.model.model_copy(update={**changes, "init_from": folder / "policy", "lora": None})
    needs = replace(algorithm.needs, reference_logprobs=False, old_logprobs=False)
    policy = load_policy(section, recipe.run.seed, head="scalar" if needs.scores else "lm")
    critic = None
    if needs.values:
        given = recipe.critic or CriticSection()
        whole = (folder / "critic" / "head.safetensors").is_file()
        start = {} if whole else {"init_from": folder / "critic", "lora": None}
        critic = build_critic(policy, given.model_copy(update=start), section, recipe.run.seed)
    models = Models(policy, needs, critic=critic, autocast=setup.autocast)
    for name, group in trained(models).items():
        stored = evidence.parameters.get(name, [])
        if [p.shape for p in group] != [tensor.shape for tensor in stored]:
            raise StorageError(f"{folder}: its weights aren't of its recipe's models; copy the folder again.")
        for parameter, tensor in zip(group, stored, strict=True):
            parameter.data.copy_(tensor)
    return models


@dataclass
class _Update:
    """One forward and backward over the rows, looked at from the outside inwards."""

    evidence: Evidence
    setup: Setup
    models: Models
    algorithm: Algorithm
    outputs: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    slopes: list[str] = field(default_factory=list)
    watch: _Watch = field(default_factory=lambda: _Watch())
    loss: float = 0.0

    def run(self) -> Outcome:
        weights, arrays = _broken_weights(self.models), self._arrays()
        self.models.train()
        self.models.policy.model.zero_grad(set_to_none=True)
        totals = Totals.of(self.evidence.rows)
        batches = self._pack()
        for number, micro in enumerate(batches):
            where = f" (micro-batch {number + 1} of {len(batches)})" if len(batches) > 1 else ""
            self._micro(micro, totals, where)
        named = dict(_named(self.models))
        backwards = reversed(named.items())
        bad = [name for name, p in backwards if p.grad is not None and not _finite(p.grad)]
        norm = float(torch.nn.utils.clip_grad_norm_(list(named.values()), math.inf)) if named else 0.0
        return self._outcome(weights, arrays, bad, len(named), norm)

    def _pack(self) -> list[list[Row]]:
        optim = self.evidence.recipe.optim
        limit = optim.batch_size if optim.gradient_accumulation > 1 else None
        budget = self.evidence.token_budget
        return pack(self.evidence.rows, budget, atomic=self.algorithm.atomic, max_groups=limit)

    def _micro(self, micro: Sequence[Row], totals: Totals, where: str) -> None:
        with self.watch.over(self.models):
            forward = self.models.forward(micro, self.algorithm.needs)
        named = {name: getattr(forward, name) for name in ("logprobs", "entropies", "values", "scores")}
        for name, values in named.items():
            if values is not None and values.numel():
                self.outputs += self._places(name, values, micro, per_row=name == "scores")
                if values.requires_grad:
                    values.retain_grad()
        device = self.models.policy.device
        output = self.algorithm.loss(forward, RowBatch.of(micro, device), totals)
        self.loss += float(output.loss.detach())
        if not _finite(output.loss.detach()):
            self.losses += self._losses(forward, micro, totals, where)
        if not output.loss.requires_grad:
            return
        (output.loss * self.evidence.numbers.get("loss_scale", 1.0)).backward()
        for name, values in named.items():
            if values is not None and values.numel() and values.grad is not None:
                quantity = f"the loss's gradient with respect to {name}"
                self.slopes += self._places(quantity, values.grad, micro, per_row=name == "scores")
        if self.slopes and not self.outputs:
            self.slopes += self._operation(forward, micro, totals)

    def _operation(self, forward: Forward, micro: Sequence[Row], totals: Totals) -> list[str]:
        """The operation of the loss whose gradient is NaN, by torch's anomaly detection."""
        leaves = {name: _leaf(getattr(forward, name)) for name in ("logprobs", "entropies", "values", "scores")}
        logprobs = leaves.pop("logprobs")
        assert logprobs is not None
        try:
            with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
                warnings.simplefilter("ignore")  # the traceback of the operation, which is the algorithm's to read
                batch = RowBatch.of(micro, self.models.policy.device)
                self.algorithm.loss(Forward(logprobs, **leaves), batch, totals).loss.backward()
        except RuntimeError as error:
            match = re.search(r"Function '(\w+?)(Backward\d*)?' returned nan", str(error))
            return [f"the operation whose gradient is NaN is {match[1]}"] if match else []
        return []

    def _losses(self, forward: Forward, micro: Sequence[Row], totals: Totals, where: str) -> list[str]:
        """The rows, or groups of coupled rows, whose share of the loss isn't finite."""
        units: dict[int, list[int]] = {}
        for index, row in enumerate(micro):
            units.setdefault(row.group if self.algorithm.atomic else index, []).append(index)
        told, bad = [], 0
        for chosen in units.values():
            rows = [micro[i] for i in chosen]
            batch = RowBatch.of(rows, self.models.policy.device)
            with torch.no_grad():
                share = float(self.algorithm.loss(_part(forward, micro, chosen), batch, totals).loss)
            if not math.isfinite(share):
                bad += 1
                told.append(f"the loss of {self._name(rows[0])} is {share}")
        if not told:
            return [f"the loss is {float(self.loss)}{where}, though that of every row by itself is finite"]
        return [*told[:TOLD], *([f"and of {_count(bad - TOLD)}{where}"] if bad > TOLD else [])]

    def _arrays(self) -> list[str]:
        """What came in and isn't finite."""
        found = []
        for name in ("reward", "bootstrap"):
            bad = [row for row in self.evidence.rows if not math.isfinite(getattr(row, name))]
            found += [f"the {name} of {self._name(row)} is {getattr(row, name)}" for row in bad[:TOLD]]
            found += [f"and that of {_count(len(bad) - TOLD)}"] if len(bad) > TOLD else []
        for name in PER_TOKEN:
            arrays = [getattr(row, name) for row in self.evidence.rows]
            held = [(row, values) for row, values in zip(self.evidence.rows, arrays, strict=True) if values is not None]
            if held and held[0][1].dtype.kind == "f":
                packed = torch.from_numpy(np.concatenate([values for _, values in held]))
                found += self._places(name, packed, [row for row, _ in held])
        return found

    def _places(self, quantity: str, values: Tensor, rows: Sequence[Row], *, per_row: bool = False) -> list[str]:
        """Sentences about the rows where `values` aren't finite. values: [S] over the rows' scored tokens, or [R]."""
        told, bad = [], 0
        parts = values.detach().float().cpu().split([1 if per_row else row.scored for row in rows])
        for row, part in zip(rows, parts, strict=True):
            at = torch.nonzero(~torch.isfinite(part))[:, 0].tolist()
            if not at:
                continue
            bad += 1
            if bad <= TOLD:
                place = "" if per_row else f" at token {at[0] + 1} of {row.scored} scored ones"
                more = f" (and {len(at) - 1} more)" if len(at) > 1 else ""
                told.append(f"{quantity} of {self._name(row)}: {float(part[at[0]])}{place}{more}")
        return [*told, *([f"{quantity} of {_count(bad - TOLD)}"] if bad > TOLD else [])]

    def _name(self, row: Row) -> str:
        task = self.evidence.groups[row.group].task.id
        number = next(i for i, other in enumerate(self.evidence.rows) if other is row)
        return f"row {number} (task {task!r}, group {row.group}, member {row.member})"

    def _outcome(self, weights: list[str], arrays: list[str], bad: list[str], count: int, norm: float) -> Outcome:
        module = self.watch.sentence()
        gradients = []
        if bad:
            first = ", ".join(bad[:TOLD])
            gradients = [f"the gradients of {len(bad)} of {count} trained parameters aren't finite: {first}"]
            gradients[0] += " ..." if len(bad) > TOLD else ""
        elif not math.isfinite(norm):
            gradients = [f"every gradient is finite, but their norm is {norm}: they are too large to be squared"]
        by_cause = {
            "weights": weights,
            "module": [module] if module else [],
            "arrays": arrays,
            "outputs": self.outputs,
            "loss": self.losses,
            "slope": self.slopes,
            "gradient": gradients,
        }
        found = {name: tuple(told) for name, told in by_cause.items() if told}
        cause = next(iter(found), "none")
        watch = self.watch
        return Outcome(self.setup, cause, found, self.loss, norm, watch.name, tuple(bad[:10]), watch.largest)


#: What can break, in the order in which it travels: what is told first, and in which words.
CAUSES = {
    "weights": "the weights themselves",
    "module": "a module's output",
    "arrays": "an array that came in",
    "outputs": "what the models give",
    "loss": "the loss",
    "slope": "the gradient of the loss itself",
    "gradient": "the gradient below the loss",
    "none": "nothing: everything is finite this time",
}


class _Watch:
    """The first module, in the order of the forward, whose output isn't finite."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.largest = 0.0
        self._kind = ""
        self._came_in = True
        self._handles: list[Any] = []

    def over(self, models: Models) -> _Watch:
        """Look at every module of these models, but for the language model's head, whose path would be another."""
        unseen = causal_lm(models.policy.model).get_output_embeddings()
        for prefix, model in _roles(models):
            for name, module in model.named_modules():
                if module is not unseen:
                    hook = self._hook(_readable(prefix, name))
                    self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.name is not None:
                return
            tensors = _tensors(output)
            if all(_finite(tensor) for tensor in tensors):
                largest = max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)
                self.largest = max(self.largest, largest)
                return
            self.name, self._kind = name or "the model", type(module).__name__
            inputs = [t for key, value in kwargs.items() if "mask" not in key for t in _tensors(value)]
            self._came_in = all(_finite(tensor) for tensor in [*_tensors(args), *inputs])

        return look

    def sentence(self) -> str | None:
        """What was seen, or None."""
        if self.name is None:
            return None
        came = "though what came in is" if self._came_in else "and neither is what came in, made between two modules"
        return (
            f"the first module whose output isn't finite is {self.name} ({self._kind}), {came}; the largest value "
            f"before it was {self.largest:.3g}"
        )


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested arguments."""
    if isinstance(value, Tensor):
        return [value.detach()] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _count(more: int) -> str:
    return "1 more row" if more == 1 else f"{more} more rows"


def _leaf(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().requires_grad_()


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _named(models: Models) -> list[tuple[str, nn.Parameter]]:
    """What is trained, by a name that a user can find."""
    wanted = {id(p) for group in models.parameter_groups().values() for p in group}
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, model in _roles(models):
        for name, parameter in model.named_parameters():
            if id(parameter) in wanted:
                found.setdefault(id(parameter), (_readable(prefix, name), parameter))
    return list(found.values())


def _roles(models: Models) -> list[tuple[str, nn.Module]]:
    """The modules that an update runs through, each once, with what to put before their names."""
    found: list[tuple[str, nn.Module]] = [("", models.policy.model)]
    critic = models.critic
    if critic is not None and critic.policy.model is not models.policy.model:
        found.append(("critic: ", critic.policy.model))
    if critic is not None and critic.kind != "model":
        found.append(("critic's head ", critic.head))
    return found


def _readable(prefix: str, name: str) -> str:
    return f"{prefix}{re.sub('^base_model[.]model[.]', '', name)}".strip()


def _broken_weights(models: Models) -> list[str]:
    """Parameters that aren't finite, trained or frozen."""
    told, seen = [], set()
    named = [*_named(models), *models.policy.model.named_parameters()]
    trained_ids = {id(p) for _, p in _named(models)}
    for name, parameter in named:
        if id(parameter) in seen or not parameter.is_floating_point():
            continue
        seen.add(id(parameter))
        bad = int((~torch.isfinite(parameter.detach())).sum())
        if bad:
            kind = "trained" if id(parameter) in trained_ids else "frozen"
            verb = "isn't" if bad == 1 else "aren't"
            told.append(f"{bad:,} of {parameter.numel():,} values of the {kind} weight {name} {verb} finite")
    return [*told[:TOLD], *([f"and of {len(told) - TOLD} more weights"] if len(told) > TOLD else [])]


def _part(forward: Forward, rows: Sequence[Row], chosen: Sequence[int]) -> Forward:
    """The forward of some of its rows."""
    sizes = [row.scored for row in rows]

    def tokens(values: Tensor | None) -> Tensor | None:
        if values is None or not values.numel():
            return values
        parts = values.split(sizes)
        return torch.cat([parts[i] for i in chosen])

    logprobs = tokens(forward.logprobs)
    assert logprobs is not None
    scores = None if forward.scores is None else forward.scores[list(chosen)]
    return Forward(logprobs, tokens(forward.entropies), tokens(forward.values), scores)


# --- what to try -------------------------------------------------------------------------------------------------

_OF_ARRAY = {
    "reward": "check the rewards of this task: a reward must return finite numbers (algorithm.reward_clip bounds them)",
    "advantages": "check how advantages are made: the rewards, and credit() of an algorithm of your own",
    "returns": "check how returns are made: the rewards, the critic, and credit() of an algorithm of your own",
    "old_logprobs": "the scoring pass gave it: replay in float32 (--dtype float32)",
    "reference_logprobs": "the reference gave it: check reference.name and reference.init_from, or use float32",
    "values": "the critic gave it: lower optim.critic_learning_rate, or use float32",
    "sampled_logprobs": "the sampler gave it: set engine.dtype to float32",
}


def _remedies(evidence: Evidence, outcome: Outcome, variants: dict[str, Outcome]) -> tuple[str, ...]:
    recipe = evidence.recipe
    rate = f"lower optim.learning_rate ({recipe.optim.learning_rate:g} here)"
    found: list[str] = []
    float32, plain = variants.get("in float32"), variants.get("by plain rows")
    if float32 is not None and float32.cause == "none":
        mixed = recipe.model.autocast
        found.append(
            "it is finite in float32: set model.autocast=bfloat16 or none"
            if mixed == "float16"
            else f"it is finite in float32: set {'model.autocast=none' if mixed != 'none' else 'model.dtype=float32'}"
        )
    if plain is not None and plain.cause == "none":
        found.append("it is finite by plain rows: set model.tree=false, and report it, since both should be equal")
    match outcome.cause:
        case "weights":
            found += [f"an earlier update, or the model's own files, broke them: {rate} and go on from a checkpoint "]
            found[-1] += f"before step {evidence.step} (`sapwood checkpoints`)"
        case "module" | "outputs":
            found += [f"the weights have grown too large: {rate} and go on from an earlier checkpoint"]
        case "arrays":
            told = outcome.found["arrays"]
            found += [
                advice for name, advice in _OF_ARRAY.items() if any(re.search(rf"\b{name} of\b", s) for s in told)
            ]
        case "loss" | "slope":
            found += ["the models are fine, the loss isn't: look at logarithms, roots and divisions of an algorithm of"]
            found[-1] += " your own, and at extreme advantages and coefficients"
        case "gradient":
            found += [rate]
            if outcome.largest > LARGE:
                found += [f"the forward holds values up to {outcome.largest:.2g}: the weights have grown too large; "]
                found[-1] += "go on from an earlier checkpoint (`sapwood checkpoints`)"
        case "none" if "loss_scale" in evidence.numbers:
            found += ["a loss scale that was too high is expected in float16: it is lowered by itself"]
        case "none":
            found += ["what broke it is not in the update: dropout drew other units, or the hardware failed; if it "]
            found[-1] += "comes back, run `sapwood doctor` and another machine"
    return tuple(found)
