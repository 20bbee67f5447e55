import json

import pytest
from pydantic import ValidationError

from sapwood.envs.prompts import Prompts
from sapwood.errors import ConfigError, DataError
from sapwood.types import Message

ITEMS = tuple({"prompt": f"{i}+1=", "answer": str(i + 1), "level": i % 3} for i in range(20))


def write(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def asked(tasks):
    return [task.prompt[-1].content for task in tasks]


def test_an_episode_asks_once():
    [task] = Prompts(items=ITEMS, system="Be brief.").tasks("train", 1, 0)
    number = int(task.prompt[1].content.split("+")[0])
    assert task.prompt == (Message("system", "Be brief."), Message("user", f"{number}+1="))
    assert (task.answer, task.metadata) == (str(number + 1), {"level": number % 3})
    env = Prompts(items=ITEMS).make(task)
    assert env.start().messages == task.prompt
    step = env.step("anything")
    assert (step.observation, step.terminated, step.reward) == (None, True, 0.0)


def test_splits_are_disjoint_whole_and_stable():
    family = Prompts(items=ITEMS, eval_fraction=0.25)
    train, held_out = asked(family.tasks("train", 15, 0)), asked(family.tasks("eval", 5, 0))
    assert sorted(train + held_out) == sorted(item["prompt"] for item in ITEMS)
    assert set(asked(family.tasks("eval", 5, 9))) == set(held_out)
    assert asked(family.tasks("train", 15, 1)) != train
    # A prompt that occurs twice is on one side only.
    doubled = Prompts(items=(*ITEMS, *ITEMS), eval_fraction=0.25)
    assert set(asked(doubled.tasks("eval", 10, 0))) == set(held_out)
    # Two prompts leave one to evaluate on.
    assert len(Prompts(items=ITEMS[:2]).tasks("eval", 1, 0)) == 1


def test_training_prompts_come_round_again():
    family = Prompts(items=ITEMS, eval_fraction=0.25)
    tasks = family.tasks("train", 40, 3)
    laps = [asked(tasks[:15]), asked(tasks[15:30])]
    assert sorted(laps[0]) == sorted(laps[1])
    assert laps[0] != laps[1]
    assert len({task.id for task in tasks}) == 40
    with pytest.raises(ConfigError, match="holds out 5 prompts, but 6 are asked for"):
        family.tasks("eval", 6, 0)
    with pytest.raises(ConfigError, match="no prompt for eval"):
        Prompts(items=ITEMS, eval_fraction=0).tasks("eval", 1, 0)


def test_files(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\u2028b"}]
    path = write(tmp_path / "train.jsonl", [{"q": chat, "a": 1}, "", {"q": "x", "a": 2}, {"q": "y", "a": 3}])
    held = write(tmp_path / "eval.jsonl", [{"q": "x", "a": 2}])
    family = Prompts(path=path, eval_path=held, prompt_field="q", answer_field="a")
    assert sorted(asked(family.tasks("train", 2, 0))) == ["a\u2028b", "y"]
    assert asked(family.tasks("eval", 1, 0)) == ["x"]
    raw = write(tmp_path / "raw.jsonl", ['{"q": "a\u2028b"}'])
    assert asked(Prompts(path=raw, prompt_field="q", eval_fraction=0).tasks("train", 1, 0)) == ["a\u2028b"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{oops", r"p.jsonl, line 2: not JSON \(.* at column 2\)"),
        ("[1]", "line 2: must be a JSON object with named fields"),
        ({"question": "x"}, r"line 2: no field 'prompt' \(fields: question\); set env.prompt_field"),
        ({"prompt": ""}, "line 2, field 'prompt': a prompt must be a non-empty string"),
        ({"prompt": [{"role": "robot", "content": "x"}]}, "message 0: role is 'robot'"),
        ({"prompt": [{"role": "user"}]}, "message 0: must be an object with role and content"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "the last message is the assistant's"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, sentence):
    path = write(tmp_path / "p.jsonl", [{"prompt": "fine"}, line])
    with pytest.raises(DataError, match=sentence):
        Prompts(path=path).tasks("train", 1, 0)


def test_bad_files_and_options(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "x"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl, line 2: 0xe9 is not UTF-8; save the file as UTF-8"):
        Prompts(path=tmp_path / "latin.jsonl").tasks("train", 1, 0)
    with pytest.raises(DataError, match=r"none.jsonl: No such file or directory; check env.path"):
        Prompts(path=tmp_path / "none.jsonl").tasks("train", 1, 0)
    with pytest.raises(DataError, match="no line holds a prompt"):
        Prompts(path=write(tmp_path / "empty.jsonl", [])).tasks("train", 1, 0)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="UTF-8"):
        Prompts(path=tmp_path / "latin.jsonl").tasks("train", 1, 0)
    with pytest.raises(ValidationError, match="either path"):
        Prompts()
