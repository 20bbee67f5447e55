"""Memory of a run, part by part and phase by phase.

Parameters, adapters, optimiser and snapshots are counted on models without weights, activations and logits by running
those (`sapwood.plan.passes`), keys and values from the tokens that are kept. What libraries, allocators and devices
take beside that is measured in this process where it can be, and otherwise a named constant below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from sapwood.config import Recipe
from sapwood.engines._runtime import LeanRuntime
from sapwood.engines.local import LocalEngine, LocalOptions
from sapwood.models.forward import causal_lm
from sapwood.models.load import resolve
from sapwood.models.scorer import Scorer
from sapwood.parts import Parts
from sapwood.plan.machine import MIB, packs
from sapwood.plan.meter import held
from sapwood.plan.passes import ACTIVATIONS, GRADIENTS, LOGITS, Pass, Passes
from sapwood.plan.workload import Played, Workload, nodes
from sapwood.rewards.reward_model import RewardModel

PHASES: tuple[str, ...] = ("loading", "evaluating", "sampling", "scoring", "learning", "updating", "saving")

#: What libraries map and make at their first products, beside what this process holds once they are imported.
FIRST_USE = 16 * MIB
#: A CUDA context with its kernels, and what torch's caching allocator holds beyond live tensors: both are estimates,
#: from NVIDIA's and torch's documentation; none was measured on a GPU.
CUDA_CONTEXT = 600 * MIB
CUDA_CACHE = 0.1
#: What glibc's allocator holds beyond live blocks, since a freed block is too short for an aligned request of its own
#: size: a share of what is alive at the peak of a pass, and one of all that comes and goes in it. Fitted to runs on one
#: machine; benchmarks/plan_error.py says how well.
FRAGMENTS_OF_LIVE, FRAGMENTS_OF_CHURN = 0.22, 0.043
#: Bytes of a quantised parameter with its scales: int8 and a scale a row; nf4 and an fp32 scale for 64 values.
_QUANTISED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
#: Arrays of a parameter's size that AdamW keeps, and bytes that bitsandbytes' keeps for any (a scale for 256 values).
_ADAMW, _ADAMW_8BIT = 2.0, 2 * (1 + 4 / 256)
#: Arrays of [rows, vocabulary] in fp32 that drawing a token has at once.
_DRAW = 4


@dataclass(frozen=True)
class Part:
    """One part of the memory. phases: bytes by phase; phases that aren't named have none."""

    name: str
    phases: Mapping[str, int]

    @property
    def most(self) -> int:
        """Its largest size at any time."""
        return max(self.phases.values(), default=0)

    def at(self, phase: str) -> int:
        """Its size in a phase."""
        return self.phases.get(phase, 0)


