"""Replies to many prompts: order, seeds, formats of the input, and a killed run that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sapwood import cli, generate
from sapwood.engines import Sampling
from sapwood.engines.scripted import ScriptedEngine
from sapwood.errors import BudgetError, ConfigError, DataError, ModelError, StorageError
from sapwood.generate import JsonLines, as_messages, read_prompts, run_generate
from sapwood.opening import Origin, locate
from sapwood.types import Message
from tests.chats import tokenizer
from tests.learning import save_tiny_model

TOK = tokenizer()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def echo(monkeypatch):
    """An engine that shouts the prompt, and the seeds that it was given."""
    seeds = []

    def shout(prompt, request):
        seeds.append(request.seed)
        return prompt.rsplit("user\n", 1)[1].split("<|im_end|>")[0].upper()

    policy = SimpleNamespace(tokenizer=TOK, max_context=256, model=None)
    monkeypatch.setattr(Origin, "load", lambda self: policy)
    monkeypatch.setattr(generate, "make_engine", lambda name, policy, options: ScriptedEngine(TOK, shout))
    return seeds


def test_replies_come_in_order(echo, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"q": q}) + "\n" for q in "abc"))
    out, seen = tmp_path / "deep" / "out.jsonl", []
    few = Sampling(max_new_tokens=4)
    told = run_generate("m", (), source, out, few, progress=lambda *p: seen.append(p), prompt_field="q", batch=2)
    assert [(record["prompt"], record["reply"]) for record in told] == [("a", "A"), ("b", "B"), ("c", "C")]
    assert [json.loads(line) for line in out.read_text().splitlines()] == told
    assert seen[-1] == ("replies", 3, 3)
    assert list(out.parent.iterdir()) == [out]
    assert len(set(echo)) == 3
    [record] = run_generate("m", ["x"], sampling=few)
    assert record == {"prompt": "x", "reply": "X", "stop_reason": "eos", "tokens": 2}


def test_samples_have_seeds_of_their_own_whatever_the_batch(echo):
    few = Sampling(max_new_tokens=4)
    told = run_generate("m", ["a", "b"], sampling=few, n=3, batch=6)
    assert [(record["prompt"], record["sample"]) for record in told] == [(p, i) for p in "ab" for i in range(3)]
    together = list(echo)
    echo.clear()
    run_generate("m", ["a", "b"], sampling=few, n=3, batch=1)
    assert echo == together
    assert len(set(echo)) == 6


def test_a_conversation_keeps_its_messages(echo):
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, Message("user", "c")]
    [record] = run_generate("m", [asked], sampling=Sampling(max_new_tokens=4), system="s")
    assert [m["role"] for m in record["prompt"]] == ["system", "user", "assistant", "user"]
    assert record["reply"] == "C"


PROMPTS = [
    ("", "prompt 1: the prompt is empty"),
    ([], "must end with the user's message"),
    ([{"role": "assistant", "content": "x"}], "must end with the user's message"),
    ([{"role": "robot", "content": "x"}], "prompt 1, message 0: role is 'robot', not one of system, user, assistant"),
    ([{"role": "user"}], "prompt 1, message 0: must be an object with role and content"),
]


@pytest.mark.parametrize(("prompt", "problem"), PROMPTS)
def test_a_bad_prompt_is_named(prompt, problem):
    with pytest.raises(DataError, match=problem):
        run_generate("m", [prompt])


def test_what_contradicts_is_refused(echo, tmp_path):
    own = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    with pytest.raises(DataError, match="a system message of its own, and another was given"):
        as_messages(own, "prompt 1", "be brief")
    for bad in ({}, {"prompts": ["x"], "input_path": tmp_path}):
        with pytest.raises(ConfigError, match="either prompts or an input file"):
            run_generate("m", **bad)
    with pytest.raises(BudgetError, match=r"prompt 2 has \d+ tokens, which with 4 .* context of 256"):
        run_generate("m", ["a", "b" * 299], sampling=Sampling(max_new_tokens=4))
    with pytest.raises(ConfigError, match="is a reward model: it scores replies"):
        run_generate(Origin("r", locate("r").section, "scalar"), ["x"])


def test_a_bad_input_names_the_options_of_this_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SAPWOOD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "q.jsonl"
    path.write_text('{"quest": "x"}\n')
    with pytest.raises(DataError, match=r"q.jsonl line 1: no prompt: .* so map it by name, e.g. --field\.$"):
        read_prompts(path)
    with pytest.raises(DataError, match=r"--field is 'question', but the record has no such field; did you mean 'ques"):
        read_prompts(path, "question")
    path.write_text('{"prompt": "x"}\n{"quest": "x"}\n')
    with pytest.raises(DataError, match=r"q.jsonl, line 2: no field 'prompt' \(fields: quest\); name it by --field"):
        read_prompts(path)


def test_prompts_are_read_from_any_data(tmp_path, monkeypatch):
    monkeypatch.setenv("SAPWOOD_CACHE", str(tmp_path / "cache"))
    table = tmp_path / "q.csv"
    table.write_text("question,answer\nfirst?,1\nsecond?,2\n")
    assert read_prompts(table) == [(Message("user", "first?"),), (Message("user", "second?"),)]
    pairs = tmp_path / "p.jsonl"
    pairs.write_text(json.dumps({"prompt": "hi", "chosen": "a", "rejected": "b"}) + "\n")
    assert read_prompts(pairs) == [(Message("user", "hi"),)]
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(DataError, match="line 2"):
        read_prompts(broken)
    with pytest.raises(DataError, match="there is no file"):
        read_prompts(tmp_path / "none.jsonl")


def test_what_cannot_work_is_told_before_anything_is_sampled(tmp_path):
    with pytest.raises(StorageError, match=r"is a folder; give the name of a file in it"), JsonLines(tmp_path):
        pass
    with pytest.raises(ConfigError, match=r"^seed is -1; it should be 0 or more\.$"):
        run_generate("m", ["hi"], seed=-1)


def test_a_writer_keeps_whole_steps_of_its_own_job_only(tmp_path):
    path, job = tmp_path / "o.jsonl", {"seed": 1, "model": "m"}
    with pytest.raises(KeyError), JsonLines(path, job, step=2) as lines:  # noqa: PT012
        lines.write({"i": 0}, {"i": 1}, {"i": 2})
        raise KeyError
    part = tmp_path / "o.jsonl.part"
    part.write_bytes(part.read_bytes() + b'{"i": 3')  # torn by the kill
    with pytest.raises(StorageError, match="was begun with another seed: repeat the command that began it"):
        JsonLines(path, {"seed": 2, "model": "m"}).__enter__()
    with JsonLines(path, job, step=2) as lines:
        assert lines.kept == [{"i": 0}, {"i": 1}]
        lines.write({"i": 2})
    assert path.read_text() == '{"i": 0}\n{"i": 1}\n{"i": 2}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_run_goes_on_and_gives_the_same_bytes(model_dir, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(60)))
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"

    def command(out: Path) -> list[str]:
        given = ["--input", str(source), "--max-new-tokens", "24", "--batch", "4", "--out", str(out)]
        return ["generate", str(model_dir), *given, "--system", "be brief"]

    running = subprocess.Popen(
        [sys.executable, "-m", "sapwood.cli", *command(cut)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    part = tmp_path / "cut.jsonl.part"
    deadline = time.monotonic() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") >= 8) and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "it had finished before it was killed: give it more prompts"
    done = part.read_bytes().count(b"\n")
    assert not cut.exists()
    assert 8 <= done < 60
    inode = part.stat().st_ino
    assert cli.main(command(cut)) == 0
    assert cut.stat().st_ino == inode  # the same file, continued
    assert cli.main(command(whole)) == 0
    assert cut.read_bytes() == whole.read_bytes()
    assert len(whole.read_text().splitlines()) == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.jsonl", "in.jsonl", "whole.jsonl"]


def test_names_lead_to_models(model_dir, tmp_path):
    assert locate("some/hub-id").section.name == "some/hub-id"
    assert (locate(model_dir).section.name, locate(model_dir).head) == (str(model_dir), "lm")
    assert locate(model_dir, device="cpu", dtype="bfloat16").section.dtype == "bfloat16"
    with pytest.raises(ConfigError, match="unknown key 'devise' in model; did you mean 'device'"):
        locate(model_dir, devise="cpu")
    with pytest.raises(ConfigError, match="device"):
        locate(model_dir, device="tpu")
    with pytest.raises(ModelError, match=r"neither a run \(recipe.yaml\), an adapter"):
        locate(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "task_type": "SEQ_CLS"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found = locate(adapter)
    assert (found.section.name, found.section.init_from, found.head) == ("smollm2-135m", adapter, "scalar")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no base model"):
        locate(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="can't be read as JSON"):
        locate(adapter)
