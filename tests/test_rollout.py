import json

import numpy as np
import pytest

from sapwood.chat import Chat
from sapwood.engines import Sampling
from sapwood.engines.scripted import ScriptedEngine
from sapwood.errors import BudgetError, ConfigError, DataError, EnvError
from sapwood.rewards import Reward
from sapwood.rewards.env import EnvReward
from sapwood.rollout import apply_rewards, collect, records, to_rows, turn_seed
from sapwood.types import Group, StopReason, Task, Trajectory, Turn
from tests.chats import CHATML, tokenizer
from tests.worlds import Faulty, Guess

TOK = tokenizer()
CHAT = Chat(TOK)
SAMPLING = Sampling(max_new_tokens=16)


def play(family, tasks, reply, group_size=1, seed=0, engine=None, sampling=SAMPLING, **options):
    engine = engine or ScriptedEngine(TOK, reply)
    return collect(family, tasks, group_size, engine, CHAT, sampling, seed, **options)


def ids(text):
    return np.array(TOK(text, add_special_tokens=False)["input_ids"], np.int64)


def conversation(turns):
    return np.concatenate([part for turn in turns for part in (turn.prompt_ids, turn.token_ids)])


def bisect(prompt, request):
    """Guesses 5 first and one up or down after that."""
    last = prompt.rsplit("<|im_start|>assistant", 2)
    if len(last) < 3:
        return "5"
    guess = int("".join(c for c in last[1].split("<|im_end|>")[0] if c.isdigit()))
    return str(guess + 1 if "low" in last[1] else guess - 1)


def test_a_conversation_grows_turn_by_turn():
    task = Task("t", metadata={"answer": 7})
    [group] = play(Guess(), [task], bisect, rewards=[EnvReward()])
    [trajectory] = group.trajectories
    assert [turn.text for turn in trajectory.turns] == ["5", "6", "7"]
    assert trajectory.terminated
    assert not trajectory.truncated
    # two wrong guesses at -1 and a right one at 10
    assert (trajectory.env_return, trajectory.reward, trajectory.reward_parts) == (8.0, 8.0, {"env": 8.0})
    text = CHAT.decode(conversation(trajectory.turns), skip_special_tokens=False)
    assert text.endswith(
        "<|im_start|>user\nguess a number<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
        "<|im_start|>user\ntoo low<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n"
        "<|im_start|>user\ntoo low<|im_end|>\n<|im_start|>assistant\n7<|im_end|>"
    )
    [row] = to_rows([group], 1.0)
    assert row.token_ids.tolist() == conversation(trajectory.turns).tolist()
    assert row.token_ids[row.loss_mask].tolist() == ids("5<|im_end|>6<|im_end|>7<|im_end|>").tolist()


def test_a_restart_drops_history_and_starts_a_row():
    task = Task("t", metadata={"answer": 9})
    [group] = play(Guess(restart=True), [task], ["1", "2", "9"])
    turns = group.trajectories[0].turns
    assert [turn.restart for turn in turns] == [False, True, True]
    assert CHAT.decode(turns[1].prompt_ids).count("user") == 1
    rows = to_rows([group], 0.5)
    assert [row.turn.tolist() for row in rows] == [[0, 0], [1, 1], [2, 2]]
    assert [row.token_ids.tolist() for row in rows] == [conversation([t]).tolist() for t in turns]
    assert {row.temperature for row in rows} == {0.5}


def test_results_do_not_depend_on_who_answers_first():
    family = Guess()
    tasks = family.tasks("train", 3, 0)

    def reply(prompt, request):
        return str(request.seed % 9 + 1) + " is it" * (request.seed % 3)

    runs = [
        play(family, tasks, reply, 4, max_turns=6, engine=ScriptedEngine(TOK, reply, tokens_per_step=n))
        for n in (None, 1, 2)
    ]
    told = [[[turn.text for turn in t.turns] for g in run for t in g.trajectories] for run in runs]
    assert told[0] == told[1] == told[2]
    assert len({tuple(texts) for texts in told[0]}) > 6  # members of a group draw from seeds of their own
    other = play(family, tasks, reply, 4, seed=1, max_turns=6)
    assert told[0] != [[turn.text for turn in t.turns] for g in other for t in g.trajectories]


