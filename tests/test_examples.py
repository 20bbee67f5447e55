"""The examples run, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.cli import main
from sapwood.config import parse_recipe
from sapwood.envs.check import check_env
from sapwood.plugins import load
from sapwood.run import read_metrics
from sapwood.trackers.check import check_tracker
from sapwood.train import train
from sapwood.types import Floats, Group, Ids, StopReason, Task, Trajectory, Turn
from tests.conftest import make_row
from tests.learning import save_tiny_model

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def imported(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_of(name, model_dir, tmp_path, **changes):
    """An example's recipe, on the tiny model and for two steps."""
    data = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    data["run"] = {"dir": str(tmp_path / "run"), "steps": 2}
    data["model"] = {"name": str(model_dir), "lora": {"rank": 2}}
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_recipe(data)


def test_minimal_grpo(model_dir, capsys):
    module = imported("minimal_grpo")
    curve = module.main(["--model", str(model_dir), "--steps", "2", "--prompts", "2", "--group", "4"])
    assert len(curve) == 2
    assert capsys.readouterr().out.count("reward") == 2
    assert module.reward_of("it is 140", 150) == pytest.approx(1 - 10 / 50)
    assert module.reward_of("no", 150) == -1.0
    # mean 2, sample standard deviation sqrt(2): (1 - 2) / 1.4142 = -.7071
    np.testing.assert_allclose(module.advantages_of(np.array([[1.0, 3.0]])), [[-0.7071, 0.7071]], atol=1e-3)
    assert len((EXAMPLES / "minimal_grpo.py").read_text().splitlines()) <= 300


def test_custom_env(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    family = load("env", "examples/custom_env.py:Guess")(highest=9, turns=2)
    check_env(family)
    result = train(recipe_of("custom_env", model_dir, tmp_path, eval={"tasks": 2}))
    assert (result.policy_dir / "adapter_config.json").is_file()


def test_custom_reward():
    def said(text: str) -> Trajectory:
        none: Ids = np.zeros(0, np.int64)
        floats: Floats = np.zeros(0, np.float32)
        return Trajectory(Task("t"), [Turn(none, none, floats, floats, StopReason.EOS, text)])

    reward = load("reward", str(EXAMPLES / "custom_reward.py") + ":Concise")(words=4)
    # 6 words against 4: excess 2/4, so brief is .5; of 6 words 3 are distinct
    [[parts, empty]] = reward.score([Group(Task("t"), [said("a b c a b c"), said("")])])
    assert parts == {"brief": 0.5, "fresh": 0.5}
    assert empty == {"brief": 1.0, "fresh": 0.0}


def test_custom_reward_function_and_metrics(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    pytest.importorskip("reasoning_gym")
    data = yaml.safe_load((EXAMPLES / "custom_reward.yaml").read_text())
    data["run"] |= {"dir": str(tmp_path / "run"), "steps": 1}
    data["model"] = {"name": str(model_dir), "lora": {"rank": 2}}
    data["eval"]["tasks"] = 2
    data["env"]["few_shot"] = 0  # the tiny model's context is short
    train(parse_recipe(data))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in logged for name in line}
    for name in ("reward/closeness", "reward/length", "numbers/bare", "numbers/paid", "agreement", "response_length"):
        assert any(logged_name.endswith(name) for logged_name in names), (name, sorted(names))


def test_custom_tracker(tmp_path):
    module = imported("custom_tracker")
    check_tracker(module.Table(columns=("loss", "eval/pass@8")), tmp_path)
    # The first session had the steps 0 to 3, the second goes on after 2.
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0] == "step,loss,eval/pass@8"
    assert [line.split(",")[0] for line in lines[1:]] == ["0", "1", "2", "3", "4", "5"]
    assert lines[4] == "3,1.0,1.0"


