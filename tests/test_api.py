"""The scripting interface: open, reply, score, measure."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import sapwood
from sapwood.errors import ConfigError, DataError, ModelError
from tests.learning import save_tiny_model

PAIRS = [{"prompt": f"say {i}", "chosen": f"the lamp {i}", "rejected": f"a room {i}"} for i in range(8)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runs(model_dir, tmp_path_factory):
    """A DPO run and a reward model, trained for a few steps."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAPWOOD_CACHE", str(folder / "cache"))
        for name in ("dpo", "reward"):
            sapwood.train(
                {
                    "run": {"dir": str(folder / name), "steps": 2},
                    "model": {"name": str(model_dir), "lora": {"rank": 2}},
                    "data": {"path": str(folder / "pairs.jsonl"), "eval_fraction": 0.25},
                    "algorithm": {"name": name},
                    "optim": {"learning_rate": 1e-2},
                }
            )
        yield folder


@pytest.fixture(scope="module")
def model(model_dir):
    return sapwood.load(model_dir, device="cpu")


def plain_logprobs(model, messages, reply):
    """By transformers alone: the template's tokens, the reply's, one forward."""
    tokenizer = model.policy.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model.policy.model(torch.tensor([prompt + said])).logits[0].double()
    return torch.log_softmax(logits, -1)[range(len(prompt) - 1, len(prompt) + len(said) - 1), said].numpy()


def test_replies(model):
    greedy = {"temperature": 0.0, "max_new_tokens": 5}
    one, two = model.generate(["say 1", [{"role": "user", "content": "say 2"}]], **greedy)
    assert model.chat("say 1", **greedy) == one
    assert model.generate("say 1", **greedy) == [one]
    assert model.generate([{"role": "user", "content": "say 2"}], **greedy) == [two]
    assert model.generate(["say 1"], system="x", **greedy) != [one]
    many = model.generate(["say 1", "say 2"], n=3, max_new_tokens=5, seed=4)
    assert len(many) == 6
    assert len(set(many)) > 2
    assert model.generate(["say 1", "say 2"], n=3, max_new_tokens=5, seed=4, batch=2) == many
    assert all(reply.tokens <= 5 for [reply] in model.replies(["a", "b"], max_new_tokens=5))
    with pytest.raises(ConfigError, match="max_tokens: Extra inputs are not permitted; options are system, n"):
        model.generate("x", max_tokens=3)
    with pytest.raises(DataError, match="prompt 2: the prompt is empty"):
        model.generate(["x", ""])
    with pytest.raises(ModelError, match="score needs a reward model"):
        model.score(["x"], ["y"])


def test_probabilities_are_those_of_transformers(model):
    messages = [{"role": "user", "content": "say 1"}]
    expected = plain_logprobs(model, messages, "the lamp")
    np.testing.assert_allclose(model.logprobs(messages, "the lamp"), expected, atol=1e-5)
    other = plain_logprobs(model, [{"role": "user", "content": "say 2"}], "a room")
    # the mean is over tokens, so the longer reply weighs more
    both = math.exp(-np.concatenate([expected, other]).mean())
    records = [
        {"prompt": "say 1", "response": "the lamp"},
        {"messages": [{"role": "user", "content": "say 2"}, {"role": "assistant", "content": "a room"}]},
    ]
    assert model.perplexity(records) == pytest.approx(both, rel=1e-5)
    assert model.perplexity(["the lamp is on"]) > 1
    with pytest.raises(DataError, match="record 2: has no reply"):
        model.perplexity([records[0], {"prompt": "x"}])
    with pytest.raises(DataError, match="at least one text or record"):
        model.perplexity([])
    with pytest.raises(DataError, match="more than the model's context of 256"):
        model.logprobs("x", "y" * 400)


