import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from sapwood import evaluate, opening
from sapwood.chat import Chat
from sapwood.engines import Request, Sampling
from sapwood.engines.scripted import ScriptedEngine
from sapwood.envs.prompts import Prompts
from sapwood.errors import BudgetError, ConfigError, DataError, StorageError
from sapwood.evaluate import (
    EvalResult,
    EvalTable,
    MetricTable,
    evaluate_baselines,
    evaluate_policy,
    heading,
    mean_interval,
    paired_difference,
    run_rollout,
    summarise,
)
from sapwood.sections import ModelSection
from sapwood.types import Group, StopReason, Task, Trajectory, Turn
from tests.chats import CHATML, LLAMA, tokenizer
from tests.conftest import tiny_model
from tests.worlds import Guess

TOK = tokenizer()


def test_the_interval_is_students():
    # 1 2 3 4 5: mean 3, s^2 = (4+1+0+1+4)/4 = 2.5, s/sqrt(5) = sqrt(0.5) = 0.7071068; the t table gives
    # t(0.975, 4) = 2.776445, so the half width is 1.963243
    interval = mean_interval([1, 2, 3, 4, 5])
    assert (interval.mean, interval.n) == (3.0, 5)
    assert interval.lo == pytest.approx(3 - 1.963243, abs=1e-6)
    assert interval.hi == pytest.approx(3 + 1.963243, abs=1e-6)
    one = mean_interval([7.0])
    assert one.mean == 7.0
    assert math.isnan(one.lo)
    assert math.isnan(mean_interval([]).mean)


def test_a_difference_is_taken_task_by_task():
    base = EvalResult("base", {"a": 0.0, "b": 100.0, "c": 50.0, "only base": 9.0})
    ours = EvalResult("ours", {"c": 53.0, "b": 102.0, "a": 1.0, "only ours": 7.0})
    # differences 3, 2, 1: mean 2, s = 1, t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138
    difference = paired_difference(ours, base)
    assert (difference.mean, difference.n) == (2.0, 3)
    assert difference.lo == pytest.approx(2 - 2.484138, abs=1e-6)
    with pytest.raises(ConfigError, match="'ours' and 'x' share no task"):
        paired_difference(ours, EvalResult("x", {"z": 1.0}))


def turn(reward, tokens, **info):
    n = np.zeros(tokens, np.float32)
    return Turn(np.zeros(1, np.int64), np.zeros(tokens, np.int64), n, n, StopReason.EOS, "", reward=reward, info=info)


def test_a_summary_counts_physical_returns_and_replies():
    a, b = Task("a"), Task("b")
    groups = [
        # paid -1.5 by a reward that adds a penalty, physically -1; then 2
        Group(a, [Trajectory(a, [turn(-1.5, 4, parsed="failed", fallback=True, physical_reward=-1.0), turn(2.0, 2)])]),
        Group(b, [Trajectory(b, [turn(0.5, 3, parsed="json", fallback=False)]), Trajectory(b, error="EnvError: x")]),
    ]
    result = summarise("x", groups)
    assert result.returns == {"a": 1.0, "b": 0.5}
    assert (result.failed, result.turns, result.parsed, result.fallback, result.reply_tokens) == (1, 3, 0.5, 0.5, 3.0)
    nothing = summarise("x", [Group(a, [Trajectory(a, error="EnvError: x")])])
    assert (nothing.returns, nothing.parsed, nothing.reply_tokens) == ({}, None, None)
    assert json.loads(json.dumps(nothing.to_json(), allow_nan=False))["mean"] is None


def test_policy_and_baselines_play_the_same_tasks():
    family = Guess(limit=3)
    tasks = family.tasks("eval", 9, 0)  # the answers are 1 .. 9
    engine = ScriptedEngine(TOK, ["1", "hm", "3"])
    seen = []
    result = evaluate_policy(
        family, tasks, engine, Chat(TOK), Sampling(), 0, name="model", progress=lambda *p: seen.append(p)
    )
    # 1 is right at once (10), 3 after two misses (8), the other seven miss three times (-3)
    assert list(result.returns.values()) == [10, -3, 8, -3, -3, -3, -3, -3, -3]
    # one turn, and eight times three of which the second says no number
    assert (result.turns, result.parsed, result.fallback) == (25, pytest.approx(17 / 25), pytest.approx(8 / 25))
    assert seen[-1] == ("model", 9, 9)
    baselines = evaluate_baselines(family, tasks)
    assert list(baselines) == ["one by one", "first only"]
    assert list(baselines["one by one"].returns.values()) == [10, 9, 8, 7, 6, 5, 4, 3, 2]
    assert baselines["one by one"].returns.keys() == result.returns.keys()
    assert baselines["one by one"].parsed is None


