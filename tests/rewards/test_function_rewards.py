import numpy as np
import pytest
from pydantic import ValidationError
from tests.rewards.test_simple_rewards import group

from sapwood.errors import ConfigError, DataError, UnknownPlugin
from sapwood.plugins import load
from sapwood.rewards import Reward
from sapwood.rollout import apply_rewards
from sapwood.types import Group, Message, Task

SOURCE = """
from sapwood.errors import DataError

def brevity(prompts, replies, *, words: int = 4):
    return [min(1.0, words / max(1, len(reply.split()))) for reply in replies]

def seen(replies, answers, groups, tasks, metadata, trajectories, prompts):
    assert len(tasks) == len(trajectories) == len(replies)
    return [{"a": float(reply == answer), "b": float(group)} for reply, answer, group in zip(replies, answers, groups)]

def everything(**given):
    return [float(len(given))] * len(given["replies"])

def helper(reply):
    return 1 / 0

def raises(replies):
    return [helper(reply) for reply in replies]

def raises_ours(replies):
    raise DataError("prices.csv, line 2: no price.")

def returns(replies, value: str):
    return {"none": None, "dict": {}, "few": [1.0], "nan": [1.0, float("nan")], "text": ["1", "2"],
            "part": [{"a": 1.0}, {"a": None}], "ok": [1, True], "empty": [{}, {}], "huge": [10**400, 1]}[value]

def array(replies):
    import numpy
    return numpy.ones(len(replies), dtype=numpy.float32) / 2

def responses(prompts, responses): return []
def nothing(): return []
def hides(replies, weight=1): return []
def unreadable(replies, n: 'Missing'): return []
async def later(replies): return []
def leaves(replies): raise SystemExit(3)
def talks(replies): raise ValueError("x" * 400)
"""


@pytest.fixture
def reward(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(SOURCE)
    return lambda name, **options: load("reward", f"{path}:{name}")(**options)


def two(answer="b"):
    task = Task("t", (Message("user", "Q?"),), answer=answer)
    return Group(
        task, [group("a b c d e f g h", answer=answer).trajectories[0], group("b", answer=answer).trajectories[0]]
    )


def test_a_function_is_a_reward(reward):
    plain = reward("brevity")
    assert isinstance(plain, Reward)
    # 4 words of 8, and of 1
    assert plain.score([two()]) == [[{"brevity": 0.5}, {"brevity": 1.0}]]
    assert reward("brevity", words=2).score([two()]) == [[{"brevity": 0.25}, {"brevity": 1.0}]]
    assert reward("brevity", words=2, weight=0.5).model_dump() == {"weight": 0.5, "words": 2}
    assert reward("brevity") == reward("brevity")
    with pytest.raises(ValidationError, match="valid integer"):
        reward("brevity", words="many")
    with pytest.raises(ValidationError, match="Extra inputs"):
        reward("brevity", word=2)


def test_what_a_function_is_given(reward):
    scores = reward("seen").score([two("b"), two("c")])
    assert scores == [[{"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0}], [{"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 1.0}]]
    # all of prompts, replies, answers, metadata, tasks, groups, trajectories
    assert reward("everything").score([two()]) == [[{"everything": 7.0}] * 2]
    assert reward("array").score([two()]) == [[{"array": 0.5}] * 2]
    assert reward("returns", value="ok").score([two()]) == [[{"returns": 1.0}] * 2]
    assert reward("brevity").score([Group(Task("t"), [])]) == [[]]


def test_parts_are_named_weighted_and_summed(reward):
    g = two()
    apply_rewards([g], [reward("brevity", weight=0.5), reward("seen", weight=2.0), reward("brevity", words=8)])
    # second member: .5 * 1 + 2 * (1 + 0) + 1 = 3.5
    assert g.trajectories[1].reward_parts == {"brevity": 1.0, "seen/a": 1.0, "seen/b": 0.0, "brevity/brevity": 1.0}
    assert g.trajectories[1].reward == 3.5


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("raises", {}, r"reward 'raises' \(.*rewards.py line 17\) raised ZeroDivisionError \(division by zero\) at "
                       r".*rewards.py line 15; fix it there"),
        ("raises_ours", {}, "^prices.csv, line 2: no price.$"),
        ("returns", {"value": "none"}, "returned NoneType; return a list with one number"),
        ("returns", {"value": "dict"}, "returned dict; return a list"),
        ("returns", {"value": "few"}, "returned 1 of 2 scores; return one for each reply"),
        ("returns", {"value": "nan"}, r"rewards.py line 23\), reply 1 \(task 't'\): it returned nan; every score"),
        ("returns", {"value": "text"}, "reply 0 .*: it returned '1'; every score must be a finite number"),
        ("returns", {"value": "part"}, "reply 1 .*: it returned None as 'a'"),
        ("returns", {"value": "empty"}, r"reply 0 .*: it returned an empty dict; for a reply that can't be judged"),
        ("returns", {"value": "huge"}, r"reply 0 .*: it returned 10000.*\.\.\.; every score must be a finite number"),
        ("leaves", {}, r"reward 'leaves' \(.*\) raised SystemExit \(3\) at .*rewards.py line 36; fix it there"),
        ("talks", {}, r"raised ValueError \(x{300} \.\.\.\) at"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_told_in_a_sentence(reward, name, options, sentence):
    with pytest.raises(DataError, match=sentence):
        reward(name, **options).score([two()])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("responses", "call its parameter 'responses' 'replies'"),
        ("nothing", "must take at least one of prompts, replies,"),
        ("hides", "its parameter 'weight' can't be an option of a reward; rename it"),
        ("unreadable", "its signature can't be read: name 'Missing' is not defined"),
        ("brevty", "has no 'brevty'; did you mean 'brevity'?"),
        ("later", "it is async, and is called plainly; write it with def"),
        ("", "write it as path/to/file.py:NAME or package.module:NAME"),
    ],
)
def test_what_can_never_work_is_told_at_once(reward, name, sentence):
    with pytest.raises(ConfigError, match=sentence.replace("?", r"\?")):
        reward(name)