@dataclass(frozen=True)
class Memory:
    """All parts, by phase."""

    parts: tuple[Part, ...]
    phases: tuple[str, ...]

    def total(self, phase: str) -> int:
        """The sum of a phase."""
        return sum(part.at(phase) for part in self.parts)

    @property
    def where(self) -> str:
        """The phase with the largest sum."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return self.total(self.where)


@dataclass(frozen=True)
class Parameters:
    """Counts. total: of the policy, all adapters on its base included; trained: of everything that learns; others: by
    role, of models of their own."""

    total: int
    trained: int
    others: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(parts: Parts) -> Parameters:
        """Those of a run; weights shared between modules count once."""
        trained = sum(p.numel() for group in parts.models.parameter_groups().values() for p in group)
        others = {role: sum(p.numel() for p in model.parameters()) for role, model in _own_models(parts).items()}
        return Parameters(sum(p.numel() for p in parts.policy.model.parameters()), trained, others)


@dataclass(frozen=True)
class Sampler:
    """What the local engine takes. copies: its own weights; kept: keys and values; drawing: arrays that drawing tokens
    needs; prefill: arrays of its passes over prompts, by phase; reloading: weights packed before the old ones go."""

    copies: int = 0
    kept: int = 0
    drawing: int = 0
    prefill: Mapping[str, int] = field(default_factory=dict)
    reloading: int = 0


@dataclass(frozen=True)
class Sizes:
    """What doesn't depend on how long a micro-batch gets. runtime: what the process holds before any weight; weights:
    by role; files: mapped while weights are turned into another type; dense: the largest quantised layer as numbers;
    gradients, moments: of all that is trained; largest: of its parameters; snapshot: one is held while training goes
    on."""

    device: str
    runtime: int
    weights: Mapping[str, int]
    files: int
    sampler: Sampler
    dense: int
    gradients: int
    moments: int
    largest: int
    snapshot: bool

    def memory(self, found: Mapping[str, Pass], stretch: float = 1.0) -> Memory:
        """Parts by phase. stretch: how much longer than those of the passes the loop's micro-batches are."""
        table = self._resident() | self._passing(found, stretch)
        # Gradients stay until the next update, which begins without any: at its peak are those that it has made.
        if "learning" in found:
            table["gradients"]["learning"] = found["learning"].peak.by_label.get(GRADIENTS, 0)
        return Memory(tuple(Part(name, sizes) for name, sizes in table.items() if any(sizes.values())), PHASES)

    def _resident(self) -> dict[str, dict[str, int]]:
        """What stays."""
        started, copied = PHASES[1:], self.gradients + self.moments
        first = FIRST_USE if self.device == "cpu" else CUDA_CONTEXT
        runtime = self.runtime if self.device == "cpu" else 0
        table = {"python and libraries" if runtime else "CUDA context": dict.fromkeys(PHASES, runtime + first)}
        table |= {name: dict.fromkeys(PHASES, size) for name, size in self.weights.items()}
        table["weights"]["loading"] += self.files
        table["sampler's copies of weights"] = dict.fromkeys(PHASES, self.sampler.copies)
        table["optimiser"] = dict.fromkeys(started, self.moments)
        table["gradients"] = dict.fromkeys(started, self.gradients)
        table["keys and values"] = dict.fromkeys(started, self.sampler.kept)
        # A copy goes to the CPU, so on a GPU it costs nothing there.
        on = ("sampling", "scoring", "learning", "updating") if self.snapshot else ()
        table["checkpoint snapshot"] = dict.fromkeys(("saving", *on), copied if self.device == "cpu" else 0)
        return table

    def _passing(self, found: Mapping[str, Pass], stretch: float) -> dict[str, dict[str, int]]:
        """What comes and goes with a phase, and what the allocator keeps of it."""
        activations = dict(self.sampler.prefill)
        logits = dict.fromkeys(self.sampler.prefill, self.sampler.drawing)
        churn: dict[str, float] = {}
        for phase, one in found.items():
            longer = stretch if phase in ("learning", "scoring") else 1.0
            made = int(one.peak.by_label.get(ACTIVATIONS, 0) * longer) + self.dense
            activations[phase] = max(activations.get(phase, 0), made)
            logits[phase] = max(logits.get(phase, 0), one.peak.by_label.get(LOGITS, 0))
            churn[phase] = one.work.churn * longer
        # AdamW goes parameter by parameter on a CPU, with two arrays of the largest, and over all at once on a GPU.
        step = 2 * self.largest if self.device == "cpu" else self.gradients
        temporary = {"updating": max(step, self.sampler.reloading)}
        held_back = {}
        for phase in PHASES:
            live = activations.get(phase, 0) + logits.get(phase, 0) + temporary.get(phase, 0)
            if self.device == "cpu":
                held_back[phase] = int(FRAGMENTS_OF_LIVE * live + FRAGMENTS_OF_CHURN * churn.get(phase, 0.0))
            else:
                held_back[phase] = int(CUDA_CACHE * live)
        return {
            "activations": activations,
            "logits": logits,
            "optimiser's step": temporary,
            "kept by the allocator": held_back,
        }


