"""The chain of docs/results.md, from the command line: every step starts from what the one before left."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sapwood.cli import main
from sapwood.run import read_metrics
from tests.learning import save_tiny_model

ITEMS = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(6) for b in range(6)]


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Folder of a finished chain on a tiny model."""
    folder = tmp_path_factory.mktemp("chain")
    model = save_tiny_model(folder / "model")
    recipe = {
        "run": {"dir": "set below", "steps": 3},
        "model": {"name": str(model), "lora": {"rank": 4}, "init_from": str(folder / "sft")},
        "env": {"name": "prompts", "items": ITEMS},
        "rewards": [{"name": "numeric"}],
        "algorithm": {"name": "grpo", "group_size": 4},
        "engine": {"max_new_tokens": 4},
        "optim": {"learning_rate": 1e-2, "batch_size": 6},
        "eval": {"tasks": 3, "at_start": False},
    }
    base = folder / "base.yaml"
    base.write_text(json.dumps(recipe))
    run("data", "tasks", base, "--count", 60, "--out", folder / "demonstrations.jsonl")
    demonstrations = [f"data.path={folder / 'demonstrations.jsonl'}", "run.steps=40"]
    run("train", base, "algorithm=sft", "model.init_from=null", f"run.dir={folder / 'sft'}", *demonstrations)
    rollouts, pairs = folder / "rollouts.jsonl", folder / "pairs.jsonl"
    run("rollout", base, "--split", "train", "--tasks", 30, "--out", rollouts)
    run("data", "pairs", rollouts, "--answers", "--per-task", 2, "--out", pairs)
    judge = folder / "judge.yaml"
    judge.write_text(json.dumps({**{key: recipe[key] for key in ("run", "model", "optim")}, "algorithm": "reward"}))
    learn = [f"data.path={pairs}", "data.eval_fraction=0.2"]
    run("train", judge, f"run.dir={folder / 'reward'}", *learn)
    run("train", base, "algorithm=dpo", f"run.dir={folder / 'dpo'}", *learn)
    run("train", base, f"run.dir={folder / 'grpo'}", "algorithm.kl_coef=0.1")
    judged = f'rewards=[{{name: reward_model, path: "{folder / "reward"}"}}]'
    run("train", base, "algorithm.name=ppo", "algorithm.epochs=1", judged, f"run.dir={folder / 'ppo'}")
    return folder


def test_every_step_is_there_and_measured(chain):
    for name in ("sft", "dpo", "grpo", "ppo"):
        assert json.loads((chain / name / "evaluation.json").read_text())["results"]
    assert "held_out" in json.loads((chain / "reward" / "evaluation.json").read_text())


def test_sft_taught_something(chain):
    records = read_metrics(chain / "sft" / "metrics.jsonl")
    assert records[-1]["loss"] < records[0]["loss"] - 0.5


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_the_reference_is_the_tuned_model(chain, name):
    first = read_metrics(chain / name / "metrics.jsonl")[0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)  # step 1 is measured before the first update


def test_dpo_starts_where_sft_ended(chain):
    assert read_metrics(chain / "dpo" / "metrics.jsonl")[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_ppo_was_paid_by_the_reward_model(chain):
    first = read_metrics(chain / "ppo" / "metrics.jsonl")[0]
    assert {"value_loss", "policy_loss", "returns"} <= set(first)
    assert abs(first["reward"]) > 1e-3
    assert (chain / "ppo" / "checkpoints" / "step_000003" / "critic").is_dir()


def test_chosen_replies_are_right(chain):
    pairs = [json.loads(line) for line in (chain / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) > 10
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)


@pytest.mark.slow
@pytest.mark.smollm
def test_the_chain_on_the_bundled_model_in_short(tmp_path):
    """SFT answers where the base can't, and preferences that mean something are learnt while a coin's are not."""
    sft, pairs, coin = tmp_path / "sft", tmp_path / "pairs.jsonl", tmp_path / "coin.jsonl"
    short = ["eval.tasks=64", "eval.max_samples=64"]
    run("train", "recipes/chain/sft.yaml", f"run.dir={sft}", "run.steps=30", *short)
    told = json.loads((sft / "evaluation.json").read_text())
    before, after = (result["mean"] for result in told["results"])
    assert before < 0.05
    assert after > before + 0.1
    start = f"model.init_from={sft}"
    rollouts = tmp_path / "rollouts.jsonl"
    asked = ["--split", "train", "--tasks", 150, "--out", rollouts, "algorithm.group_size=4", start]
    run("rollout", "recipes/chain/grpo.yaml", *asked)
    for out, flags in ((pairs, []), (coin, ["--shuffle"])):
        run("data", "pairs", rollouts, "--answers", "--per-task", 2, *flags, "--out", out)
    accuracy = {}
    for name, path in (("pairs", pairs), ("coin", coin)):
        folder = tmp_path / f"dpo_{name}"
        data = [f"data.path={path}", "data.eval_fraction=0.3"]
        run(
            "train", "recipes/chain/dpo.yaml", f"run.dir={folder}", "run.steps=20", "eval.every=0", start, *data, *short
        )
        accuracy[name] = json.loads((folder / "evaluation.json").read_text())["held_out"]["metrics"]["trained model"]
    assert accuracy["pairs"]["accuracy"] > 0.65
    # Some 64 pairs of a fair coin: a share beyond .5 +- .2 is 3.2 standard errors away.
    assert 0.3 < accuracy["coin"]["accuracy"] < 0.7