def test_custom_functions_by_hand():
    reward = load("reward", str(EXAMPLES / "custom_reward.py") + ":closeness")(scale=5.0)
    task = Task("t", answer="7")
    none: Ids = np.zeros(0, np.int64)
    floats: Floats = np.zeros(0, np.float32)
    said = [Trajectory(task, [Turn(none, none, floats, floats, StopReason.EOS, t)]) for t in ("7", "5 or 9", "no")]
    # 9 is 2 off of 5: 1 - 2/5
    [[right, near, nothing]] = reward.score([Group(task, said)])
    assert [right, near, nothing] == [{"closeness": 1.0}, {"closeness": pytest.approx(0.6)}, {"closeness": 0.0}]
    said[0].reward = 1.0
    metrics = str(EXAMPLES / "custom_metric.py")
    shares = load("metric", f"{metrics}:numbers")(longest=1).compute([Group(task, said)])
    assert shares == {"numbers/bare": pytest.approx(1 / 3), "numbers/paid": pytest.approx(1 / 3)}
    twice = Group(task, [said[0], said[0], said[1]])
    assert load("metric", f"{metrics}:Agreement")().compute([twice]) == {"agreement": pytest.approx(2 / 3)}


def test_custom_algorithm(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    algorithm = load("algorithm", "examples/custom_algorithm.py:MovingBaseline")(decay=0.75, entropy_coef=0.5)
    rows = [make_row([1, 2, 3], [1, 2]), make_row([1, 4], [1])]
    # the first batch is its own baseline, mean 2; then .75 * 2 + .25 * 2 = 2 stands against rewards of 4 and 8
    for rewards, advantages, baseline in (((1.0, 3.0), (-1.0, 1.0), 2.0), ((4.0, 8.0), (2.0, 6.0), 2.0)):
        for row, reward in zip(rows, rewards, strict=True):
            row.reward = reward
        _, metrics = algorithm.credit([], rows)
        assert [row.advantages.tolist() for row in rows] == [[advantages[0]] * 2, [advantages[1]]]
        assert metrics["baseline"] == baseline
    assert algorithm.state() == {"baseline": 3.0}  # .75 * 2 + .25 * 6
    # -(-1 * 2 + -2 * 2 + -3 * 6) / 3 = 8; mean entropy (1 + 2 + 3) / 3 = 2, weight .5
    forward = Forward(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert float(algorithm.loss(forward, RowBatch.of(rows), Totals.of(rows)).loss) == pytest.approx(8.0 - 0.5 * 2.0)
    low = [{"name": "tests.learning:LowTokens"}]  # the tiny model never says a number
    changes = {"eval": {"tasks": 2}, "optim": {"batch_size": 4}, "rewards": low}
    result = train(recipe_of("custom_algorithm", model_dir, tmp_path, **changes))
    metrics = read_metrics(result.run_dir / "metrics.jsonl")
    assert metrics[-1]["baseline"] != metrics[-1]["reward"]
    assert metrics[-1]["grad_norm"] > 0
    assert len((EXAMPLES / "custom_algorithm.py").read_text().splitlines()) < 80


def test_custom_data(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.setenv("SAPWOOD_CACHE", str(tmp_path / "cache"))
    module = imported("custom_data")
    for right, pair in zip(module.sums(), module.preferred_sums(), strict=True):
        a, b = right["prompt"].removesuffix(" =").split(" + ")
        assert int(a) + int(b) == int(right["response"]) == int(pair["chosen"]) != int(pair["rejected"])
    result = train(recipe_of("custom_data", model_dir, tmp_path, optim={"batch_size": 4}, eval={"max_samples": 8}))
    assert result.figures is not None
    assert result.figures.results["base model"]["perplexity"] > 1
    assert main(["data", "check", "examples/custom_data.py:preferred_sums"]) == 0
    assert "400 good records (400 preference), 0 bad" in capsys.readouterr().out


def test_api_tour(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAPWOOD_CACHE", str(tmp_path / "cache"))
    found = imported("api_tour").main(["--model", str(model_dir), "--runs", str(tmp_path / "tour"), "--steps", "2"])
    assert found["first_loss"] == pytest.approx(np.log(2), abs=1e-5)  # DPO starts at its reference
    assert "preference accuracy" in capsys.readouterr().out
    assert (tmp_path / "tour" / "dpo" / "evaluation.json").is_file()
