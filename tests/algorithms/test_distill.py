"""Distill: numbers worked by hand, a run that learns, and its twin on shuffled rewards that doesn't."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from tests.learning import save_tiny_model
from tests.recorded import low_share, opened, record

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.distill import Distill
from sapwood.config import load_recipe, parse_recipe
from sapwood.engines import Request, Sampling
from sapwood.errors import ConfigError, DataError, ModelError, TrainingStopped
from sapwood.opening import build_chat, make_engine
from sapwood.plugins import load
from sapwood.rollout import to_rows
from sapwood.run import Run
from sapwood.sections import ModelSection
from sapwood.train import TrainResult, train
from sapwood.types import Group, Message, Row, StopReason, Task, Trajectory, Turn

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms" / "distill.md"
PLAIN: dict[str, Any] = {"entropy_coef": 0.0, "value_coef": 0.0}


def decision(
    logprobs: list[float], advantage: float, target: float = 0.0, kept: float = 0.0, temperature: float = 0.5
) -> Group:
    """A group of one decision, whose tokens were sampled with these log-probabilities."""
    count = len(logprobs)
    turn = Turn(
        np.arange(3),
        np.arange(count),
        np.array(logprobs, np.float32),
        np.full(count, kept, np.float32),
        StopReason.EOS,
        "",
    )
    told = {"advantage": advantage, "value_target": target, "score": advantage}
    task = Task("d")
    return Group(task, [Trajectory(task, [turn], terminated=True, temperature=temperature, info=told)])


def credited(algorithm: Distill, groups: list[Group], values: list[list[float]] | None = None) -> list[Row]:
    rows = to_rows(groups, 1.0)
    for row, given in zip(rows, values or [], strict=False):
        row.values = np.array(given, np.float32)
    return algorithm.credit(groups, rows)[0]


def loss_of(
    algorithm: Distill, rows: list[Row], logprobs: list[float], values: list[float] | None = None
) -> tuple[float, list[float], dict[str, float]]:
    new = torch.tensor(logprobs, requires_grad=True)
    forward = Forward(new, torch.full_like(new, 0.5), None if values is None else torch.tensor(values))
    output = algorithm.loss(forward, RowBatch.of(rows), Totals.of(rows))
    output.loss.backward()
    assert new.grad is not None
    return float(output.loss.detach()), new.grad.tolist(), {k: float(v) for k, v in output.metrics.items()}


# --- options ----------------------------------------------------------------------------------------------------


def test_is_the_plugin() -> None:
    assert load("algorithm", "distill") is Distill
    assert Distill.learns_from == "recordings"
    assert Distill(**Distill().model_dump()) == Distill()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss_type": "weighted_sft", "clip_high": 0.3}, "clip_high: 0.3 has no effect; set loss_type: clipped"),
        ({"loss_type": "weighted_sft", "ratio_level": "sequence"}, "ratio_level: sequence has no effect"),
        ({"loss_type": "weighted_sft", "advantage": "return"}, "weighs by scores, which are never negative"),
        ({"advantage": "return", "value_coef": 0}, "needs a critic that learns: give value_coef"),
        ({"value_coef": 0, "value_clip": 0.2, "epochs": 2}, "value_clip: 0.2 has no effect; set a value_coef"),
        ({"value_clip": 0.2}, "value_clip: 0.2 has no effect; set a value_coef, and epochs above 1"),
        ({"gap_correction": "token"}, "Extra inputs are not permitted"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Distill(**options)


def test_needs() -> None:
    algorithm = Distill()
    assert not algorithm.needs.old_logprobs
    assert algorithm.needs.values
    algorithm.begin(1, 10)
    assert algorithm.needs.old_logprobs  # compared with the recorded ones, once
    algorithm.begin(2, 10)
    assert not algorithm.needs.old_logprobs
    assert not Distill(value_coef=0).needs.values


# --- credit -----------------------------------------------------------------------------------------------------


def test_what_was_recorded_is_the_old_policy_untruncated() -> None:
    # Truncation kept e^-0.25 of the mass, so the full distribution gave the tokens -0.25 less.
    [row] = credited(Distill(), [decision([-1.0, -2.0], advantage=1.5, target=-0.5, kept=-0.25)])
    assert row.old_logprobs is not None
    assert row.advantages is not None
    assert row.returns is not None
    assert row.old_logprobs.tolist() == [-1.25, -2.25]
    assert row.sampled_logprobs is None
    assert row.advantages.tolist() == [1.5, 1.5]
    assert row.returns.tolist() == [-0.5, -0.5]
    assert row.temperature == 0.5
    [plain] = credited(Distill(loss_type="weighted_sft"), [decision([-1.0], advantage=1.0)])
    assert plain.temperature == 1.0  # as SFT learns


def test_returns_against_the_critic() -> None:
    # Targets 1, 0, -1 less the values of the states, which are those before the first token: 0.5, 0.5, -1.
    # Differences 0.5, -0.5, 0: mean 0, sample deviation sqrt((0.25 + 0.25) / 2) = 0.5, so whitened 1, -1, 0.
    groups = [decision([-1.0, -1.0], 9.0, 1.0), decision([-1.0], 9.0, 0.0), decision([-1.0], 9.0, -1.0)]
    rows = credited(Distill(advantage="return"), groups, [[0.5, 7.0], [0.5], [-1.0]])
    found = [row.advantages.tolist() for row in rows if row.advantages is not None]
    assert found[0] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert found[1] == pytest.approx([-1.0], abs=1e-6)
    assert found[2] == pytest.approx([0.0], abs=1e-6)


def test_another_models_recording_stops_the_first_step() -> None:
    algorithm = Distill(max_gap=0.01)
    groups = [decision([-1.0, -1.0], 1.0)]
    algorithm.begin(1, 5)
    rows = to_rows(groups, 1.0)
    rows[0].old_logprobs = np.array([-1.0, -2.0], np.float32)
    # k3 of log p - log q = 1: e^-1 - 1 + 1 = 0.3679; the mean of it and 0 is 0.184.
    with pytest.raises(TrainingStopped, match=r"0\.184 nats a token apart \(algorithm\.max_gap is 0\.01\)"):
        algorithm.credit(groups, rows)
    later = Distill(max_gap=0.01)
    later.begin(2, 5)
    later.credit(groups, rows)  # the policy has moved, as it should


def test_the_comparison_is_made_once_and_remembered() -> None:
    algorithm = Distill()
    algorithm.begin(1, 5)
    groups = [decision([-1.0], 1.0)]
    rows = to_rows(groups, 1.0)
    rows[0].old_logprobs = np.array([-1.0], np.float32)
    metrics = algorithm.credit(groups, rows)[1]
    assert metrics["gap_k3"] == 0.0
    assert "gap_k3" not in algorithm.credit(groups, rows)[1]
    other = Distill()
    other.load_state(algorithm.state())
    other.begin(1, 5)
    assert not other.needs.old_logprobs


# --- loss -------------------------------------------------------------------------------------------------------

# Two decisions of 2 and 1 tokens; advantages 2 and 1; every token was sampled at log-probability -1.
GROUPS = [decision([-1.0, -1.0], 2.0, 1.0), decision([-1.0], 1.0, -1.0)]
#: Log-ratios of the policy to the recording: ln 1.5 (clipped at 1.2), ln 0.5 and ln 1.1.
RATIOS = [1.5, 0.5, 1.1]
LOGPROBS = [-1.0 + math.log(r) for r in RATIOS]


def test_clipped_by_tokens() -> None:
    loss, gradient, metrics = loss_of(Distill(**PLAIN), credited(Distill(**PLAIN), GROUPS), LOGPROBS)
    # min(r A, clip(r) A): 1.2 * 2, 0.5 * 2, 1.1 * 1; their mean over three tokens, negated.
    assert loss == pytest.approx(-(2.4 + 1.0 + 1.1) / 3)
    # -A r / 3 where it isn't clipped.
    assert gradient == pytest.approx([0.0, -1.0 / 3, -1.1 / 3])
    assert metrics["ratio"] == pytest.approx(3.1 / 3)
    assert metrics["clip_fraction_high"] == pytest.approx(1 / 3)
    assert metrics["clip_fraction_low"] == 0.0  # the second ratio is low, but the gradient raises it
    assert metrics["policy_loss"] == pytest.approx(loss)
    assert metrics["nll"] == pytest.approx(-sum(LOGPROBS) / 3)
    # k3 of the recording to the policy: r - 1 - ln r.
    assert metrics["approx_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in RATIOS) / 3)


def test_clipped_by_replies() -> None:
    algorithm = Distill(ratio_level="sequence", aggregation="sequence", **PLAIN)
    loss, _, metrics = loss_of(algorithm, credited(algorithm, GROUPS), LOGPROBS)
    # The first reply's ratio is sqrt(1.5 * 0.5) = 0.866; means of the replies' losses: -(0.866 * 2 + 1.1) / 2.
    assert loss == pytest.approx(-(math.sqrt(0.75) * 2 + 1.1) / 2)
    assert metrics["ratio"] == pytest.approx((2 * math.sqrt(0.75) + 1.1) / 3)


def test_weighted_likelihood() -> None:
    algorithm = Distill(loss_type="weighted_sft", **PLAIN)
    loss, gradient, metrics = loss_of(algorithm, credited(algorithm, GROUPS), [-1.0, -2.0, -3.0])
    assert loss == pytest.approx((2 * 1.0 + 2 * 2.0 + 1 * 3.0) / 3)
    assert gradient == pytest.approx([-2 / 3, -2 / 3, -1 / 3])
    assert metrics["nll"] == pytest.approx(2.0)
    assert "ratio" not in metrics


def test_value_and_entropy() -> None:
    algorithm = Distill(value_coef=0.5, entropy_coef=0.1)
    rows = credited(algorithm, GROUPS, [[0.0, 0.0], [0.0]])
    loss, _, metrics = loss_of(algorithm, rows, [-1.0, -1.0, -1.0], [0.5, 1.0, 0.0])
    # Policy: -(2 + 2 + 1) / 3. Value: ((0.5 - 1)^2 + 0 + (0 + 1)^2) / 2 / 3 = 1.25 / 6. Entropy 0.5.
    assert metrics["value_loss"] == pytest.approx(1.25 / 6)
    assert loss == pytest.approx(-5 / 3 + 0.5 * 1.25 / 6 - 0.1 * 0.5)
    assert metrics["entropy"] == pytest.approx(0.5)
    # Targets 1, 1, -1 with old values of 0: nothing is explained.
    assert algorithm.derived(metrics)["explained_variance"] == pytest.approx(0.0)


def test_without_credit_there_is_no_loss() -> None:
    row = Row(np.arange(3), np.array([False, True, True]), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="call credit first"):
        loss_of(Distill(), [row], [-1.0, -1.0])


def test_packing_leaves_the_loss() -> None:
    algorithm = Distill(value_coef=0.5, entropy_coef=0.1)
    rows = credited(algorithm, GROUPS, [[0.0, 0.0], [0.0]])
    whole = loss_of(algorithm, rows, LOGPROBS, [0.5, 1.0, 0.0])[0]
    totals, parts = Totals.of(rows), 0.0
    for row, logprobs, values in ((rows[0], LOGPROBS[:2], [0.5, 1.0]), (rows[1], LOGPROBS[2:], [0.0])):
        new = torch.tensor(logprobs)
        forward = Forward(new, torch.full_like(new, 0.5), torch.tensor(values))
        parts += float(algorithm.loss(forward, RowBatch.of([row]), totals).loss)
    assert parts == pytest.approx(whole, abs=1e-6)


# --- runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "plot", lambda self: None)
    monkeypatch.setattr(Run, "plot_soon", lambda self: None)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(base: Path, file: Path, folder: Path, steps: int = 20, **changes: Any) -> TrainResult:
    plain: dict[str, Any] = {
        "run": {"dir": str(folder), "steps": steps, "seed": 1},
        "model": {"name": str(base), "lora": {"rank": 8}},
        "data": {"path": str(file), "eval_fraction": 0.0},
        "algorithm": {"name": "distill", **changes.pop("algorithm", {})},
        "optim": {"learning_rate": 2e-2, "batch_size": 4, "gradient_accumulation": 4},
        "critic": {"kind": "head", "detach": True},
        "samples": {"every": 0},
        "trackers": [],
    }
    for section, values in changes.items():
        if values is None:
            del plain[section]
            continue
        plain[section] = {**(plain.get(section) or {}), **values} if isinstance(values, dict) else values
    return train(parse_recipe(plain))


def logged(folder: Path) -> list[dict[str, Any]]:
    """The rows of the steps, without that of the untrained model."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"]]


