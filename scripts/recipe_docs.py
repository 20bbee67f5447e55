"""Rewrite the option tables inside docs/recipes.md: `make docs`. A test fails where they are out of date.

Keys, types and defaults come from the models that check a recipe; what a key means is written here, and a key without
a meaning, or a meaning without a key, is an error.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sapwood import sections
from sapwood.data.section import DataSection, SourceSection
from sapwood.engines import Sampling
from sapwood.engines.local import LocalOptions

BEGIN, END = "<!-- options: written by `make docs` -->\n\n", "<!-- end of options -->"

SECTIONS: dict[str, type[BaseModel]] = {
    "run": sections.RunSection,
    "model": sections.ModelSection,
    "model.lora": sections.LoraSection,
    "reference": sections.ReferenceSection,
    "critic": sections.CriticSection,
    "data": DataSection,
    "data.sources": SourceSection,
    "engine": Sampling,
    "engine (local)": LocalOptions,
    "optim": sections.OptimSection,
    "eval": sections.EvalSection,
    "early_stopping": sections.EarlyStoppingSection,
    "checkpoint": sections.CheckpointSection,
    "guards": sections.GuardsSection,
    "guards.limits": sections.GuardLimits,
    "samples": sections.SamplesSection,
}
ABOUT = {
    "run": "Where and how long. Give `steps` or `epochs`.",
    "model": "The policy.",
    "model.lora": "Low-rank adapters; `lora: null` trains all weights.",
    "reference": "What the policy is held to, where that isn't the policy at step 0. Only for algorithms that use one.",
    "critic": "The value model. Only for algorithms that have one (ppo, distill).",
    "data": "Files and hub sets to learn from, or whose prompts are rolled out. One source's keys may stand here too.",
    "data.sources": "A list of files, folders, globs or hub ids. The same keys hold for `data.eval_sources`.",
    "engine": "Who samples. `name` (`local`) is the engine; these keys hold for every one.",
    "engine (local)": "Of the engine `local`.",
    "optim": "The optimiser, and what one step sees: `batch_size` x `gradient_accumulation` tasks or records.",
    "eval": "Held-out tasks and records.",
    "early_stopping": "Left out, a run makes all its steps.",
    "checkpoint": "See [reliability](reliability.md).",
    "guards": "What a run warns of, and when it stops by itself: see [guards](guards.md).",
    "guards.limits": "What each warning is raised at, by its name; [guards](guards.md) says what is measured.",
    "samples": "",
}
MEANINGS: dict[str, dict[str, str]] = {
    "run": {
        "dir": "The run folder; it must not exist yet.",
        "steps": "Optimisation steps; a step sees one batch.",
        "epochs": "Passes over `data`; 0.5 is half of it. An env has none.",
        "seed": "All randomness derives from it.",
    },
    "model": {
        "name": "A known name (`sapwood list model`), a folder or a hub id.",
        "init_from": "An adapter, a checkpoint or a run to start from, whatever algorithm made it.",
        "dtype": "Of the weights. `auto` is bfloat16 on a GPU and float32 on a CPU.",
        "autocast": "Mixed precision: float32 weights, products in this type. `float16` scales the loss (T4).",
        "lora": "See below; null trains all weights.",
        "quantize": "Of the base weights; needs `lora`.",
        "gradient_checkpointing": "Less memory, more time.",
        "device": "`auto`, `cpu`, `cuda` or `cuda:1`; short: `--device`.",
        "device_map": "How accelerate spreads a large model over devices, e.g. `auto`.",
        "cache_dir": "Where hub files are kept.",
        "trust_remote_code": "Run code that comes with a hub model.",
        "chat_template": "A Jinja file in place of the tokenizer's template.",
        "tree": "false computes plain rows: the same results, slower; to compare.",
    },
    "model.lora": {
        "rank": "Width of the update's two factors.",
        "alpha": "The update is scaled by alpha / rank.",
        "dropout": "Of the adapters' inputs, in training.",
        "target_modules": "`all-linear`, or a list of module names.",
    },
    "reference": {
        "name": "A model of its own: a folder or a hub id.",
        "init_from": "An adapter or run on it.",
        "precompute": "Compute its log-probabilities over `data` once, before training.",
    },
    "critic": {
        "kind": "An adapter and a head on the policy's base, a head on the policy itself, or a model of its own.",
        "name": "Of kind `model`: a folder or a hub id; a reward model's is a common start.",
        "init_from": "An adapter or run to start from.",
        "lora": "Of kind `adapter`; the policy's unless given.",
        "detach": "Of kind `head`: keep its gradient out of the policy.",
    },
    "data": {
        "sources": "See below; `data: FILE` and `data: [FILE, FILE]` are short for it.",
        "eval_sources": "Held-out data of their own, in place of `eval_fraction`.",
        "eval_fraction": "Share of the distinct prompts that is held out.",
        "max_samples": "Records read of all sources together, the first ones of each; to debug.",
        "max_length": "Tokens of a whole example.",
        "max_prompt_length": "Tokens of its prompt.",
        "long_prompt": "What happens to a longer prompt; `drop_turns` drops the oldest messages, never the system's.",
        "long_reply": "What happens to a longer reply.",
        "system": "A system message for records that have none.",
        "train_on": "Assistant turns of a conversation that are learnt.",
        "on_bad_record": "Stop at the first bad record, or skip, count and list them.",
        "shuffle": "Draw an order for each epoch from the seed.",
    },
    "data.sources": {
        "path": "A file (also .gz), folder, glob or hub id.",
        "format": "By the file's name unless given.",
        "shape": "What a record is, where its fields don't say.",
        "split": "Of a hub set or a folder.",
        "subset": "Of a hub set or a folder.",
        "revision": "Of a hub set.",
        "weight": "Share of an epoch's records, relative to the other sources; all or none have one.",
        "max_samples": "The first so many good records of this source.",
        "input": "Field of the prompt.",
        "context": "Field that is appended to the prompt.",
        "output": "Field of the reply.",
        "chosen": "Field of the better reply.",
        "rejected": "Field of the worse reply.",
        "messages": "Field of a whole conversation.",
        "answer": "Field that rewards compare with.",
        "label": "Field that says whether a reply is desirable.",
        "margin": "Field that says by how much the chosen reply is better.",
        "score_chosen": "Field of its score, for a margin.",
        "score_rejected": "Field of its score, for a margin.",
        "system": "Field of a record's own system prompt.",
    },
    "engine": {
        "temperature": "0 is greedy, and can't train.",
        "top_k": "Keep the k most probable tokens; 0 keeps all.",
        "top_p": "Keep the smallest set of tokens with this mass.",
        "min_p": "Drop tokens below this share of the top probability.",
        "max_new_tokens": "Of one reply.",
        "stop": "End the reply once its text contains one of these.",
        "stop_token_ids": "End it at one of these tokens.",
        "ignore_eos": "Go on after the end token.",
    },
    "engine (local)": {
        "max_batch": "Rows that run at the same time.",
        "kv_budget_tokens": "Tokens whose keys and values are kept.",
        "prefill_chunk": "Prompt tokens per forward.",
        "dtype": "Of sampling, where it should differ from the model's.",
        "runtime": "The engine's own forward pass, or the model's; `auto` takes the former where it fits.",
    },
    "optim": {
        "name": "`adamw_8bit` needs `pip install 'sapwood[quantize]'`.",
        "learning_rate": "The peak of the schedule.",
        "head_learning_rate": "Of scalar heads made from scratch; `learning_rate` unless given.",
        "critic_learning_rate": "Of the critic with its head; `learning_rate` unless given.",
        "schedule": "After the warm-up.",
        "warmup_steps": "A linear rise to the peak, before any schedule.",
        "min_learning_rate": "Where linear and cosine end, and no plateau goes below.",
        "plateau_metric": "What `plateau` watches; the held-out return or loss unless given.",
        "plateau_factor": "What the rate is multiplied by.",
        "plateau_patience": "Evaluations without improvement before it is.",
        "weight_decay": "Decoupled, as AdamW has it.",
        "betas": "Decay of AdamW's two running means.",
        "eps": "AdamW's epsilon.",
        "max_grad_norm": "The gradient of a step is scaled down to this norm.",
        "max_gap": "A run stops where sampler and trainer disagree by more nats a token.",
        "token_budget": "Distinct tokens of a micro-batch: memory, never the gradient.",
        "batch_size": "Tasks rolled out, or records, of a micro-batch before `token_budget` splits it.",
        "gradient_accumulation": "Micro-batches of a step.",
    },
    "eval": {
        "every": "Steps between evaluations; 0: at the end only.",
        "tasks": "Held-out tasks that are played.",
        "max_samples": "At most so many held-out tasks or records; to debug.",
        "at_start": "Evaluate the untrained model too.",
        "baselines": "Play the environment's controllers without a language model too.",
        "temperature": "Of the evaluation; 0 is greedy.",
        "metrics": "Further metrics: names (`sapwood list`) or `file.py:function`, with options.",
    },
    "early_stopping": {
        "metric": "Any logged name; the held-out return, or loss where nothing is played, unless given.",
        "mode": "Which way is better; `auto` knows that losses and divergences should fall.",
        "patience": "Measurements without improvement before the run ends.",
        "min_delta": "What counts as an improvement.",
    },
    "checkpoint": {
        "every": "Steps between checkpoints; 0 without `minutes`: at the end only.",
        "minutes": "Wall-clock minutes between checkpoints.",
        "keep": "The newest that stay.",
        "best": "A metric (`eval/return`, say); the checkpoint with the best value of it stays too.",
        "mode": "Whether `best` should rise (`max`) or fall (`min`); `auto` goes by its name.",
        "background": "Write while training goes on, from a copy of what is trained.",
    },
    "guards": {
        "max_skipped": "Updates in a row that may be skipped as not finite before the run stops.",
        "keep_evidence": "Skipped updates that stay in evidence/ for `sapwood replay`, the newest ones; 0: none.",
        "stop_on": "Warnings that end the run, by name.",
        "off": "Warnings that are not raised.",
        "limits": "See below.",
    },
    "guards.limits": {
        "sampler_gap": "Share of `optim.max_gap`.",
        "entropy_collapse": "Share of the entropy at the start.",
        "entropy_explosion": "Multiple of the entropy at the start.",
        "kl_runaway": "Nats a token.",
        "policy_lag": "Nats a token.",
        "clip_fraction": "Share of tokens.",
        "target_kl_stops": "Steps in a row.",
        "reward_hacking": "Factor by which replies change their length, or repeat themselves.",
        "reward_collapse": "Multiple of the rewards' standard deviation at the start.",
        "reward_stalled": "Steps.",
        "no_signal": "Share of groups.",
        "env_failures": "Share of episodes.",
        "parse_failures": "Share of replies.",
        "length_limit": "Share of replies.",
        "value_divergence": "Multiple of the lowest value loss.",
        "gradient_spike": "Multiple of the usual gradient norm.",
        "loss_divergence": "Multiple of the lowest training loss.",
        "overfitting": "Rise of the held-out loss, as a share of its lowest.",
        "chosen_falls": "Share of the margin's growth.",
        "too_easy": "Accuracy.",
    },
    "samples": {"every": "Steps between files of samples; 0: none. Unless given, 1 for rollouts and 0 for data."},
}


def tables() -> str:
    """The tables of all sections, as Markdown. Raises KeyError where keys and meanings differ."""
    parts = []
    for section, model in SECTIONS.items():
        meanings, keys = MEANINGS[section], model.model_fields
        if set(meanings) != set(keys):
            raise KeyError(f"{section}: meanings and keys differ in {sorted(set(meanings) ^ set(keys))}")
        rows = [
            f"| `{key}` | {_type(info.annotation, info.metadata)} | {_default(section, key, info)} | {meanings[key]} |"
            for key, info in keys.items()
        ]
        head = [f"### {section}", "", *([ABOUT[section], ""] if ABOUT[section] else [])]
        parts.append("\n".join([*head, "| key | value | default | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n\n"


def _type(annotation: Any, rules: typing.Sequence[Any] = ()) -> str:
    """A type in words: `text`, `number > 0`, `a` or `b`."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inner[0], inner[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(item, rules) for item in inner if item is not type(None))
    if origin is tuple:
        return "list" if Ellipsis in inner else f"list of {len(inner)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    name = {int: "integer", float: "number", bool: "true, false", str: "text"}.get(annotation, "path")
    return f"{name}{''.join(_bounds(rules))}"


def _bounds(rules: typing.Sequence[Any]) -> list[str]:
    flat = [rule for item in rules for rule in (item.metadata if isinstance(item, FieldInfo) else [item])]
    found = []
    for rule in flat:
        if isinstance(rule, Ge):
            found.append(f" ≥ {rule.ge}")
        elif isinstance(rule, Gt):
            found.append(f" > {rule.gt}")
        elif isinstance(rule, Lt):
            found.append(f", < {rule.lt}")
        elif isinstance(rule, Le):
            found.append(f", ≤ {rule.le}")
    return found


def _default(section: str, key: str, field: FieldInfo) -> str:
    if (section, key) == ("model.lora", "alpha"):
        return "2 x rank"
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "rank 16" if key == "lora" else "see below"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:g}" if isinstance(value, int | float) else f"`{value}`"


def main() -> None:
    """Replace what is between the marks."""
    page = Path(__file__).parents[1] / "docs" / "recipes.md"
    above, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, below = rest.partition(END)
    page.write_text(above + BEGIN + tables() + END + below, encoding="utf-8")


if __name__ == "__main__":
    main()