def test_seeds_differ_in_every_coordinate():
    base = (3, 5, 7, 11)
    others = [tuple(v + (i == k) for i, v in enumerate(base)) for k in range(4)]
    seeds = {turn_seed(*coordinates) for coordinates in [base, (5, 3, 7, 11), *others]}
    assert len(seeds) == 6
    assert turn_seed(*base) == turn_seed(*base)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_budgets_truncate():
    task = Task("t", metadata={"answer": 9})
    [group] = play(Guess(), [task], ["1"], max_turns=3)
    [trajectory] = group.trajectories
    assert (len(trajectory.turns), trajectory.truncated, trajectory.terminated) == (3, True, False)

    first = trajectory.turns[0].prompt_ids.size
    reply, delta = trajectory.turns[0].token_ids.size, trajectory.turns[1].prompt_ids.size
    # Room for the first two prompts and a reply to each, one token short of a third.
    context = first + 2 * (reply + delta) + 16 - 1
    [group] = play(Guess(), [task], ["1"], max_context=context)
    assert (len(group.trajectories[0].turns), group.trajectories[0].truncated) == (2, True)
    [group] = play(Guess(), [task], ["1"], max_context=context + 1)
    assert len(group.trajectories[0].turns) == 3
    with pytest.raises(BudgetError, match=rf"task 't': its first prompt has {first} tokens.*context of {first + 15}"):
        play(Guess(), [task], ["1"], max_context=first + 15)
    # The world's own time limit is a truncation too.
    [group] = play(Guess(limit=2), [task], ["1"])
    assert (len(group.trajectories[0].turns), group.trajectories[0].truncated) == (2, True)


def test_a_reply_cut_by_length_is_closed_before_the_next_observation():
    task = Task("t", metadata={"answer": 9})
    short = Sampling(max_new_tokens=1)
    [group] = play(Guess(), [task], ["12345 or so", "9"], sampling=short, max_turns=2)
    first, second = group.trajectories[0].turns
    assert first.stop_reason is StopReason.LENGTH
    assert second.prompt_ids[0] == TOK.eos_token_id


def test_whatever_ends_a_turn_of_the_template_stops_the_engine():
    asked = []
    tok = tokenizer(CHATML, "<|eot_id|>")  # a base model's eos differs from the end of turn
    engine = ScriptedEngine(tok, lambda prompt, request: asked.append(request.sampling) or "9<|im_end|> and more")
    task = Task("t", metadata={"answer": 9})
    sampling = Sampling(stop_token_ids=(300,))
    [group] = collect(Guess(), [task], 1, engine, Chat(tok), sampling, 0)
    assert group.trajectories[0].turns[0].text == "9"
    assert set(asked[0].stop_token_ids) == {300, *Chat(tok).end_token_ids}
    collect(Guess(), [task], 1, engine, Chat(tok), sampling.model_copy(update={"ignore_eos": True}), 0, max_turns=1)
    assert asked[-1].stop_token_ids == (300,)


