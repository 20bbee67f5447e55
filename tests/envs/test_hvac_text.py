"""The text world: replies to powers, tasks that never overlap, prompts, rewards and penalties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.limits import finishes

from sapwood.envs.check import check_env
from sapwood.envs.hvac import Hvac, parse_reply
from sapwood.envs.hvac.prompt import answer, reach
from sapwood.errors import ConfigError, DataError
from sapwood.plugins import load
from sapwood.types import Task

SMALL = Hvac(time_res=900, max_power=2000, start="random", horizon=4)


@pytest.mark.parametrize(
    ("reply", "how", "power"),
    [
        ('{"power": 0.25}', "json", 0.25),
        ('{"power": -1}', "json", -1.0),
        ('{"power": [0.5]}', "json", 0.5),
        ('Sure! ```json\n{"power": -0.07}\n``` bye', "json", -0.07),
        ('{"mode": "heat"} {"power": 0.3}', "json", 0.3),
        ('{"power": 0.1} {"power": 0.9}', "json", 0.1),
        ('{"power": -0.0}', "json", 0.0),
        ("[0.4]", "list", 0.4),
        ("I choose [ -1.0 ].", "list", -1.0),
        ("{'power': 0.3}", "regex", 0.3),
        ('{"power": 0.3', "regex", 0.3),
        ('{"power": +.5}', "regex", 0.5),
        ("**Power**: -0.2", "regex", -0.2),
        ("power = 0.3.", "regex", 0.3),
        ("power: [0.3]", "list", 0.3),
        ("power: (0.3)", "regex", 0.3),
        (" 0.6\n", "regex", 0.6),
        ("-1e-1", "regex", -0.1),
    ],
)
def test_replies_that_are_read(reply, how, power):
    parsed = parse_reply(reply, 1)
    assert (parsed.how, parsed.powers, parsed.fallback) == (how, (power,), False)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "heat a little",
        "I would set it to 0.5",
        '{"power": 1.01}',
        '{"power": 7} or {"power": 0.7}',
        '{"power": NaN}',
        '{"power": Infinity}',
        '{"power": 1e999}',
        '{"power": true}',
        '{"power": "0.5"}',
        '{"power": null}',
        '{"power": [0.1, 0.2]}',
        '{"power": []}',
        '{"power": [[0.1]]}',
        "[NaN]",
        "[1, 2, 3]",
        "power: inf",
        "power: 0.3.5",
        "power: 0.5abc",
        "power: 3",
        "12",
        "__import__('os').getcwd()",
        "٠.٥",
    ],
)
def test_replies_that_fail_fall_back_to_zero(reply):
    parsed = parse_reply(reply, 1)
    assert (parsed.how, parsed.powers, parsed.fallback) == ("failed", (0.0,), True)


def test_replies_for_several_zones():
    assert parse_reply('{"power": [0.1, -0.2, 0]}', 3).powers == (0.1, -0.2, 0.0)
    assert parse_reply("[0.1, -0.2, 1]", 3).how == "list"
    assert parse_reply("power: [0.1 -0.2 +1]", 3) == parse_reply("power (0.1; -0.2; 1.0)", 3)
    assert parse_reply("power: (0.1, -0.2, 1)", 3).how == "regex"
    for wrong in ('{"power": 0.1}', '{"power": [0.1, 0.2]}', "[0.1, 0.2, 0.3, 0.4]", "[0.1, 0.2, 1.5]"):
        assert parse_reply(wrong, 3).powers == (0.0, 0.0, 0.0)


def test_reasoning_replies_count_their_last_answer():
    reply = 'First {"power": 0.9} comes to mind, but it is warm, so {"power": -0.2}'
    assert parse_reply(reply, 1, last=True).powers == (-0.2,)
    assert parse_reply(reply, 1).powers == (0.9,)
    assert parse_reply("power: 0.9, no, power: 0.1", 1, last=True).powers == (0.1,)


def test_hostile_replies_of_100k_characters_return():
    # Backtracking would take minutes a reply and more.
    finishes("""
