"""Sapwood from a script: open anything that was trained, make it reply, score and measure it.

import sapwood

model = sapwood.load("runs/mine")                      # a run, checkpoint, adapter, folder, name or hub id
print(model.generate(["What is 2 + 2?"], max_new_tokens=16))
print(model.preference_metrics(prompts, chosen, rejected))
print(model.evaluate())                                # base against trained, on what was held out
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sapwood.chat import Chat
from sapwood.config import Recipe, load_recipe, parse_recipe
from sapwood.data import Record
from sapwood.engines import Engine, Sampling
from sapwood.errors import ConfigError, DataError, ModelError
from sapwood.generate import BATCH, Prompt, Reply, as_messages, check_seed, sample
from sapwood.opening import Head, Origin, build_chat, locate, make_engine
from sapwood.types import Floats, Group, Message, Row

if TYPE_CHECKING:
    from sapwood.compare import Evaluation
    from sapwood.models.load import Policy
    from sapwood.train import TrainResult

_PACKED = 8192  # distinct tokens of one forward


def load(name: str | Path, *, head: Head | None = None, **options: Any) -> Model:
    """Open a run folder (what it trained last), a checkpoint, an adapter, a model's folder, a known name or a hub id.

    options: keys of a recipe's `model` section (device="cuda:0", dtype="bfloat16", quantize="4bit", chat_template=...).
    head: "scalar" for a reward model whose files don't say so. Raises ModelError for what can't be opened, ConfigError
    for an option that isn't one.
    """
    origin = locate(name, head, **options)
    return Model(origin, origin.load())


def train(recipe: Recipe | Mapping[str, Any] | Path | str, *overrides: str) -> TrainResult:
    """Train by a recipe: one that was loaded, a mapping, or a file with `key=value` overrides, into a fresh run folder.

    Raises SapwoodError for what a user can act on.
    """
    from sapwood.train import train

    if isinstance(recipe, Recipe | Mapping):
        if overrides:
            raise ConfigError(f"{overrides[0]!r}: overrides belong to a recipe file; change the mapping itself.")
        return train(recipe if isinstance(recipe, Recipe) else parse_recipe(recipe))
    return train(load_recipe(recipe, overrides))


@dataclass(eq=False)
class Model:
    """An open model. policy: its weights and tokenizer; origin: what it was opened from."""

    origin: Origin
    policy: Policy

    @cached_property
    def _chat(self) -> Chat:
        """Messages to tokens, by the model's chat template."""
        return build_chat(self.policy, self.origin.section)

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the run it came from."""
        return self.origin.recipe

    @cached_property
    def _engine(self) -> Engine:
        return make_engine("local", self.policy, {})

    # ---- replies ---------------------------------------------------------------------------------------------

    def generate(self, prompts: Prompt | Sequence[Prompt], *, system: str | None = None, **options: Any) -> list[str]:
        """Replies to prompts: texts, or conversations that end with the user's message.

        options: those of `replies`. With n > 1 the n replies to the first prompt come first.
        """
        return [reply.text for members in self.replies(prompts, system=system, **options) for reply in members]

    def replies(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        system: str | None = None,
        n: int = 1,
        seed: int = 0,
        batch: int = BATCH,
        **sampling: Any,
    ) -> list[list[Reply]]:
        """n replies to each prompt, with why each ended and how long it is.

        sampling: temperature (1.0; 0 is greedy), top_k, top_p, min_p, max_new_tokens (128), stop. seed: each prompt has
        one of its own, derived from it and the prompt's place. batch: replies sampled together.
        """
        self._need("lm", "generate")
        check_seed(seed)
        asked = [as_messages(prompt, f"prompt {i}", system) for i, prompt in enumerate(_several(prompts), 1)]
        chosen, per_chunk = _sampling(sampling), max(1, batch // max(n, 1))
        found: list[list[Reply]] = []
        for first in range(0, len(asked), per_chunk):
            chunk = asked[first : first + per_chunk]
            found += sample(
                self._engine, self._chat, chunk, chosen, seed, n=n, first=first, max_context=self.policy.max_context
            )
        return found

    def chat(self, messages: Prompt, **options: Any) -> str:
        """The reply to one conversation; options are those of `replies`."""
        return self.replies([messages], **options)[0][0].text

    # ---- probabilities ---------------------------------------------------------------------------------------

    def logprobs(self, prompt: Prompt, reply: str) -> Floats:
        """Log-probability [T] of each token of a reply, its end-of-turn token included."""
        self._need("lm", "logprobs")
        row = self._row(_record(prompt, (reply,), "prompt 1"), 0)
        return self._scored([row])[0]

    def perplexity(self, items: Sequence[str] | Sequence[Record] | Sequence[Mapping[str, Any]]) -> float:
        """exp of the mean negative log-likelihood a token: of whole texts, or of the replies in records.

        A record is {"prompt", "response"}, {"messages"}, or any shape that training reads.
        """
        self._need("lm", "perplexity")
        if not items:
            raise DataError("perplexity needs at least one text or record.")
        texts = [item for item in items if isinstance(item, str)]
        if len(texts) == len(items):
            from sapwood.compare import text_perplexity

            return text_perplexity(self.policy, texts)["perplexity"]
        rows = [self._row(record, 0) for record in _records(items)]
        logprobs = np.concatenate(self._scored(rows)).astype(np.float64)
        return math.exp(min(-float(logprobs.mean()), 700.0))

    def preference_metrics(
        self,
        prompts: Sequence[Prompt],
        chosen: Sequence[str],
        rejected: Sequence[str],
        *,
        reference: Model | str | Path | None = None,
        beta: float = 0.1,
    ) -> dict[str, Any]:
        """How a model ranks pairs: accuracy, margin, and each reply's implicit reward.

        The implicit reward is beta * (log pi(reply) - log pi_ref(reply)) (DPO, arXiv 2305.18290). reference: a model or
        what `load` opens; unless given, the base without the adapter, and without an adapter none (log pi_ref = 0).
        A reward model ranks by its own score. Returns preference_accuracy (ties count half), reward_margin (mean of
        chosen - rejected), reward_chosen, reward_rejected, loss (-log sigmoid of the margin), and lists
        rewards_chosen, rewards_rejected.
        """
        if not len(prompts) == len(chosen) == len(rejected) or not len(prompts):
            raise DataError(
                f"preference_metrics: {len(prompts)} prompts, {len(chosen)} chosen and {len(rejected)} rejected "
                "replies are no pairs; give as many of each, and at least one."
            )
        pairs = zip(prompts, chosen, rejected, strict=True)
        records = [_record(prompt, (good, bad), f"prompt {i}") for i, (prompt, good, bad) in enumerate(pairs, 1)]
        rows = [self._row(record, member, g) for g, record in enumerate(records) for member in (0, 1)]
        if self.origin.head == "scalar":
            rewards = np.array(self._scores(rows), np.float64)
        else:
            rewards = beta * (self._sums(rows) - self._reference_sums(reference, rows, records))
        good, bad = rewards[0::2], rewards[1::2]
        margin = good - bad
        return {
            "preference_accuracy": float(np.mean((margin > 0) + 0.5 * (margin == 0))),
            "reward_margin": float(margin.mean()),
            "reward_chosen": float(good.mean()),
            "reward_rejected": float(bad.mean()),
            "loss": float(np.logaddexp(0.0, -margin).mean()),
            "rewards_chosen": good.tolist(),
            "rewards_rejected": bad.tolist(),
        }

    def score(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float]:
        """A reward model's score of each reply."""
        self._need("scalar", "score")
        if len(prompts) != len(replies):
            raise DataError(f"score: {len(prompts)} prompts and {len(replies)} replies; give a reply to each prompt.")
        pairs = zip(prompts, replies, strict=True)
        return self._scores([self._row(_record(p, (r,), f"prompt {i}"), 0, i) for i, (p, r) in enumerate(pairs, 1)])

    # ---- evaluation ------------------------------------------------------------------------------------------

    def evaluate(self, recipe: Recipe | Mapping[str, Any] | Path | str | None = None, **options: Any) -> Evaluation:
        """This model beside its base on a recipe's held-out tasks or data; on those of its own run unless given.

        options: count and data of `sapwood.compare.run_eval`. The weights are loaded again, so that memory holds them
        twice. Raises ConfigError where there is no recipe.
        """
        from sapwood.compare import run_eval

        if recipe is None:
            found = self.recipe
        elif isinstance(recipe, Recipe):
            found = recipe
        else:
            found = parse_recipe(recipe) if isinstance(recipe, Mapping) else load_recipe(recipe)
        if found is None:
            raise ConfigError(f"{self.origin.name} is no run: say what to evaluate on, evaluate('recipes/x.yaml').")
        own = self.origin.section
        if recipe is not None:
            found = found.model_copy(update={"model": own.model_copy(update={"init_from": None})})
        return run_eval(found, own.init_from, **options)

    # ---- parts -----------------------------------------------------------------------------------------------

    def _need(self, head: Head, what: str) -> None:
        if self.origin.head != head:
            kind = "a reward model" if self.origin.head == "scalar" else "a language model"
            other = "a language model" if head == "lm" else "a reward model (head='scalar')"
            raise ModelError(f"{self.origin.name} is {kind}: {what} needs {other}.")

    def _row(self, record: Record, member: int, group: int = 0) -> Row:
        """The tokens of one reply of a record, with its assistant turns to score."""
        from sapwood.rollout import to_rows

        found = _group(self._chat, record, member)
        [row] = to_rows([found], 1.0)
        if len(row.token_ids) > self.policy.max_context:
            raise DataError(
                f"{record.source}: prompt and reply have {len(row.token_ids)} tokens, more than the model's context of "
                f"{self.policy.max_context}; shorten them."
            )
        row.group, row.member = group, member
        return row

    def _scored(self, rows: Sequence[Row]) -> list[Floats]:
        """Log-probabilities of the rows' scored tokens."""
        from sapwood.models.roles import Models
        from sapwood.ops.batch import Needs
        from sapwood.tree import pack

        Models(self.policy).score(pack(rows, _PACKED), Needs(old_logprobs=True))
        found = [row.old_logprobs for row in rows]
        return [values for values in found if values is not None]

    def _sums(self, rows: Sequence[Row]) -> Any:
        return np.array([values.astype(np.float64).sum() for values in self._scored(rows)])

    def _scores(self, rows: Sequence[Row]) -> list[float]:
        import torch

        from sapwood.models.roles import Models
        from sapwood.ops.batch import Needs
        from sapwood.tree import pack

        needs = Needs(logprobs=False, scores=True, entropies=False)
        models = Models(self.policy, needs=needs)
        models.eval()
        found: dict[int, float] = {}
        with torch.no_grad():
            for micro in pack(rows, _PACKED):
                scores = models.forward(micro, needs).scores
                assert scores is not None
                found |= {id(row): value for row, value in zip(micro, scores.tolist(), strict=True)}
        return [found[id(row)] for row in rows]

    def _reference_sums(self, reference: Model | str | Path | None, rows: Sequence[Row], records: list[Record]) -> Any:
        if reference is None:
            if not self.policy.has_lora:
                return np.zeros(len(rows))
            from sapwood.models.role import BASE

            return Model(self.origin, self.policy.view(BASE))._sums(rows)
        other = reference if isinstance(reference, Model) else load(reference)
        other._need("lm", "a reference")
        return other._sums([other._row(records[row.group], row.member, row.group) for row in rows])