def sampled(model: Path, adapter: Path) -> float:
    """The mean share of low tokens in 64 replies to states that were never recorded."""
    policy = opened(model, adapter)
    chat = build_chat(policy, ModelSection(name=str(model)))
    sampling = Sampling(max_new_tokens=5, ignore_eos=True)
    asked = [chat.start((Message("system", "say something"), Message("user", f"state {i}"))) for i in range(900, 964)]
    requests = [Request(i, ids, sampling, 7_000 + i, str(i)) for i, ids in enumerate(asked)]
    done = make_engine("local", policy, {}).generate(requests)
    return float(np.mean([low_share(completion.token_ids) for completion in done]))


@pytest.mark.parametrize("algorithm", [{"clip_high": 3.0}, {"loss_type": "weighted_sft"}], ids=["clipped", "weighted"])
def test_it_learns_and_its_twin_on_shuffled_rewards_does_not(model_dir, tmp_path, algorithm) -> None:
    policy = opened(model_dir)
    shares = {}
    for name, shuffled in (("true", False), ("shuffled", True)):
        data = record(tmp_path / f"{name}.json", policy, model_dir, states=48, keep=0.3, shuffled=shuffled)
        result = run(
            model_dir,
            data,
            tmp_path / name,
            algorithm={"entropy_coef": 0.0, "value_coef": 0.0, **algorithm},
            model={"lora": None},
            optim={"learning_rate": 1e-2},
            critic=None,
            eval={"at_start": False},
        )
        shares[name] = sampled(model_dir, result.policy_dir)
    # Kept by their rewards, replies have 0.8 low tokens and more; kept at random, as many as all of them, one half.
    # 320 tokens of a fair coin: a standard error of 0.03.
    assert shares["true"] > 0.7
    assert abs(shares["shuffled"] - 0.5) < 0.12


