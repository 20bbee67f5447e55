"""The catalogue of metrics: what every algorithm logs is in it, and what is in it is logged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sapwood import plugins
from sapwood.config import parse_recipe
from sapwood.metricnames import GROUPS, OWN, described, entries, sections, titled
from sapwood.progress import COMPACT, DISPLAYED, HELD_OUT
from sapwood.run import Run
from sapwood.train import train
from tests.learning import save_tiny_model
from tests.recorded import opened, record

#: Names that the runs below needn't show, and why.
ELSEWHERE = {
    "step": "the row itself",
    "loss_scale": "float16 only",
    "skipped_updates": "a step whose gradient isn't finite",
    "reward_scale": "ppo's whiten_rewards: running, in tests/algorithms/test_ppo.py",
    "eval/win_rate": "needs another model's replies, in tests/metrics/test_metrics.py",
    **{f"eval/win_rate/{part}": "see eval/win_rate" for part in ("lo", "hi", "ties", "tasks")},
    "eval/NAME/PART": "a metric of a user's that returns a dict",
    **dict.fromkeys(("cut_share", "distinct_2", "distinct_replies"), "of guards.reply_metrics"),
    **dict.fromkeys(("parse_failed_share", "fallback_share"), "of guards.reply_metrics"),
}
OPTIONS = {
    "ppo": {"epochs": 2, "kl_coef": 0.1, "entropy_coef": 0.01, "js_coef": 0.1, "group_size": 2},
    "grpo": {"epochs": 2, "kl_coef": 0.1, "clip_dual": 3.0, "gap_correction": "token", "group_size": 4},
    "rloo": {"group_size": 2},
    "reinforce_pp": {"group_size": 2},
    "distill": {"epochs": 2, "value_clip": 0.2},
}
METRICS = [
    {"name": "pass_at_k", "k": [1, 2], "n": 2},
    "response_length",
    {"name": "response_length", "unit": "words"},
    "distinct",
    {"name": "distinct", "over": "task", "n": 2},
    "reward_parts",
    "tests.test_metricnames:spoken",
]


def spoken(replies: list[str]) -> float:
    """A metric of a user's."""
    return float(len(replies))


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Algorithm -> every name in its metrics.jsonl and timing.jsonl, after a step of every one."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_tiny_model(folder / "model")
    data = {
        "sft": [{"prompt": f"say {i}", "response": "the lamp"} for i in range(8)],
        "kto": [{"prompt": f"say {i}", "response": "the lamp", "label": i % 2 == 0} for i in range(8)],
    }
    data["dpo"] = data["reward"] = [
        {"prompt": f"say {i}", "chosen": "the lamp", "rejected": "a room"} for i in range(8)
    ]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "plot", lambda self: None)
        for name in plugins.known("algorithm"):
            recipe = {
                "run": {"dir": str(folder / name), "steps": 1},
                "model": {"name": str(model), "lora": {"rank": 2}},
                "algorithm": {"name": name, **OPTIONS.get(name, {})},
                "optim": {"batch_size": 4},
                "eval": {"at_start": False},
                "samples": {"every": 0},
                "trackers": [],
            }
            if name == "distill":
                file = record(folder / "decisions.json", opened(model), model, states=6)
                recipe["data"] = {"path": str(file), "eval_fraction": 0.4}
            elif name in data:
                file = folder / f"{name}.jsonl"
                file.write_text("".join(json.dumps(record) + "\n" for record in data[name]))
                recipe["data"] = {"path": str(file), "eval_fraction": 0.4}
            else:
                recipe["engine"] = {"max_new_tokens": 5}
                recipe["env"] = {"name": "tests.worlds:Guess", "limit": 1} if name == "rloo" else {
                    "name": "prompts", "items": [{"prompt": "go", "answer": "1"}, {"prompt": "say", "answer": "2"}],
                }  # fmt: skip
                recipe["rewards"] = ["tests.learning:LowTokens", "length"]
                recipe["eval"] |= {"tasks": 1, "temperature": 1.0, "metrics": METRICS if name == "grpo" else []}
            train(parse_recipe(recipe))
            rows = [
                json.loads(line)
                for file in ("metrics.jsonl", "timing.jsonl")
                for line in (folder / name / file).read_text().splitlines()
            ]
            found[name] = {key for row in rows for key in row} - {"step"}
    return found