def text_of(table):
    console = Console(file=io.StringIO(), width=150)
    console.print(table.render())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_heading_stands_above_the_table_as_wide_as_the_terminal():
    heading = "sums [2 digits] from a file with a name: 4 held-out tasks, greedy, 16 tokens"  # 76 columns
    lines = text_of(EvalTable(heading, (EvalResult("base", {"a": 1.0}),))).splitlines()
    assert lines[0].rstrip() == heading
    compared = MetricTable(
        heading, {"a": {"loss": 1.0}, "b": {"loss": 2.0}}, {n: {"1": {"loss": 1.0}} for n in "ab"}, "a"
    )
    lines = [line.rstrip() for line in text_of(compared).splitlines()]
    assert lines[0] == heading
    assert "b - a, record by record (1)" in lines


def test_the_table_says_what_was_measured():
    results = (
        EvalResult("zero", {"a": -2.0}, failed=1),
        EvalResult("base", {"a": 1.0, "b": 2.0}, parsed=0.5, reply_tokens=7.25),
        EvalResult("trained", {"a": 2.0, "b": 4.0}, parsed=1.0, reply_tokens=6.0),
    )
    table = EvalTable("OfficeSmall, 12 hours", results, ("trained", "base"))
    text = text_of(table)
    # base: mean 1.5, s = 0.7071, t(0.975, 1) = 12.7062, half width 12.7062 * 0.7071 / sqrt(2) = 6.3531
    for part in ("OfficeSmall, 12 hours", "1.500", "-4.853 .. 7.853", "50.0%", "7.2", "1 (1 failed)"):
        assert part in text
    assert "trained - base, task by task: +1.500 (-4.853 .. 7.853) over 2 tasks" in text
    data = json.loads(json.dumps(table.to_json(), allow_nan=False))
    assert [row["mean"] for row in data["results"]] == [-2.0, 1.5, 3.0]
    assert data["results"][0]["lo"] is None
    assert (data["difference"]["of"], data["difference"]["mean"]) == (["trained", "base"], 1.5)
    assert EvalTable("x", results).to_json()["difference"] is None
    assert "task by task" not in text_of(EvalTable("x", results))


def test_the_heading_names_the_options():
    tasks = Guess().tasks("eval", 4, 0)
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    assert heading(Guess(limit=3), tasks, greedy) == (
        "Guess (limit 3): 4 held-out tasks, greedy, at most 8 tokens a reply"
    )
    prompts = Prompts(items=({"prompt": "a"},))
    assert heading(prompts, tasks, Sampling()).startswith("1 prompts: 4 held-out tasks, temperature 1")


class Recipe(SimpleNamespace):
    """The parts of a recipe that evaluation reads."""

    env, data, plays = {"name": "guess"}, None, True

    def build_env(self):
        return self.family

    def build_rewards(self):
        return []

    def sampling(self):
        return Sampling(max_new_tokens=8)

    def engine_options(self):
        return {"reply": ("1", "3")}


@pytest.fixture
def recipe(monkeypatch):
    from sapwood.models import load

    asked = []

    def load_policy(section, *_, **__):
        asked.append(section)
        return SimpleNamespace(tokenizer=TOK, max_context=4096)

    monkeypatch.setattr(load, "load_policy", load_policy)
    return Recipe(
        family=Guess(limit=2),
        engine={"name": "scripted"},
        algorithm={"name": "grpo", "group_size": 2},
        model=ModelSection(),
        eval=SimpleNamespace(tasks=9, temperature=0.0, baselines=True),
        run=SimpleNamespace(seed=0),
        asked=asked,
    )


