"""The recipe's `data` section.

data: pairs.jsonl
data: [a.parquet, b.jsonl.gz]
data: {path: sums.csv, input: problem, output: solution, max_length: 512}
data: {sources: [{path: a.jsonl, weight: 0.7}, {path: owner/name, split: train, weight: 0.3}]}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
Format = Literal["auto", "json", "jsonl", "csv", "parquet", "hub"]
Shape = Literal[
    "auto", "prompt", "prompt_response", "instruction", "conversation", "preference", "transcript_pair", "label"
]

#: Parts of a record that a source may map to a field by name, in the order in which errors list them.
PARTS = (
    "input",
    "context",
    "output",
    "chosen",
    "rejected",
    "messages",
    "answer",
    "label",
    "margin",
    "score_chosen",
    "score_rejected",
    "system",
)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: Any) -> Any:
        # YAML reads `yes` and `on` as true, and pydantic reads true as 1: a typo would become a setting.
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"{info.field_name} is {value}; it can't be a truth value")
        return value


class SourceSection(_Section):
    """One file, folder, glob or hub id, and how its fields are named.

    split, subset: of a hub set; of a folder, the files named after the split, the subfolder of the subset. weight: its
    share of an epoch's records, relative to the other sources'. max_samples: the first so many good records.
    The rest name fields: input the prompt, context what is appended to it, output the reply, messages a whole
    conversation, answer what rewards compare with, label whether a reply is desirable, margin (or two scores) by how
    much the chosen reply is better, system a record's own system prompt.
    """

    path: Annotated[str, Field(min_length=1)]
    format: Format = "auto"
    shape: Shape = "auto"
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_samples: Positive | None = None
    input: str | None = None
    context: str | None = None
    output: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    messages: str | None = None
    answer: str | None = None
    label: str | None = None
    margin: str | None = None
    score_chosen: str | None = None
    score_rejected: str | None = None
    system: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _consistent(self) -> SourceSection:
        if (self.chosen is None) != (self.rejected is None):
            given, other = ("chosen", "rejected") if self.chosen else ("rejected", "chosen")
            raise ValueError(f"{given} is mapped and {other} is not: a pair needs both; give {other} too")
        if (self.score_chosen is None) != (self.score_rejected is None):
            given, other = ("chosen", "rejected") if self.score_chosen else ("rejected", "chosen")
            raise ValueError(f"score_{given} is mapped and score_{other} is not: a margin needs both")
        taken: dict[str, str] = {}
        for part, name in self.mapping().items():
            if name in taken and {part, taken[name]} != {"output", "answer"}:
                raise ValueError(f"{taken[name]} and {part} are both mapped to the field {name!r}; keep one")
            taken[name] = part
        return self

    def mapping(self) -> dict[str, str]:
        """The mapped parts: part -> field."""
        return {part: name for part in PARTS if (name := getattr(self, part)) is not None}


class DataSection(_Section):
    """What to learn from, and how examples are cut and split.

    eval_fraction: held out of `sources`, by prompt, so that equal prompts never straddle; no part of `eval_sources`,
    which replace it where given. max_samples: records read of all sources together, the first ones of each.
    max_length, max_prompt_length: tokens of a whole example and of its prompt. long_prompt, long_reply: what happens
    to one that is longer; "drop_turns" drops the oldest messages (never the system message), "cut_start" and
    "cut_end" drop tokens. system: a system message for records that have none. train_on: the assistant turns of a
    conversation that are learnt. on_bad_record: stop at the first bad record, or skip, count and list them.
    """

    sources: tuple[SourceSection, ...]
    eval_sources: tuple[SourceSection, ...] = ()
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    max_samples: Positive | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None
    max_prompt_length: Positive | None = None
    long_prompt: Literal["error", "drop", "drop_turns", "cut_start"] = "drop"
    long_reply: Literal["error", "drop", "cut_end"] = "drop"
    system: Annotated[str, Field(min_length=1)] | None = None
    train_on: Literal["all", "last"] = "all"
    on_bad_record: Literal["error", "skip"] = "error"
    shuffle: StrictBool = True

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, data: Any) -> Any:
        return normalise(data)

    @model_validator(mode="after")
    def _consistent(self) -> DataSection:
        if not self.sources:
            raise ValueError("data.sources is empty: name at least one file")
        weights = [source.weight for source in self.sources]
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError(
                f"data.sources.{weights.index(None)}.weight is missing: weights are shares of a mixture, so give "
                "every source one, or none to use each record once an epoch"
            )
        if self.max_length and self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"data.max_prompt_length ({self.max_prompt_length}) leaves no room for a reply in data.max_length "
                f"({self.max_length}): lower it"
            )
        # A resolved recipe writes out every default, which says nothing.
        if self.long_prompt != "drop" and not (self.max_length or self.max_prompt_length):
            raise ValueError("data.long_prompt has no effect without data.max_prompt_length or data.max_length")
        if self.long_reply != "drop" and not self.max_length:
            raise ValueError("data.long_reply has no effect without data.max_length")
        return self


def normalise(data: Any) -> Any:
    """Write out the shorthands: a path, a list of sources, or one source's keys beside the section's.

    Keys that both have (`max_samples`, `system`) are the section's. Raises ValueError for an unknown key.
    """
    if isinstance(data, str):
        return {"sources": [data]}
    if isinstance(data, list | tuple):
        return {"sources": list(data)}
    if not isinstance(data, Mapping):
        return data
    ours, theirs = set(DataSection.model_fields), set(SourceSection.model_fields)
    for key in data:
        if key not in ours | theirs:
            near = difflib.get_close_matches(str(key), sorted(ours | theirs), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(ours | theirs))}"
            raise ValueError(f"data.{key} is no key of data; {hint}")
    section = {key: value for key, value in data.items() if key in ours}
    source = {key: value for key, value in data.items() if key not in ours}
    for name in ("sources", "eval_sources"):
        if isinstance(section.get(name), str | Mapping):
            section[name] = [section[name]]
    if not source:
        return section
    if "sources" in section:
        raise ValueError(f"data.{next(iter(source))} belongs to a source: move it into data.sources")
    return {"sources": [source], **section}