def test_everything_that_is_logged_is_described_and_by_whom(logged: dict[str, set[str]]) -> None:
    for algorithm, names in logged.items():
        for name in names:
            info = described(name, own=name == "eval/spoken")
            assert info is not None, f"{algorithm} logs {name}: add it to sapwood/metricnames.py"
            assert algorithm in info.algorithms, f"{algorithm} logs {name}, and its entry doesn't say so"


def test_everything_that_is_described_is_logged(logged: dict[str, set[str]]) -> None:
    seen = {described(name) for names in logged.values() for name in names}
    missing = {info.name for info in entries() if info not in seen} - set(ELSEWHERE)
    assert missing == set()


def test_what_is_said_to_be_logged_by_an_algorithm_is(logged: dict[str, set[str]]) -> None:
    # Of some options and worlds a run shows only one side; these are what every run of the kind has.
    for name in ("loss", "learning_rate", "grad_norm", "updates", "reply_tokens", "sampling_seconds", "entropy"):
        info = described(name)
        assert info is not None
        assert {algorithm for algorithm, names in logged.items() if name in names} == set(info.algorithms)
    assert logged.keys() == set(GROUPS["all"])


def test_every_entry_is_whole() -> None:
    names = [info.name for info in entries()]
    assert len(set(names)) == len(names)
    assert set(OWN) < set(names)
    known = {*GROUPS, *plugins.known("algorithm")}
    for info in entries():
        assert set(info.by) <= known, info.name
        assert info.meaning.endswith("."), info.name
        assert info.limits == "any" or ".." in info.limits, info.name
        assert info.healthy == "" or info.healthy.endswith("."), info.name
        assert info.unit, info.name
    assert next(iter(sections())) == "Every step"


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("reward/env", "reward/PART"),
        ("eval/loss", "loss"),
        ("eval/reward/env", "eval/reward/PART"),
        ("eval/reward/std", "eval/reward/std"),
        ("eval/reward/env/std", "eval/reward/PART/std"),
        ("eval/pass@16", "eval/pass@K"),
        ("eval/response_length", "eval/response_length"),
        ("eval/response_length_words/max", "eval/response_length_UNIT/max"),
        ("eval/distinct_2/task", "eval/distinct_N/task"),
        ("timing/tokens_per_second", "tokens_per_second"),
        ("eval/refusals/late", "eval/NAME/PART"),
        ("refusals", None),
        ("reward/a/b", None),
    ],
)
def test_names_find_their_entries(name: str, entry: str | None) -> None:
    found = described(name)
    assert (found.name if found else None) == entry
    assert (described("eval/refusals", own=False), described("losses")) == (None, None)


def test_titles_have_units() -> None:
    assert [titled(name) for name in ("kl_penalty", "eval/nll", "eval/pass@8", "kl", "unknown")] == [
        "kl_penalty, reward", "Held-out nll, nats a token", "Held-out pass@8", "kl, nats a token", "unknown",
    ]  # fmt: skip


def test_what_is_shown_is_described() -> None:
    for metric in (*(short.metric for short in COMPACT), *(entry[0] for entry in (*DISPLAYED, *HELD_OUT))):
        assert described(metric, own=False) is not None, metric


def test_the_page_is_up_to_date() -> None:
    import importlib.util

    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("metrics_docs", root / "scripts" / "metrics_docs.py")
    assert spec is not None
    assert spec.loader is not None
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    page = (root / "docs" / "metrics.md").read_text()
    assert docs.BEGIN + docs.tables() + docs.END in page, "run `make docs`"
    assert all(row.count(" | ") == 5 for row in re.findall(r"^\| `.*", docs.tables(), re.M)[len(COMPACT) :])
