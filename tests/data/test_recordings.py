"""Recorded decisions: what is written reads back, becomes groups of the sampled tokens, and what is damaged is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapwood.chat import Chat
from sapwood.data import recordings
from sapwood.data.dataset import open_data
from sapwood.data.recordings import DecisionFile, Recorded, RecordingGrouper, check_model, read
from sapwood.data.section import DataSection
from sapwood.errors import DataError, ModelError
from sapwood.rollout import to_rows
from sapwood.types import Message, StopReason
from tests.chats import tokenizer

TRUNK = (Message("system", "You heat."), Message("user", "20 C"), Message("assistant", '{"power": 0.1}'))
MODEL = {"name": "m", "adapter": None, "weights": "w"}


def decision(state: int = 0, **changes: Any) -> Recorded:
    plain: dict[str, Any] = {
        "prompt": "a",
        "state": f"Zones {state} C \ud800",
        "reply": "0.5",
        "action": (0.5,),
        "token_ids": (20, 21, 22),
        "sampled_logprobs": (-0.5, -1.0, -0.25),
        "kept_logmass": (0.0, -0.125, 0.0),
        "temperature": 0.5,
        "reward": -2.0,
        "total": -7.5,
        "score": 0.75,
        "advantage": 1.25,
        "value_target": -0.5,
        "source": {"task": "t", "step": state},
    }
    return Recorded(**{**plain, **changes})


def write(path: Path, *decisions: Recorded, model: dict[str, Any] = MODEL) -> Path:
    file = DecisionFile(model, {"building": "b"}, "group", 0.9, {"a": TRUNK}, decisions or (decision(),))
    path.write_bytes(b"".join(recordings.chunks(file)))
    return path


def section(*paths: Path, **options: Any) -> DataSection:
    return DataSection.model_validate({"sources": [{"path": str(p)} for p in paths], "eval_fraction": 0, **options})


def test_what_is_written_reads_back(tmp_path) -> None:
    path = write(tmp_path / "d.json", decision(0), decision(1, advantage=0.0))
    found = read(path)
    assert found.decisions[1] == decision(1, advantage=0.0)
    assert (found.model, found.world, found.rank, found.gamma) == (MODEL, {"building": "b"}, "group", 0.9)
    assert found.prompts == {"a": TRUNK}
    assert sum(line.startswith('{"prompt"') for line in path.read_text().splitlines()) == 2  # a decision a line


def test_groups_have_the_tokens_that_were_sampled(tmp_path) -> None:
    chat = Chat(tokenizer())
    data, held_out = open_data(section(write(tmp_path / "d.json")), "recordings", 0)
    assert len(held_out) == 0
    group = RecordingGrouper(chat, section(tmp_path / "d.json")).group(data[0], 0)
    assert group is not None
    [trajectory] = group.trajectories
    [turn] = trajectory.turns
    assert turn.token_ids.tolist() == [20, 21, 22]
    assert turn.prompt_ids.tolist() == chat.start((*TRUNK, Message("user", decision().state))).tolist()
    assert (turn.stop_reason, turn.reward, trajectory.temperature) == (StopReason.STOP, -2.0, 0.5)
    assert trajectory.info == {"advantage": 1.25, "value_target": -0.5, "score": 0.75}
    # The row is divided by the temperature of its recording, whatever the source's is.
    [row] = to_rows([group], 1.0)
    assert row.temperature == 0.5
    assert row.sampled_logprobs is not None
    assert row.sampled_logprobs.tolist() == [-0.5, -1.0, -0.25]
    assert row.kept_logmass is not None
    assert row.kept_logmass.tolist() == [0.0, -0.125, 0.0]
    trajectory.temperature = None
    assert to_rows([group], 0.7)[0].temperature == 0.7


def test_equal_states_are_never_both_learnt_and_held_out(tmp_path) -> None:
    path = write(tmp_path / "d.json", *(decision(i % 8, reward=float(-i)) for i in range(40)))
    train, held_out = open_data(section(path, eval_fraction=0.3), "recordings", 0)
    states = [{record.prompt[-1].content for record in part} for part in (train, held_out)]
    assert len(train) + len(held_out) == 40
    assert len(held_out) == 10  # 2 of 8 states
    assert not states[0] & states[1]
    assert sorted(train.order(0).tolist()) == list(range(30))
    assert len(open_data(section(path, max_samples=5), "recordings", 0)[0]) == 5


def test_decisions_that_are_too_long_are_counted(tmp_path) -> None:
    data, _ = open_data(section(write(tmp_path / "d.json")), "recordings", 0)
    for limit, what in (({"max_length": 20}, "decision"), ({"max_prompt_length": 20}, "prompt")):
        grouper = RecordingGrouper(Chat(tokenizer()), section(tmp_path / "d.json", **limit))
        assert grouper.group(data[0], 0) is None
        assert grouper.counts == {f"dropped for a long {what}": 1}
    strict = section(tmp_path / "d.json", max_length=20, long_reply="error")
    with pytest.raises(
        DataError, match=r"d\.json, decision 1: the decision has \d+ tokens, more than data\.max_length"
    ):
        RecordingGrouper(Chat(tokenizer()), strict).group(data[0], 0)


def test_only_the_model_that_made_them_learns_from_them(tmp_path) -> None:
    data, _ = open_data(section(write(tmp_path / "d.json")), "recordings", 0)
    check_model(data.recordings, MODEL)
    for name, told in (("adapter", "adapter none against x"), ("weights", "weights w against x")):
        with pytest.raises(ModelError, match=rf"d\.json: recorded of another model .*\({told}\); train the model that"):
            check_model(data.recordings, {**MODEL, name: "x"})
    other = write(tmp_path / "e.json", model={**MODEL, "adapter": "x"})
    with pytest.raises(DataError, match=r"d\.json and .*e\.json were recorded of different models \(adapter none"):
        open_data(section(tmp_path / "d.json", other), "recordings", 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.update(kind="x"), 'has no "format": 1 and "kind": "decisions"'),
        (
            lambda d: d.update(controller="ppo"),
            r"holds whole trajectories \(of 'ppo'\), and only a language model's own",
        ),
        (lambda d: d.update(decisions=[]), "decisions is a list of 0, not a list of at least one"),
        (lambda d: d.update(prompts={"a": [{"role": "user"}]}), "not a message with role and content"),
        (lambda d: d["decisions"][0].update(prompt="b"), "decision 1: prompt is 'b', not an id of prompts"),
        (lambda d: d["decisions"][0].update(token_ids=[]), "token_ids is a list of 0, not a list of at least one"),
        (lambda d: d["decisions"][0].update(token_ids=[True]), "token_ids is a list of 1, not a list of"),
        (lambda d: d["decisions"][0]["kept_logmass"].pop(), "kept_logmass has 2 numbers for 3 token_ids"),
        (lambda d: d["decisions"][0].update(sampled_logprobs=[1, 0, 0]), "sampled_logprobs is '1.0', not at most 0"),
        (lambda d: d["decisions"][0].update(temperature=0), "temperature is '0.0', not above 0: a greedy reply"),
        (lambda d: d["decisions"][0].update(advantage=-1), "advantage is '-1.0', not 0 or more"),
        (lambda d: d["decisions"][0].update(reward="x"), r"reward is 'x', not a number within 1e\+09"),
        (lambda d: d["decisions"][0].update(score=float("nan")), "score is 'nan', not a number within"),
        (lambda d: d["decisions"][0].update(reply=None), "reply is 'None', not a text"),
        (lambda d: d["decisions"][0].update(colour=1), "'colour' is no field of it; known: action"),
    ],
)
def test_damage_is_told_by_its_place(tmp_path, change, sentence) -> None:
    path = write(tmp_path / "d.json")
    content = json.loads(path.read_text("utf-8", "surrogatepass"))
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=sentence) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_none(tmp_path) -> None:
    (tmp_path / "cut.json").write_bytes(write(tmp_path / "d.json").read_bytes()[:300])
    with pytest.raises(DataError, match=r"cut\.json: holds no recorded decisions, or is cut short: no JSON at line"):
        read(tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(DataError, match="it is no JSON object"):
        read(tmp_path / "list.json")
    with pytest.raises(DataError, match="there is no such file of recorded decisions; make one with `sapwood pipeline"):
        read(tmp_path / "nowhere.json")


def test_a_number_that_is_not_finite_is_not_written() -> None:
    file = DecisionFile(MODEL, {}, "group", 0.9, {"a": TRUNK}, (replace(decision(), reward=float("inf")),))
    with pytest.raises(ValueError, match="JSON compliant"):
        b"".join(recordings.chunks(file))
    assert np.isfinite(decision().reward)