def test_every_faulty_environment_is_recorded_and_the_run_goes_on():
    names = ["raise-in-make", "raise-in-start", "not-an-observation", "raise-in-step"]
    names += ["nan", "never-ends-right", "mute", "fine"]
    groups = play(Faulty(isolate=False), [Task(n) for n in names], ["a", "b"], rewards=[EnvReward()])
    errors = {g.task.id: g.trajectories[0].error for g in groups}
    assert errors["raise-in-make"] == "RuntimeError: no such building"
    assert errors["raise-in-start"] == "ValueError: no weather"
    assert errors["not-an-observation"] == "EnvError: start returned str, not Observation"
    assert errors["raise-in-step"] == "KeyError: 'zone 7'"
    assert "reward of nan" in errors["nan"]
    assert "observation=None exactly when" in errors["never-ends-right"]
    assert "without a message" in errors["mute"]
    assert errors["fine"] is None
    failed = groups[3].trajectories[0]
    assert [turn.text for turn in failed.turns] == ["a", "b"]  # what led to the failure is kept
    assert (failed.reward_parts, failed.reward) == ({}, 0.0)
    assert [row.group for row in to_rows(groups, 1.0)] == [7]
    [group] = play(Faulty(isolate=False), [Task("raise-in-close")], ["a"])
    assert (group.trajectories[0].error, group.trajectories[0].reward) == (None, 0.0)
    assert group.trajectories[0].info == {"close_error": "OSError: busy"}


def test_a_run_in_which_everything_failed_says_why():
    with pytest.raises(EnvError, match="every episode failed; the first: ValueError: no weather"):
        play(Faulty(isolate=False), [Task("raise-in-start")], ["a"], 2)


def test_bad_arguments():
    with pytest.raises(ConfigError, match="no task"):
        play(Guess(), [], ["a"])
    with pytest.raises(ConfigError, match="group_size"):
        play(Guess(), [Task("t")], ["a"], 0)
    with pytest.raises(ConfigError, match="max_turns"):
        play(Guess(), [Task("t")], ["a"], max_turns=0)


def test_progress_counts_episodes():
    seen = []
    family = Guess()
    tasks = family.tasks("train", 2, 0)
    play(family, tasks, bisect, 2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4, 4)
    assert seen == sorted(seen)


def turn(prompt, tokens, **options):
    values = {
        "sampled_logprobs": -np.arange(1, len(tokens) + 1, dtype=np.float32),
        "kept_logmass": np.zeros(len(tokens), np.float32),
        "stop_reason": StopReason.EOS,
        "text": "".join(map(chr, tokens)),
    } | options
    return Turn(np.array(prompt, np.int64), np.array(tokens, np.int64), **values)


def test_rows_of_a_group_made_by_hand():
    task = Task("t")
    two_turns = Trajectory(task, [turn([1, 2, 3], [65, 66]), turn([4], [67])], reward=2.5)
    silent = Trajectory(task, [turn([1, 2], [])])
    failed = Trajectory(task, [turn([1], [65])], error="ValueError: x")
    restarted = Trajectory(task, [turn([1], []), turn([5], [68]), turn([1, 6], [69, 70], restart=True)], reward=-1)
    demonstration = Trajectory(
        task, [turn([9], [71], sampled_logprobs=np.zeros(0, np.float32), kept_logmass=np.zeros(0, np.float32))]
    )
    rows = to_rows([Group(task, [two_turns, silent]), Group(task, [failed, restarted, demonstration])], 0.7)
    assert [(row.group, row.member, row.reward, row.temperature) for row in rows] == [
        (0, 0, 2.5, 0.7),
        (1, 1, -1, 0.7),
        (1, 1, -1, 0.7),
        (1, 2, 0.0, 0.7),
    ]
    assert rows[0].token_ids.tolist() == [1, 2, 3, 65, 66, 4, 67]
    assert rows[0].loss_mask.tolist() == [False, False, False, True, True, False, True]
    assert rows[0].turn.tolist() == [0, 0, 1]
    assert rows[0].sampled_logprobs.tolist() == [-1, -2, -1]
    # The turn without a sampled token stays in the history; the restarted turn begins a row of its own.
    assert [rows[1].token_ids.tolist(), rows[1].turn.tolist()] == [[1, 5, 68], [1]]
    assert [rows[2].token_ids.tolist(), rows[2].turn.tolist()] == [[1, 6, 69, 70], [2, 2]]
    assert rows[2].sampled_logprobs.tolist() == [-1, -2]
    assert rows[3].sampled_logprobs is None
    assert rows[3].kept_logmass is None