def test_preferences_by_hand(runs, model):
    trained = sapwood.load(runs / "dpo")
    prompts, chosen, rejected = ([pair[key] for pair in PAIRS[:2]] for key in ("prompt", "chosen", "rejected"))
    found = trained.preference_metrics(prompts, chosen, rejected, beta=0.5)
    by_hand = []
    for pair in PAIRS[:2]:
        sums = [trained.logprobs(pair["prompt"], pair[k]).sum() - model.logprobs(pair["prompt"], pair[k]).sum()
                for k in ("chosen", "rejected")]  # fmt: skip
        by_hand.append([0.5 * float(value) for value in sums])
    np.testing.assert_allclose(found["rewards_chosen"], [a for a, _ in by_hand], atol=1e-4)
    np.testing.assert_allclose(found["rewards_rejected"], [b for _, b in by_hand], atol=1e-4)
    margins = np.array([a - b for a, b in by_hand])
    assert found["reward_margin"] == pytest.approx(margins.mean(), abs=1e-4)
    assert found["preference_accuracy"] == np.mean(margins > 0)
    assert found["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-4)
    same = trained.preference_metrics(prompts, chosen, rejected, reference=model, beta=0.5)
    np.testing.assert_allclose(same["rewards_chosen"], found["rewards_chosen"], atol=1e-4)
    # a policy that is its own reference prefers nothing: ln 2, and ties count half
    none = model.preference_metrics(prompts, chosen, rejected, reference=model)
    assert (none["preference_accuracy"], none["loss"]) == (0.5, pytest.approx(math.log(2)))
    with pytest.raises(DataError, match="2 prompts, 1 chosen and 2 rejected replies are no pairs"):
        trained.preference_metrics(prompts, chosen[:1], rejected)


def test_a_reward_model_scores(runs):
    judge = sapwood.load(runs / "reward")
    prompts, chosen, rejected = ([pair[key] for pair in PAIRS[:3]] for key in ("prompt", "chosen", "rejected"))
    good, bad = judge.score(prompts, chosen), judge.score(prompts, rejected)
    found = judge.preference_metrics(prompts, chosen, rejected)
    np.testing.assert_allclose(found["rewards_chosen"], good, atol=1e-6)
    assert found["reward_margin"] == pytest.approx(np.mean(np.array(good) - bad), abs=1e-6)
    with pytest.raises(ModelError, match="is a reward model: generate needs a language model"):
        judge.generate("x")
    with pytest.raises(DataError, match="3 prompts and 1 replies"):
        judge.score(prompts, ["x"])


def test_a_run_is_evaluated(runs, model):
    trained = sapwood.load(runs / "dpo")
    table = trained.evaluate().records
    assert table is not None
    assert list(table.results) == ["base", "trained"]
    logged = sapwood.read_metrics(runs / "dpo" / "metrics.jsonl")[-1]
    assert table.results["trained"]["loss"] == pytest.approx(logged["eval/loss"], abs=1e-5)
    assert trained.recipe is not None
    assert sapwood.Run.open(runs / "dpo").recipe == trained.recipe
    bare = model.evaluate(trained.recipe).records
    assert bare is not None
    assert bare.results["base"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(ConfigError, match="is no run: say what to evaluate on"):
        model.evaluate()
    checkpoint = sapwood.load(runs / "dpo" / "checkpoints" / "step_000002")
    assert checkpoint.logprobs("a", "b").tolist() == trained.logprobs("a", "b").tolist()


def test_train_takes_a_mapping_a_recipe_or_a_file(tmp_path, model_dir):
    file = tmp_path / "r.yaml"
    file.write_text("run: {dir: x, steps: 1}\nalgorithm: {name: grpo}\nenv: {name: hvac}\n")
    with pytest.raises(ConfigError, match=r"override optim\.lr=1: unknown key "):
        sapwood.train(file, "optim.lr=1")
    with pytest.raises(ConfigError, match="overrides belong to a recipe file"):
        sapwood.train({}, "optim.learning_rate=1")
    with pytest.raises(ConfigError, match="run"):
        sapwood.train({})


def test_a_tracker_averages_what_it_saw():
    tracker = sapwood.MetricsTracker()
    tracker.update({"length": 2, "loss": 1.0})
    tracker.update({"length": 4, "loss": math.nan})
    assert tracker.averages() == {"length": 3.0, "loss": 1.0}


def test_importing_the_loop_does_not_hide_the_public_function():
    from sapwood.train import Trainer

    assert Trainer is not None
    assert callable(sapwood.train)
    assert sapwood.train.__module__ == "sapwood.api"