def sizes(recipe: Recipe, parts: Parts, work: Workload, device: str, runtime: int) -> Sizes:
    """Count them. device: "cpu" or "cuda"; runtime: what the process holds before any weight."""
    trained = [p for group in parts.models.parameter_groups().values() for p in group]
    weights, checkpoints = _weights(recipe, parts), recipe.checkpoint
    staying, files = _mapped(recipe, parts.policy.model) if device == "cpu" else (0, 0)
    weights["weights"] += staying
    return Sizes(
        device=device,
        runtime=runtime,
        weights=weights,
        files=files,
        sampler=_sampler(recipe, parts, work, device),
        dense=_largest_dense(recipe, parts) if device == "cpu" else 0,
        gradients=held(trained),
        moments=_moments(recipe, trained),
        largest=max((p.numel() * p.element_size() for p in trained), default=0),
        snapshot=checkpoints.background and bool(checkpoints.every or checkpoints.minutes),
    )


def passes_of(parts: Parts, work: Workload, passes: Passes) -> dict[str, Pass]:
    """The passes with the largest micro-batch of each phase."""
    needs = parts.algorithm.needs
    found: dict[str, Pass] = {}
    if work.largest:
        several = any(len(update) > 1 for step in work.steps for update in step.updates)
        found["learning"] = passes.learn(work.largest, needs, again=several)
    scored = needs.old_logprobs or needs.reference_logprobs or needs.values
    batches = [micro for step in work.steps for micro in step.scoring]
    if batches and scored:
        found["scoring"] = passes.score(max(batches, key=nodes), needs)
    for scorer in _scorers(parts) if batches else ():
        read = passes.read(scorer.policy, scorer.head, max(batches, key=nodes))
        found["sampling"] = max(read, found.get("sampling", read), key=lambda one: one.peak.total)
    if work.measured:
        most = max(work.measured, key=nodes)
        measured = passes.measure(most, needs)
        other = passes.score(most, needs) if scored else measured
        found["evaluating"] = max(measured, other, key=lambda one: one.peak.total)
    return found


def _weights(recipe: Recipe, parts: Parts) -> dict[str, int]:
    """Bytes of every role's weights; what is shared counts once."""
    policy = parts.policy
    made = {"weights": _base_bytes(policy.model, recipe.model.quantize)}
    adapters = [p for name, p in policy.model.named_parameters() if _is_adapter(name)]
    critic = parts.models.critic
    if critic is not None and critic.policy.model is policy.model:
        adapters += list(critic.head.parameters())
    made["adapters and heads"] = held(adapters)
    for role, model in _own_models(parts).items():
        made[f"{role} model"] = held(p for name, p in model.named_parameters() if _is_adapter(name))
        made[f"{role} model"] += _base_bytes(model, recipe.model.quantize)
    return made


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def _base_bytes(model: nn.Module, quantize: str) -> int:
    """Bytes of the parameters and buffers that no adapter adds, packed as `quantize` says."""
    kept = [p for name, p in model.named_parameters() if not _is_adapter(name)]
    total = held((*kept, *model.buffers()))
    if quantize == "none":
        return total
    dense = [module.weight for module in _packable(model)]
    return total - held(dense) + int(sum(weight.numel() for weight in dense) * _QUANTISED[quantize])


def _packable(model: nn.Module) -> list[nn.Linear]:
    """Layers that quantisation packs."""
    left = ("lm_head", "embed_out", "score", "lora_")
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [module for name, module in modules if not any(part in name for part in left)]


def _largest_dense(recipe: Recipe, parts: Parts) -> int:
    """A quantised layer's weight as numbers, while a product on the CPU uses it."""
    if recipe.model.quantize == "none":
        return 0
    weights = [module.weight for module in _packable(parts.policy.model)]
    return max((weight.numel() * weight.element_size() for weight in weights), default=0)


