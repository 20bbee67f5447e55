"""Every trainer learns a tiny task through the one loop, and its twin on shuffled data or rewards does not.

The data: a prompt asks for one of two words, and the right reply is the word. In the twin, which word is right is drawn
at random, so nothing about held-out records can be learnt.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from sapwood.config import parse_recipe
from sapwood.train import train
from tests.learning import save_tiny_model

WORDS = ("lamp", "table")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def records(kind: str, shuffled: bool, count: int = 240) -> list[dict]:
    """Prompts "NUMBER WORD"; the number makes every prompt different."""
    rng = np.random.default_rng(5)
    made = []
    for number in range(count):
        right = int(rng.integers(2))
        prompt = f"{number} {WORDS[right]}"
        if shuffled:
            right = int(rng.integers(2))
        good, bad = WORDS[right], WORDS[1 - right]
        if kind == "sft":
            made.append({"prompt": prompt, "response": good})
        elif kind == "kto":
            liked = bool(rng.integers(2))
            made.append({"prompt": prompt, "completion": good if liked else bad, "label": liked})
        else:
            made.append({"prompt": prompt, "chosen": good, "rejected": bad})
    return made


def measured(model_dir, folder, kind: str, shuffled: bool, steps: int = 40, **changes) -> tuple[dict, dict]:
    """(held-out metrics before, after) of a run."""
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(kind, shuffled)))
    data = {
        "run": {"dir": str(folder / "run"), "steps": steps, "seed": 1},
        "model": {"name": str(model_dir), "lora": None},
        "data": {"path": str(path), "eval_fraction": 0.3},
        "algorithm": kind,
        "optim": {"learning_rate": 1e-2, "batch_size": 16},
        "samples": {"every": 0},
    }
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values} if isinstance(values, dict) else values
    result = train(parse_recipe(data))
    assert result.figures is not None
    before, after = result.figures.results.values()
    return dict(before), dict(after)


def test_sft_learns(model_dir, tmp_path):
    before, after = measured(model_dir, tmp_path, "sft", shuffled=False)
    assert before["perplexity"] > 20  # a random model of 320 tokens
    assert after["perplexity"] < 1.1
    assert after["perplexity"] == pytest.approx(np.exp(after["nll"] if "nll" in after else after["loss"]), rel=1e-4)


def test_sft_on_shuffled_replies_learns_the_words_but_not_which(model_dir, tmp_path):
    _, after = measured(model_dir, tmp_path, "sft", shuffled=True)
    # Half a bit a reply can't be learnt: ln 2 over at most four tokens is at least 0.17 nats a token.
    assert after["perplexity"] > 1.15


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_preferences_are_learnt(model_dir, tmp_path, kind):
    before, after = measured(model_dir, tmp_path, kind, shuffled=False)
    if kind == "dpo":
        assert before["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert after["accuracy"] > 0.95
    assert after["margin"] > before["margin"]


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_shuffled_preferences_are_not(model_dir, tmp_path, kind):
    _, after = measured(model_dir, tmp_path, kind, shuffled=True)
    # 72 held-out pairs of a fair coin: a share beyond .5 +- .2 is 3.4 standard errors away.
    assert 0.3 < after["accuracy"] < 0.7