def test_greedy_rows_have_temperature_one():
    task = Task("t")
    [row] = to_rows([Group(task, [Trajectory(task, [turn([1], [65])])])], 0.0)
    assert row.temperature == 1.0


class Graded(Reward):
    scores: tuple = ()

    def score(self, groups):
        return [[self.scores[i] for i, _ in enumerate(g.trajectories)] for g in groups]


def test_rewards_are_weighted_and_named():
    task = Task("t")
    group = Group(task, [Trajectory(task, [turn([1], [65], reward=4.0)]), Trajectory(task, error="EnvError: x")])
    apply_rewards(
        [group],
        [
            EnvReward(weight=0.5),
            Graded(weight=2.0, scores=({"brief": 1.0, "kind": 0.25},)),
            EnvReward(weight=1.0),
        ],
    )
    good, failed = group.trajectories
    assert good.reward_parts == {"env": 4.0, "Graded/brief": 1.0, "Graded/kind": 0.25, "env/env": 4.0}
    # 0.5 * 4 + 2 * (1 + 0.25) + 1 * 4
    assert good.reward == 8.5
    assert (failed.reward, failed.reward_parts) == (0.0, {})
    apply_rewards([group], [EnvReward()])
    assert (good.reward, good.reward_parts) == (4.0, {"env": 4.0})


def test_a_reward_that_changes_what_it_reads_is_told() -> None:
    class Forgetful(Reward):
        def score(self, groups):
            for group in groups:
                group.trajectories[0].turns.clear()
            return [[{"x": 0.0} for _ in group.trajectories] for group in groups]

    turn = Turn(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1), np.zeros(1), StopReason.EOS, "hi")
    task = Task("t")
    group = Group(task, [Trajectory(task, [turn])])
    with pytest.raises(DataError, match="reward 'Forgetful' changed the turns of a trajectory"):
        apply_rewards([group], [Forgetful()])


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        (({"x": float("nan")},), "reward 'Graded', task 't'.*part 'x' is nan"),
        (({"x": "high"},), "part 'x' is 'high'"),
        ((3.0,), "dict of named parts, not a number"),
    ],
)
def test_bad_scores_name_reward_and_task(scores, sentence):
    task = Task("t")
    with pytest.raises(DataError, match=sentence):
        apply_rewards([Group(task, [Trajectory(task)])], [Graded(scores=scores)])


def test_a_reward_must_score_everything():
    class Short(Reward):
        inner: bool = False

        def score(self, groups):
            return [[] for _ in groups] if self.inner else []

    task = Task("t")
    with pytest.raises(DataError, match="'Short' must return a list with one entry a group, 1 here"):
        apply_rewards([Group(task, [Trajectory(task)])], [Short()])
    with pytest.raises(DataError, match=r"'Short', task 't'.*one dict a trajectory, 1 here"):
        apply_rewards([Group(task, [Trajectory(task)])], [Short(inner=True)])


def test_records_tell_the_whole_story_as_json():
    task = Task("t", metadata={"answer": 2})
    groups = play(Guess(), [task], ["1", "2"], rewards=[EnvReward()])
    [row] = to_rows(groups, 1.0)
    row.advantages = np.array([0.5, 0.5, -1, -1], np.float32)
    [record] = records(groups, [row], lambda i: CHAT.decode(i, skip_special_tokens=False))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["reward_parts"] == {"env": 9.0}
    assert [t["reply"] for t in record["turns"]] == ["1", "2"]
    assert [t["advantages"] for t in record["turns"]] == [[0.5, 0.5], [-1, -1]]
    assert record["turns"][1]["prompt"] == "\n<|im_start|>user\ntoo low<|im_end|>\n<|im_start|>assistant\n"
    assert record["turns"][0]["info"] == {"parsed": "regex", "fallback": False, "guess": 1}