@dataclass
class MetricsTracker:
    """Running averages of whatever is measured along the way."""

    totals: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def update(self, metrics: Mapping[str, float]) -> None:
        """Add one value of each metric; those that aren't finite numbers count for nothing."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self.totals[name] = self.totals.get(name, 0.0) + float(value)
                self.counts[name] = self.counts.get(name, 0) + 1

    def averages(self) -> dict[str, float]:
        """The mean of every metric over the updates that had it."""
        return {name: total / self.counts[name] for name, total in self.totals.items()}


def _several(prompts: Any) -> list[Prompt]:
    """A single text or conversation is a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    found = list(prompts)
    return [found] if found and isinstance(found[0], Mapping | Message) else found


def _sampling(options: Mapping[str, Any]) -> Sampling:
    from pydantic import ValidationError

    try:
        return Sampling.model_validate({"max_new_tokens": 128, **options})
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(("system", "n", "seed", "batch", *Sampling.model_fields))
        raise ConfigError(f"{first['loc'][0]}: {first['msg']}; options are {known}.") from error


def _record(prompt: Prompt, replies: Sequence[str], where: str) -> Record:
    messages = as_messages(prompt, where)
    return Record(messages, tuple((Message("assistant", reply),) for reply in replies), source=where)


def _records(items: Sequence[Any]) -> list[Record]:
    """Records of mappings, in any shape that training reads. Raises DataError for a bad one."""
    from sapwood.data.section import SourceSection
    from sapwood.data.shapes import BadRecord, LeftOut, Normaliser, adapt

    read = Normaliser(SourceSection(path="records"), "demonstrations")
    found: list[Record] = []
    for number, item in enumerate(items, 1):
        try:
            made = adapt(item, "demonstrations") if isinstance(item, Record) else read(item)
        except (BadRecord, LeftOut) as error:
            raise DataError(f"record {number}: {error}.") from error
        found += [replace(record, source=record.source or f"record {number}") for record in made]
    return found


def _group(chat: Chat, record: Record, member: int) -> Group:
    """One reply of a record, every assistant message of it a turn."""
    from sapwood.data.groups import Grouper
    from sapwood.data.section import DataSection

    only = Record(record.prompt, (record.replies[member],), source=record.source)
    grouped = Grouper(chat, DataSection.model_validate("records")).group(only, 0)
    if grouped is None:
        raise DataError(f"{record.source}: the chat template refuses the conversation.")
    return grouped