from sapwood.envs.hvac.parsing import parse_reply

units = ("{", "[", "}", '{"power":', '{"power": [', "power: ", "power ((", "0.1 ", "9", "-", '{"power": NaN}', "[[]")
for unit in units:
    print(unit, flush=True)
    reply = (unit * 100_000)[:100_000]
    for last in (False, True):
        parse_reply(reply, 1, last=last)
        parse_reply(reply, 5, last=last)
""")


@given(st.text(max_size=300), st.integers(1, 4), st.booleans())
def test_any_text_gives_powers_in_range(reply, count, last):
    parsed = parse_reply(reply, count, last=last)
    assert len(parsed.powers) == count
    assert all(-1.0 <= p <= 1.0 for p in parsed.powers)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=5))
def test_an_answer_reads_back_to_two_decimals(powers):
    parsed = parse_reply(answer(powers), len(powers))
    assert parsed.how == "json"
    assert parsed.powers == pytest.approx(powers, abs=0.00501)


@pytest.mark.parametrize(
    "options",
    [
        {"few_shot": 0},
        {"memory": "chat", "horizon": 3},
        {"control": "per_zone", "start": "random", "horizon": 2, "occupancy": "office_hours"},
        {"building": "Warehouse", "climate": "Cool_Dry", "time_res": 900, "reasoning": True, "horizon": 2},
    ],
)
def test_keeps_the_contract_of_a_world(options):
    check_env(Hvac(**options))


def test_is_the_plugin():
    assert load("env", "hvac") is Hvac


def days_touched(family: Hvac, task: Task) -> set[int]:
    start = task.metadata["day"] * 24.0 + task.metadata["hour"]
    end = start + family.horizon * family.time_res / 3600.0
    return set(range(int(start // 24), int(np.ceil(end / 24))))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"horizon": 8, "time_res": 900, "start": "random"},
        {"horizon": 24, "start": "random"},
        {"horizon": 60, "start": "day"},
        {"horizon": 240, "start": "random"},
    ],
)
def test_train_and_eval_never_share_a_day(options):
    family = Hvac(**options)
    touched = {
        split: set().union(*(days_touched(family, t) for s in range(3) for t in family.tasks(split, 120, s)))
        for split in ("train", "eval")
    }
    assert touched["train"]
    assert touched["eval"]
    assert not touched["train"] & touched["eval"]
    assert max(touched["train"] | touched["eval"]) < 365


def test_single_days_are_held_out_across_the_seasons():
    family = Hvac()
    assert family.days("eval") == tuple(range(3, 365, 7))
    assert len(family.days("train")) == 365 - 52
    four = [task.metadata["day"] for task in family.tasks("eval", 4, 0)]
    assert [day // 91 for day in four] == [0, 1, 2, 3]  # one a season


def test_tasks_are_a_function_of_the_arguments():
    assert SMALL.tasks("train", 20, 5) == SMALL.tasks("train", 20, 5)
    assert SMALL.tasks("train", 20, 5)[:7] == SMALL.tasks("train", 7, 5)
    assert SMALL.tasks("train", 20, 5) != SMALL.tasks("train", 20, 6)
    tasks = SMALL.tasks("train", 400, 0)  # more than there are days: days repeat, tasks don't
    assert len({task.id for task in tasks}) == 400
    assert len({str(task.metadata) for task in tasks}) == 400


def test_zero_tasks_and_bad_options_are_sentences(tmp_path):
    with pytest.raises(ConfigError, match="0 eval tasks asked for; give at least 1"):
        SMALL.tasks("eval", 0, 0)
    with pytest.raises(ConfigError, match="split 'test'"):
        SMALL.tasks("test", 1, 0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Did you mean 'Warehouse'"):
        Hvac(building="Wherehouse")
    with pytest.raises(ConfigError, match="Did you mean 'Warm_Dry'"):
        Hvac(climate="Warm_Dri")
    with pytest.raises(ConfigError, match="longer than 14 days"):
        Hvac(horizon=24 * 15)
    (tmp_path / "x.epw").write_text("nothing")
    with pytest.raises(DataError, match=r"x\.epw, line 1"):
        Hvac(epw=str(tmp_path / "x.epw"))


def test_examples_span_heating_and_cooling_and_come_from_training_days():
    family = Hvac(few_shot=5, start="random", time_res=900, max_power=2000, horizon=8)
    shots = family.shots
    assert len(shots) == 5
    powers = [parse_reply(shot.reply, 1).powers[0] for shot in shots]
    assert min(powers) < -0.2
    assert max(powers) > 0.2
    assert {shot.start["day"] for shot in shots} <= set(family.days("train"))
    assert Hvac(few_shot=5, start="random", time_res=900, max_power=2000, horizon=8).shots == shots


def test_an_example_is_what_the_simulator_pays():
    for shot in SMALL.shots:
        env = SMALL.make(Task("t", metadata=dict(shot.start)))
        assert env.start().messages[-1].content.endswith(shot.state)
        assert env.step(shot.reply).reward == pytest.approx(shot.reward)
        for other in ('{"power": 0.0}', '{"power": 1.0}', '{"power": -1.0}'):
            assert SMALL.make(Task("t", metadata=dict(shot.start))).step(other).reward <= shot.reward


def test_prompt_is_a_shared_trunk_with_the_state_last():
    first, second = (SMALL.make(task).start().messages for task in SMALL.tasks("train", 2, 0))
    assert first[:-1] == second[:-1] == SMALL.prompt_trunk
    assert first[-1] != second[-1]
    assert [m.role for m in first] == ["system", *["user", "assistant"] * 3, "user"]
    assert '{"power": x}' in first[0].content
    env = SMALL.make(SMALL.tasks("eval", 1, 0)[0])
    env.start()
    observation = env.step('{"power": 0.1}').observation
    assert observation is not None
    assert observation.restart
    assert observation.messages[:-1] == SMALL.prompt_trunk
    assert "Recent powers and rewards: 0.10 (-" in observation.messages[-1].content


def test_state_in_words():
    family = Hvac(few_shot=0, occupancy="office_hours")
    task = Task("t", metadata={"day": 200, "hour": 14, "initial_temperature": 24.3})
    env = family.make(task)
    (_, state) = env.start().messages
    p, t = env.env.physics, 200 * 24 + 14
    assert state.content == (
        f"Time 14:00, outside {p.outdoor[t]:.1f} C, ground {p.ground[t]:.1f} C, sun {p.sun[t]:.1f}, people 31. "
        # full power of 8000 W moves the controlled zones by `reach` kelvins in an hour, and -2.3 are wanted
        f"Zones 24.3 C; weather aside, target needs {-2.3 / reach(env.env):.2f}."
    )
    cold = Hvac(few_shot=0, control="per_zone").make(
        Task("t", metadata={"day": 0, "hour": 0, "initial_temperature": [21.0, 22.0, 23.5, 22.0, 22.0, 5.0]})
    )
    text = cold.start().messages[-1].content
    # the attic's 5 degC is no business of the five controlled zones
    assert "Zones 21.0, 22.0, 23.5, 22.0, 22.0 C; weather aside, target needs " in text
    needs = [float(x) for x in text.split("needs ")[1].rstrip(".").split(", ")]
    assert needs == pytest.approx([1 / reach(cold.env), 0, -1.5 / reach(cold.env), 0, 0], abs=0.006)
    assert " 5.0" not in text


def test_chat_memory_keeps_the_conversation():
    family = Hvac(memory="chat", horizon=3)
    env = family.make(family.tasks("train", 1, 0)[0])
    assert env.start().messages[:-1] == family.prompt_trunk
    step = env.step('{"power": 0.0}')
    assert step.observation is not None
    assert not step.observation.restart
    (message,) = step.observation.messages
    assert message.role == "user"
    assert message.content.startswith(f"Reward {step.info['physical_reward']:.1f}. Time 01:00")
    assert "Recent" not in message.content


def test_a_copy_with_other_options_has_a_prompt_of_its_own():
    assert len(SMALL.prompt_trunk) == 7
    assert len(SMALL.model_copy(update={"few_shot": 1}).prompt_trunk) == 3


def test_history_and_reasoning_change_the_prompt():
    def second_prompt(**options) -> str:
        family = Hvac(horizon=6, **options)
        env = family.make(family.tasks("train", 1, 0)[0])
        env.start()
        for _ in range(4):
            observation = env.step('{"power": 0.1}').observation
        assert observation is not None
        return observation.messages[-1].content

    assert "Recent" not in second_prompt(history=0)
    assert second_prompt(history=2).count("0.10 (") == 2
    assert "step by step" in Hvac(reasoning=True).prompt_trunk[0].content
    assert "step by step" not in Hvac().prompt_trunk[0].content


def test_an_unreadable_reply_acts_as_zero_and_pays_the_penalty():
    task = SMALL.tasks("train", 1, 0)[0]
    bad = SMALL.make(task).step("no idea")
    zero = SMALL.make(task).step('{"power": 0.0}')
    assert bad.info["physical_reward"] == zero.info["physical_reward"] == zero.reward
    assert bad.reward == pytest.approx(zero.reward - 1.0)
    assert (bad.info["parsed"], bad.info["fallback"], bad.info["parse_penalty"]) == ("failed", True, 1.0)
    assert (zero.info["parsed"], zero.info["fallback"], zero.info["parse_penalty"]) == ("json", False, 0.0)
    scaled = SMALL.model_copy(update={"reward_scale": 0.1, "parse_penalty": 3.0}).make(task).step("no idea")
    assert scaled.reward == pytest.approx(0.1 * zero.reward - 3.0)
    assert scaled.info["physical_reward"] == zero.reward


def test_episode_ends_by_truncation_after_the_horizon():
    env = SMALL.make(SMALL.tasks("train", 1, 0)[0])
    env.start()
    steps = [env.step('{"power": 0}') for _ in range(4)]
    assert [s.truncated for s in steps] == [False, False, False, True]
    assert not any(s.terminated for s in steps)
    assert [s.observation is None for s in steps] == [False, False, False, True]


def test_baselines_are_ordered_and_equal_the_text_world():
    tasks = SMALL.tasks("eval", 26, 0)
    baselines = SMALL.baselines()
    mean = {name: np.mean([run(task) for task in tasks]) for name, run in baselines.items()}
    assert mean["random"] < mean["zero"] < mean["proportional"] < mean["one_step_optimal"] < 0
    assert mean["proportional"] > 0.5 * mean["zero"]  # at most half the cost
    env = SMALL.make(tasks[0])
    env.start()
    total = sum(env.step('{"power": 0}').info["physical_reward"] for _ in range(4))
    assert total == pytest.approx(baselines["zero"](tasks[0]))
    assert baselines["random"](tasks[0]) == baselines["random"](tasks[0])


def test_per_zone_replies_reach_the_controlled_zones():
    family = Hvac(control="per_zone", horizon=2, history=1)
    env = family.make(family.tasks("train", 1, 0)[0])
    env.start()
    step = env.step('{"power": [0.1, 0, 0, 0, 0]}')
    assert step.info["parsed"] == "json"
    assert step.info["energy"] == pytest.approx(0.1)
    assert len(step.info["temperatures"]) == 6
    assert step.observation is not None
    assert "0.10 0.00 0.00 0.00 0.00 (" in step.observation.messages[-1].content
    assert env.step('{"power": 0.1}').info["parsed"] == "failed"


def test_training_episodes_may_be_shorter_than_evaluation():
    family = Hvac(horizon=5, train_horizon=2, start="random")
    for split, steps in (("train", 2), ("eval", 5)):
        env = family.make(family.tasks(split, 1, seed=0)[0])
        env.start()
        ends = [env.step('{"power": 0.1}').truncated for _ in range(steps)]
        assert ends == [False] * (steps - 1) + [True]
    with pytest.raises(ConfigError, match="train_horizon 9 is longer than horizon 5"):
        Hvac(horizon=5, train_horizon=9)
