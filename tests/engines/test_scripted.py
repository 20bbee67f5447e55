import numpy as np
import pytest

from sapwood.engines import Engine, Request, Sampling
from sapwood.engines.check import check_engine
from sapwood.engines.scripted import OPTIONS, ScriptedEngine
from sapwood.errors import BudgetError, EngineError
from sapwood.plugins import load
from sapwood.types import StopReason
from tests.chats import tokenizer

TOK = tokenizer()
EOS = TOK.eos_token_id


def ids(text):
    return np.array(TOK(text, add_special_tokens=False)["input_ids"], np.int64)


def request(number=0, prompt="hi", episode="e", seed=0, **sampling):
    return Request(number, ids(prompt), Sampling(**{"max_new_tokens": 32} | sampling), seed, episode)


def only(engine, asked):
    [completion] = engine.generate([asked])
    return completion


def test_it_keeps_the_contract():
    check_engine(ScriptedEngine(TOK, lambda prompt, request: f"room {request.seed}"), len(TOK), stochastic=False)
    slow = ScriptedEngine(TOK, lambda prompt, request: prompt[-9:], tokens_per_step=1)
    check_engine(slow, len(TOK), stochastic=False, policy="weights")
    assert slow.policies == ["weights"]


def test_a_list_is_the_script_of_every_episode():
    engine = ScriptedEngine(TOK, ["one", "two"])

    def say(number, episode):
        engine.submit(request(number, episode=episode))
        return TOK.decode(engine.step()[0].token_ids, skip_special_tokens=True)

    assert [say(1, "a"), say(2, "b"), say(3, "a"), say(4, "a"), say(5, "b")] == ["one", "one", "two", "two", "two"]
    engine.close("a")
    assert say(6, "a") == "one"


def test_replies_end_as_asked():
    engine = ScriptedEngine(TOK, ["the lamp is on"], logprob=-0.25)
    whole = only(engine, request())
    assert whole.stop_reason is StopReason.EOS
    assert whole.token_ids.tolist() == [*ids("the lamp is on"), EOS]
    assert whole.logprobs.tolist() == [-0.25] * whole.token_ids.size
    cut = only(engine, request(max_new_tokens=2))
    assert (cut.stop_reason, cut.token_ids.tolist()) == (StopReason.LENGTH, whole.token_ids[:2].tolist())
    stopped = only(engine, request(stop=("mp",)))
    assert stopped.stop_reason is StopReason.STOP
    said = TOK.decode(stopped.token_ids)
    assert "mp" in said
    assert "is" not in said
    by_token = only(engine, request(stop_token_ids=(int(whole.token_ids[1]),)))
    assert (by_token.stop_reason, by_token.token_ids.size) == (StopReason.STOP, 2)
    endless = only(engine, request(ignore_eos=True))
    assert (endless.stop_reason, endless.token_ids.size) == (StopReason.LENGTH, 32)


def test_tokens_per_step_spreads_a_reply_over_steps():
    engine = ScriptedEngine(TOK, lambda prompt, asked: "a" * 0 + ("x" if asked.id else "xyz"), tokens_per_step=1)
    engine.submit(request(0, episode="long"))  # x y z end: 4 steps
    engine.submit(request(1, episode="short"))  # x end: 2 steps
    assert [[c.request_id for c in engine.step()] for _ in range(5)] == [[], [1], [], [0], []]


def test_closing_an_episode_drops_what_is_unfinished():
    engine = ScriptedEngine(TOK, ["xyz"])
    engine.submit(request(0, episode="kept"))
    engine.submit(request(1, episode="left"))
    engine.close("left")
    assert [c.request_id for c in engine.step()] == [0]


def test_a_recipe_can_hold_a_script():
    engine = load("engine", "scripted")("policy", TOK, options=OPTIONS(reply=("one",), logprob=-2.0))
    said = only(engine, request())
    assert TOK.decode(said.token_ids, skip_special_tokens=True) == "one"
    assert set(said.logprobs.tolist()) == {-2.0}
    assert engine.policies == ["policy"]


def test_bad_use():
    with pytest.raises(EngineError, match="at least one reply"):
        ScriptedEngine(TOK, [])
    with pytest.raises(EngineError, match="at least one reply"):
        ScriptedEngine(TOK, "hello")
    with pytest.raises(EngineError, match="tokens_per_step"):
        ScriptedEngine(TOK, ["a"], tokens_per_step=0)
    with pytest.raises(BudgetError, match="request 0: its prompt"):
        ScriptedEngine(TOK, ["a"], max_context=1).submit(request(prompt="the lamp is on the table"))


def reply(prompt, asked):
    return f"lamp {asked.seed}"


class Reorders(ScriptedEngine):
    def generate(self, requests):
        return super().generate(requests)[::-1]


class Overruns(ScriptedEngine):
    def submit(self, request):
        longer = request.sampling.model_copy(update={"max_new_tokens": request.sampling.max_new_tokens + 1})
        super().submit(Request(request.id, request.token_ids, longer, request.seed, request.episode))


class Gossips(ScriptedEngine):
    """What it says depends on how many others are asking."""

    def submit(self, request):
        super().submit(Request(request.id, request.token_ids, request.sampling, len(self._running), request.episode))


class Stale(ScriptedEngine):
    """Answers a second turn from what it kept of the first."""

    def submit(self, request):
        kept = getattr(self, "kept", {})
        self.kept = {request.episode: request.token_ids} | kept
        prompt = self.kept[request.episode]
        super().submit(Request(request.id, prompt, request.sampling, request.seed, request.episode))

    def close(self, episode):
        getattr(self, "kept", {}).pop(episode, None)
        super().close(episode)


class Deaf(ScriptedEngine):
    def submit(self, request):
        sampling = request.sampling.model_copy(update={"stop_token_ids": ()})
        super().submit(Request(request.id, request.token_ids, sampling, request.seed, request.episode))


class Mutters(ScriptedEngine):
    def step(self):
        done = super().step()
        return [type(c)(c.request_id, c.token_ids, c.logprobs[1:], c.kept_logmass, c.stop_reason) for c in done]


class Forgets(ScriptedEngine):
    def load(self, policy):
        self._reply = lambda prompt, asked: "something else"


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (Reorders, "order of its requests"),
        (Overruns, "1 to max_new_tokens"),
        (Gossips, "on its own must give the same"),
        (Stale, "second turn must give the same"),
        (Deaf, "a stop token must end"),
        (Mutters, "logprobs must have one entry"),
        (Forgets, "the same policy, loaded again"),
    ],
)
def test_the_check_catches(cls: type[Engine], sentence):
    def say(prompt, asked):
        return str(asked.seed) + prompt[::-1]

    with pytest.raises(EngineError, match=sentence):
        check_engine(cls(TOK, say), len(TOK), stochastic=False, policy="weights")  # type: ignore[call-arg]


def test_the_check_wants_seeds_to_matter():
    with pytest.raises(EngineError, match="other seeds must give other replies"):
        check_engine(ScriptedEngine(TOK, ["always the same"]), len(TOK))