def test_ratios_start_at_one_for_any_sampling(model_dir, tmp_path) -> None:
    """Recorded at several temperatures and truncated to 20 tokens: the policy's own probabilities are the same."""
    data = record(tmp_path / "data.json", opened(model_dir), model_dir, temperatures=(0.3, 0.7, 1.3), top_k=20)
    run(model_dir, data, tmp_path / "run", steps=2, critic={"kind": "adapter", "detach": False})
    first, second = logged(tmp_path / "run")
    assert first["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert first["gap_k3"] < 1e-6
    assert first["clip_fraction_high"] == 0.0
    assert second["approx_kl"] > 1e-4  # of the recording, not of the step before
    assert "gap_k3" not in second


def test_the_clip_bounds_the_whole_run(model_dir, tmp_path) -> None:
    """The old policy is the recording, so tokens stop rising beyond 1 + clip_high however many epochs there are."""
    data = record(tmp_path / "data.json", opened(model_dir), model_dir, states=8)
    plain = {"entropy_coef": 0.0, "value_coef": 0.0}
    run(model_dir, data, tmp_path / "run", steps=12, algorithm={"clip_high": 0.2, **plain}, critic=None)
    last = logged(tmp_path / "run")[-1]
    assert last["clip_fraction_high"] > 0.3
    free = run(model_dir, data, tmp_path / "free", steps=12, algorithm={"clip_high": 50.0, **plain}, critic=None)
    assert logged(free.run_dir)[-1]["ratio"] > 2 * last["ratio"]


def test_an_adapter_learns_from_its_own_recording_only(model_dir, tmp_path) -> None:
    base = record(tmp_path / "base.json", opened(model_dir), model_dir)
    first = run(model_dir, base, tmp_path / "first", steps=3)
    own = record(tmp_path / "own.json", opened(model_dir, first.policy_dir), model_dir, seed=1)
    run(model_dir, own, tmp_path / "second", steps=1, model={"init_from": str(first.policy_dir)})
    assert logged(tmp_path / "second")[0]["ratio"] == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(ModelError, match=r"own\.json: recorded of another model .*adapter"):
        run(model_dir, own, tmp_path / "third", steps=1)
    with pytest.raises(DataError, match="were recorded of different models"):
        run(model_dir, base, tmp_path / "fourth", steps=1, data=[str(base), str(own)])


def test_held_out_decisions_and_the_critic_are_measured(model_dir, tmp_path) -> None:
    data = record(tmp_path / "data.json", opened(model_dir), model_dir)
    result = run(
        model_dir, data, tmp_path / "run", steps=3, data={"eval_fraction": 0.3}, algorithm={"advantage": "return"}
    )
    assert result.figures is not None
    before, after = result.figures.results.values()
    assert before["nll"] > 0
    assert after["value_loss"] > 0
    assert {"advantages", "advantages_std", "values", "returns", "explained_variance"} <= set(
        logged(result.run_dir)[-1]
    )


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"data": {"system": "be good"}}, ConfigError, r"data\.system has no effect on recorded decisions"),
        ({"data": {"long_reply": "cut_end", "max_length": 64}}, ConfigError, r"data\.long_reply: cut_end would cut"),
        ({"data": {"output": "reply"}}, ConfigError, r"data\.sources\[0\]\.output has no effect on recorded decisions"),
        ({"data": {"path": "nowhere.json"}}, DataError, r"nowhere\.json: there is no such file of recorded decisions"),
        ({"data": {"max_length": 10}}, DataError, r"none of the first .* records fits data\.max_length"),
    ],
)
def test_options_that_mean_nothing_are_refused(model_dir, tmp_path, changes, kind, sentence) -> None:
    data = record(tmp_path / "data.json", opened(model_dir), model_dir, states=4)
    with pytest.raises(kind, match=sentence):
        run(model_dir, data, tmp_path / "run", steps=1, **changes)