def test_run_rollout_writes_every_episode(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    out, seen = tmp_path / "deep" / "r.jsonl", []
    result = run_rollout(recipe, "train", 9, out, lambda *p: seen.append(p))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["group"], line["member"]) for line in lines] == [(g, m) for g in range(9) for m in range(2)]
    assert [line["task"] for line in lines[::2]] == list(result.returns)
    assert seen[-1] == ("train", 18, 18)
    assert list(tmp_path.rglob("*.part")) == []
    with pytest.raises(ConfigError, match="no task"):
        run_rollout(recipe, "train", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't be written"):
        run_rollout(recipe, "train", 1, tmp_path / "file" / "r.jsonl")


def test_seeds_do_not_depend_on_how_tasks_are_chunked(recipe, monkeypatch):
    seeds: dict[int, list[int]] = {2: [], 64: []}
    for chunk, seen in seeds.items():
        engine = ScriptedEngine(TOK, lambda prompt, request, seen=seen: str(seen.append(request.seed)))
        monkeypatch.setattr(evaluate, "CHUNK", chunk)
        monkeypatch.setattr(evaluate, "build_engine", lambda *_, engine=engine: engine)
        run_rollout(recipe, "train", 5)
    # 5 tasks, 2 members, 2 turns
    assert sorted(seeds[2]) == sorted(seeds[64])
    assert len(set(seeds[2])) == 20


def test_a_failed_rollout_leaves_the_old_file(recipe, tmp_path, monkeypatch):
    out = tmp_path / "r.jsonl"
    out.write_text("before")
    monkeypatch.setattr(evaluate, "build_engine", lambda *_: ScriptedEngine(TOK, ["1"], max_context=1))
    with pytest.raises(BudgetError, match="exceeds 1"):
        run_rollout(recipe, "train", 1, out)
    assert out.read_text() == "before"


def test_every_kind_of_engine_can_be_made(monkeypatch):
    class Bare(ScriptedEngine):
        """An engine without options."""

        def __init__(self, policy, tokenizer):
            super().__init__(tokenizer, [policy.motto])

    monkeypatch.setattr(opening.plugins, "load", lambda kind, name: Bare)
    policy = SimpleNamespace(tokenizer=TOK, motto="on", max_context=64)
    engine = opening.build_engine(Recipe(engine={"name": "x:Bare"}), policy)  # type: ignore[arg-type]
    assert isinstance(engine, Bare)


def test_the_local_engine_takes_a_recipes_options():
    model = tiny_model("llama")
    policy = SimpleNamespace(model=model, tokenizer=TOK, max_context=64)
    recipe = SimpleNamespace(engine={"name": "local"}, engine_options=lambda: {"max_batch": 2})
    engine = opening.build_engine(recipe, policy)  # type: ignore[arg-type]
    assert engine.options.max_batch == 2  # type: ignore[attr-defined]
    # 61 tokens are fewer than the tokenizer has, so the prompt is made of ids
    request = Request(0, np.arange(8), Sampling(max_new_tokens=3, ignore_eos=True), 0, "e")
    assert engine.generate([request])[0].token_ids.size == 3


def test_a_template_file_takes_the_place_of_the_tokenizers(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text(LLAMA)
    policy = SimpleNamespace(tokenizer=tokenizer(CHATML, "<|eot_id|>"))
    built = opening.build_chat(policy, ModelSection(chat_template=file))  # type: ignore[arg-type]
    assert list(built.end_token_ids) == [TOK.convert_tokens_to_ids("<|eot_id|>")]
    with pytest.raises(DataError, match=r"model.chat_template: .*none.jinja can't be read"):
        opening.build_chat(policy, ModelSection(chat_template=tmp_path / "none.jinja"))  # type: ignore[arg-type]


def test_a_world_that_pays_is_not_judged_by_the_rewards():
    # Whatever the reward model says, the wrong reply earned 0 in the world; a world that only asks has rewards alone.
    task = Task("a")
    wrong = Trajectory(task, [], reward=-2.0, reward_parts={"reward_model": -2.0})
    assert summarise("x", [Group(task, [wrong])]).returns == {"a": 0.0}
    assert summarise("x", [Group(task, [wrong])], by_reward=True).returns == {"a": -2.0}
    assert not Prompts.pays


def test_many_models_stand_below_each_other() -> None:
    def shown(count: int) -> list[str]:
        results = tuple(EvalResult(f"m{i}", {"a": 1.0}, metrics={"energy": float(i)}) for i in range(count))
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(EvalTable("here", results).render())
        return [" ".join(line.split()) for line in console.export_text().splitlines()]

    assert "metric m0 m1" in shown(2)
    assert "energy 0.000 1.000" in shown(2)
    assert "policy energy" in shown(6)
    assert "m5 5.000" in shown(6)
