"""The `data` section: shorthands, and a sentence for what can't be meant."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from sapwood.data.section import DataSection


@pytest.mark.parametrize(
    "short",
    [
        "a.jsonl",
        ["a.jsonl"],
        {"path": "a.jsonl"},
        [{"path": "a.jsonl"}],
        {"sources": "a.jsonl"},
        {"sources": ["a.jsonl"]},
    ],
)
def test_shorthands_mean_the_same(short: Any) -> None:
    assert DataSection.model_validate(short) == DataSection.model_validate({"sources": [{"path": "a.jsonl"}]})


def test_keys_of_one_source_stand_beside_those_of_the_section() -> None:
    section = DataSection.model_validate(
        {
            "path": "a.csv",
            "input": "problem",
            "output": "solution",
            "max_length": 512,
            "max_samples": 5,
            "system": "Hi.",
        }
    )
    assert section.sources[0].mapping() == {"input": "problem", "output": "solution"}
    assert (section.max_length, section.max_samples, section.system) == (512, 5, "Hi.")
    assert section.sources[0].max_samples is None  # a key that both have is the section's


def test_a_written_section_reads_as_itself() -> None:
    for data in ("a.csv", {"path": "a.csv", "input": "q", "eval_sources": ["b.csv"], "max_length": 64}):
        section = DataSection.model_validate(data)
        assert DataSection.model_validate(section.model_dump(mode="json")) == section


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"path": "a", "inptu": "q"}, "data.inptu is no key of data; did you mean 'input'?"),
        ({"path": "a", "chosen": "x"}, "chosen is mapped and rejected is not"),
        ({"path": "a", "input": "x", "output": "x"}, "input and output are both mapped to the field 'x'"),
        ({"sources": ["a"], "input": "q"}, "data.input belongs to a source: move it into data.sources"),
        ([{"path": "a", "weight": 1.0}, {"path": "b"}], "data.sources.1.weight is missing"),
        ({"path": "a", "max_length": 8, "max_prompt_length": 8}, "leaves no room for a reply"),
        ({"path": "a", "long_reply": "cut_end"}, "data.long_reply has no effect without data.max_length"),
        ({"path": "a", "max_prompt_length": 8, "long_reply": "cut_end"}, "data.long_reply has no effect without"),
        ({"path": "a", "long_prompt": "cut_start"}, "data.long_prompt has no effect without"),
        ({"path": "a", "max_samples": True}, "max_samples is True"),
        ({"sources": []}, "data.sources is empty: name at least one file"),
        ({"path": "a", "eval_fraction": 1.0}, "less than 1"),
    ],
)
def test_what_can_not_be_meant(data: Any, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DataSection.model_validate(data)
    assert sentence in str(caught.value)