def test_a_run_is_planned_and_measured_without_its_weights_or_its_critic(model_dir, tmp_path) -> None:
    """A plan has no weights to tell the model by, and a comparison of policies no critic."""
    from sapwood.compare import run_eval
    from sapwood.plan import plan

    data = record(tmp_path / "data.json", opened(model_dir), model_dir, states=8)
    result = run(model_dir, data, tmp_path / "run", steps=1, data={"eval_fraction": 0.4})
    assert plan(load_recipe(result.run_dir)).fits == "yes"
    found = run_eval(load_recipe(result.run_dir), result.policy_dir)
    assert found.records is not None
    assert {"nll", "ratio"} <= found.records.results["trained"].keys()
    assert "value_loss" not in found.records.results["trained"]


def test_the_page_lists_every_option_and_its_example_parses() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, field in Distill.model_fields.items():
        assert f"`{name}`" in text, name
        assert field.description
    example = text.partition("```yaml\n")[2].partition("```")[0]
    Distill.model_validate({k: v for k, v in yaml.safe_load(example)["algorithm"].items() if k != "name"})


def test_a_replayed_update_is_credited_already() -> None:
    rows = credited(Distill(), GROUPS)
    again, metrics = Distill().credit([Group(Task("d"), [])] * 2, rows)
    assert again == rows
    assert metrics == {}
    assert replace(rows[0]).advantages is rows[0].advantages