def test_a_class_that_raises_is_told_the_same_way(tmp_path):
    path = tmp_path / "classes.py"
    path.write_text(
        "from sapwood.rewards import Reward\n"
        "class Lazy(Reward):\n"
        "    def score(self, groups):\n"
        "        return groups.nothing\n"
    )
    with pytest.raises(DataError, match=r"reward 'Lazy' raised AttributeError .* at .*classes.py line 4; fix it there"):
        apply_rewards([two()], [load("reward", f"{path}:Lazy")()])


def test_files_that_cannot_be_imported(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def f(replies):\n    return [\n")
    with pytest.raises(ConfigError, match=r"broken.py line 2 is not Python: '\[' was never closed"):
        load("reward", f"{path}:f")
    path.write_text("x = 1\ny = x / 0\n")
    with pytest.raises(ConfigError, match=r"importing it raised ZeroDivisionError .* at .*broken.py line 2"):
        load("reward", f"{path}:f")
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(UnknownPlugin, match="no module 'nothing_of_this_name'; is it installed"):
        load("reward", f"{path}:f")
    path.write_text("import sys\nsys.exit(1)\n")
    with pytest.raises(ConfigError, match=r"importing it raised SystemExit \(1\) at .*broken.py line 2"):
        load("reward", f"{path}:f")
    path.write_bytes(b"x = 1\x00")
    with pytest.raises(ConfigError, match=r"broken.py is not Python|broken.py line 1 is not Python|raised ValueError"):
        load("reward", f"{path}:f")
    with pytest.raises(UnknownPlugin, match=r"there is no file '.*brokn.py'; did you mean '.*broken.py'"):
        load("reward", f"{path.with_name('brokn.py')}:f")
    with pytest.raises(UnknownPlugin, match=r"unknown reward 'broken.py'; name what is in the file: broken.py:NAME"):
        load("reward", "broken.py")
    with pytest.raises(UnknownPlugin, match=r"unknown reward 'zzzz'\. Known: diversity"):
        load("reward", "zzzz")
    path.write_text("def f(replies): return [0.0 for _ in replies]\n")
    assert load("reward", f"{path}:f")().score([two()]) == [[{"f": 0.0}] * 2]  # a failed import leaves nothing behind


def test_functions_of_modules():
    loaded = load("reward", "tests.rewards.test_function_rewards:of_this_module")()
    assert loaded.score([two()]) == [[{"of_this_module": 15.0}, {"of_this_module": 1.0}]]
    assert of_this_module(["a"]).dtype == np.float64


def of_this_module(replies):
    return np.array([float(len(reply)) for reply in replies])
