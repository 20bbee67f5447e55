import pytest
from pydantic import ValidationError

from sapwood.config import load_recipe
from sapwood.envs import reasoning_gym as module
from sapwood.envs.check import check_env
from sapwood.envs.reasoning_gym import ReasoningGym
from sapwood.errors import ConfigError, MissingExtra
from sapwood.types import Message, Task

pytest.importorskip("reasoning_gym")

SUMS = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 2,
    "operators": ["+"],
    "allow_parentheses": False,
}


def questions(tasks):
    return [task.prompt[-1].content for task in tasks]


def test_an_episode_is_one_scored_reply():
    family = ReasoningGym(task="basic_arithmetic", options=SUMS)
    [task] = family.tasks("train", 1, 0)
    # "Calculate 12 + 7." without negative numbers: the sum can be read off the question
    left, right = task.prompt[-1].content.removeprefix("Calculate ").removesuffix(".").split(" + ")
    assert task.answer == str(int(left) + int(right))
    assert task.metadata["item"]["num_terms"] == 2
    for reply, paid in ((task.answer, 1.0), (f"  {task.answer}\n", 1.0), ("no idea", 0.0), ("", 0.0)):
        env = family.make(task)
        assert env.start().messages == task.prompt
        step = env.step(reply)
        assert (step.observation, step.terminated, step.reward) == (None, True, paid)
    assert family.solution(task) == task.answer


def test_partial_scores_unless_exact():
    # The data set's own rule: where the answer is part of the reply, its share of the characters. "5" in "it: 5" is 1/5
    task = Task("t", answer="5", metadata={"task": "chain_sum", "options": {}, "question": "2 + 3 = ?", "item": {}})
    assert ReasoningGym(task="chain_sum").score(task, "it: 5") == (pytest.approx(0.2), "regex")
    assert ReasoningGym(task="chain_sum", exact=True).score(task, "it: 5") == (0.0, "regex")
    assert ReasoningGym(task="chain_sum", exact=True).score(task, "5") == (1.0, "regex")


@pytest.mark.parametrize(
    ("extract", "reply", "answer"),
    [
        ("reply", " 7 \n", "7"),
        ("tags", "<answer>1</answer> no, <ANSWER> 2\n</ANSWER>.", "2"),
        ("tags", "2", None),
        ("last_line", "so\n\n 12 \n\n", "12"),
        ("last_line", "\n", None),
        ("last_number", "first 3, then -1,234.50.", "-1234.50"),
        ("last_number", "half is 1/2", "1/2"),
        ("last_number", "none", None),
    ],
)
def test_where_the_answer_is(extract, reply, answer):
    assert module._extracted(reply, extract) == answer


def test_splits_share_no_question_and_no_seed():
    # Sums of two numbers of one digit: 100 questions, of which a fifth or so are held out, and 200 draws hit them often
    small = ReasoningGym(task="chain_sum", options={"max_terms": 2, "max_digits": 1, "allow_negation": False})
    train, held_out = small.tasks("train", 200, 0), small.tasks("eval", 8, 1)
    assert not set(questions(train)) & set(questions(held_out))
    assert {task.seed % 2 for task in train} == {0}
    assert {task.seed % 2 for task in held_out} == {1}
    assert len(set(questions(held_out))) == 8
    assert len({task.id for task in train}) == 200
    assert questions(small.tasks("train", 200, 0)) == questions(train)
    assert questions(small.tasks("train", 200, 5)) != questions(train)
    assert questions(small.tasks("train", 20, 0)) == questions(train)[:20]
    with pytest.raises(ConfigError, match=r"only \d+ distinct eval questions, but 99 .* lower eval.tasks"):
        small.tasks("eval", 99, 0)


def test_mixture_by_weight():
    family = ReasoningGym(
        mix=({"task": "chain_sum", "weight": 3.0}, {"task": "spell_backward", "options": {"max_word_len": 3}})
    )
    check_env(family)
    tasks = family.tasks("train", 200, 0)
    sums = sum(task.metadata["task"] == "chain_sum" for task in tasks)
    assert 150 - 25 < sums < 150 + 25  # 200 draws with p = 3/4: 150, standard deviation 6.1
    assert all(family.score(task, task.answer)[0] == 1.0 for task in tasks)
    assert family.describe() == "reasoning-gym chain_sum+spell_backward"