def _own_models(parts: Parts) -> dict[str, nn.Module]:
    """Models of their own by role; those that are the policy's base under another adapter are none."""
    models, found = parts.models, {}
    if models.reference is not None and models.reference.model is not parts.policy.model:
        found["reference"] = models.reference.model
    if models.critic is not None and models.critic.policy.model is not parts.policy.model:
        found["critic"] = models.critic.policy.model
    own = [scorer for scorer in _scorers(parts) if scorer.policy.model is not parts.policy.model]
    for number, scorer in enumerate(own, 1):
        found["reward" if number == 1 else f"reward {number}"] = scorer.policy.model
    return found


def _scorers(parts: Parts) -> list[Scorer]:
    """Reward models."""
    rewards = parts.tasks.rewards if parts.tasks is not None else getattr(parts.source, "rewards", ())
    found = [reward._scorer for reward in rewards if isinstance(reward, RewardModel)]
    return [scorer for scorer in found if scorer is not None]


def _moments(recipe: Recipe, trained: Sequence[Tensor]) -> int:
    """What the optimiser keeps."""
    if recipe.optim.name == "adamw":
        return int(_ADAMW * held(trained))
    # Small tensors keep their moments in 32 bits.
    return int(sum(p.numel() * (_ADAMW_8BIT if p.numel() >= 4096 else 8) for p in trained))


def _mapped(recipe: Recipe, model: nn.Module) -> tuple[int, int]:
    """Bytes of weight files that stay mapped beside the weights, and of those that are mapped only while they load.

    Weights are views of their file where its type is theirs. Otherwise the file goes once they are made; but where
    only some are made anew (quantised layers), the others keep all of it.
    """
    folder = Path(resolve(recipe.model.name))
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    dense = _base_bytes(model, "none")
    if not total or abs(total - dense) > 0.02 * dense:
        return 0, total
    if recipe.model.quantize == "none":
        return 0, 0
    viewed = dense - held(module.weight for module in _packable(model))
    return total - viewed, 0


def _sampler(recipe: Recipe, parts: Parts, work: Workload, device: str) -> Sampler:
    """Of the local engine; others are their own affair."""
    if not isinstance(parts.engine, LocalEngine):
        return Sampler()
    options = LocalOptions.model_validate(recipe.engine_options())
    runtime, model = parts.engine._runtime, causal_lm(parts.policy.model)
    copies, packed, head = 0, 0, 0
    if isinstance(runtime, LeanRuntime):
        made = [value for layer in runtime._layers for value in vars(layer).values() if isinstance(value, Tensor)]
        shared = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        copies = held(tensor for tensor in made if tensor.untyped_storage()._cdata not in shared)
        if device == "cpu" and packs(runtime._dtype):
            packed = sum(layer.gate_up.numel() for layer in runtime._layers) * 4
            head = runtime._head.numel() * 4
    shape = runtime.kv_shape
    token = 2 * shape.layers * shape.heads * shape.width * shape.dtype.itemsize
    played = {"sampling": work.training, "evaluating": work.held_out}
    rows = min(options.max_batch, max(one.episodes for one in played.values()))
    config = model.config.get_text_config()
    # Residual stream, normed, query-key-value and attention's output; gate, up and their product.
    width = 6 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    chunk = {phase: min(options.prefill_chunk, int(one.prompt_tokens) + 1) for phase, one in played.items()}
    return Sampler(
        copies=copies + packed + head,
        kept=token * _kept(list(played.values()), options),
        drawing=rows * model.get_input_embeddings().weight.shape[0] * 4 * _DRAW,
        prefill={p: chunk[p] * width * shape.dtype.itemsize for p, one in played.items() if one.episodes},
        reloading=packed,
    )


def _kept(played: Sequence[Played], options: LocalOptions) -> int:
    """Tokens with keys and values: an evaluation's prompts stay until the policy changes, beside those of the step that
    follows; rows have one buffer, made for the most of them."""
    shared = sum(one.shared(options.max_batch, options.kv_budget_tokens) for one in played)
    return min(shared, options.kv_budget_tokens) + max(one.tails(options.max_batch) for one in played)