def test_examples_and_system_message():
    family = ReasoningGym(task="chain_sum", system="Add.", few_shot=2, extract="tags")
    first, second = family.tasks("train", 2, 0)
    assert [m.role for m in first.prompt] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert first.prompt[0] == Message("system", "Add.")
    assert first.prompt[:5] == second.prompt[:5]  # a trunk that all tasks share
    assert first.prompt[2].content.startswith("<answer>")
    shown = {first.prompt[1].content, first.prompt[3].content}
    assert len(shown) == 2
    assert not shown & set(questions(family.tasks("eval", 30, 0) + family.tasks("train", 30, 0)))
    assert family.solution(first) == f"<answer>{first.answer}</answer>"
    with pytest.raises(ConfigError, match=r"'graph_color' gives no reference answers; set env.few_shot=0"):
        ReasoningGym(task="graph_color", few_shot=1).tasks("train", 1, 0)


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("countdown", "9**9**9**9"),
        ("countdown", "9**(99999*99999)"),
        ("puzzle24", "__import__('os').getcwd()"),
        ("simple_integration", "().__class__"),
        ("simple_integration", "[x for x in (1,)]"),
        ("string_insertion", "open('/tmp/x')"),
        ("n_queens", "[print(1)]"),
        ("coin_flip", "1e999999999"),
    ],
)
def test_no_reply_is_run_as_code(name, reply):
    assert not module._harmless(name, reply)
    family = ReasoningGym(task=name)
    [task] = family.tasks("train", 1, 0)
    assert family.score(task, reply) == (0.0, "failed")


@pytest.mark.parametrize("name", sorted(module._EVALUATED | module._SYMBOLIC))
def test_guarded_scorers_still_know_their_answers(name):
    family = ReasoningGym(task=name)
    for task in family.tasks("train", 4, 0):
        assert family.score(task, task.answer) == (1.0, "regex")


def test_a_scorer_that_raises_pays_nothing():
    # prime_factorization raises ValueError for anything but integers
    family = ReasoningGym(task="prime_factorization")
    [task] = family.tasks("train", 1, 0)
    assert family.score(task, "two times two") == (0.0, "failed")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"task": "chain_sums"}, "env.task: reasoning-gym has no task 'chain_sums'; did you mean 'chain_sum'"),
        ({"mix": [{"task": "nothing of the kind"}]}, "env.mix: reasoning-gym has no task .*; known: ab, acre,"),
        ({"task": "chain_sum", "options": {"max_term": 2}}, "no option 'max_term'; did you mean 'max_terms'"),
        ({"task": "chain_sum", "options": {"seed": 2}}, "'seed' can't be set for 'chain_sum'"),
        ({"task": "chain_sum", "options": {"min_terms": 0}}, "options of 'chain_sum': min_terms must be positive"),
        ({}, "give either task"),
        ({"task": "chain_sum", "mix": [{"task": "gcd"}]}, "give either task"),
        ({"options": {"a": 1}, "mix": [{"task": "gcd"}]}, "every item has options of its own"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(ValidationError, match=sentence):
        ReasoningGym(**options)


def test_in_a_recipe(tmp_path):
    path = tmp_path / "gcd.yaml"
    path.write_text("run: {dir: x, steps: 1}\nalgorithm: {name: grpo}\nenv:\n  name: reasoning_gym\n  task: gcd\n")
    assert load_recipe(path).build_env() == ReasoningGym(task="gcd")
    path.write_text(path.read_text().replace("gcd", "gdc"))
    with pytest.raises(ConfigError, match=r"gcd.yaml line 5: env.task: .* no task 'gdc'; did you mean 'gcd'\?$"):
        load_recipe(path)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym.factory", None)
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(MissingExtra, match=r"sapwood\[reasoning-gym\]"):
        ReasoningGym(task="gcd")
