from __future__ import annotations

import numpy as np
import peft
import pytest
import torch

from sapwood.engines import Completion, Request, Sampling
from sapwood.engines.check import check_engine
from sapwood.engines.local import LocalEngine, LocalOptions
from sapwood.errors import BudgetError, EngineError
from sapwood.types import StopReason

from ._models import FAMILIES, VOCAB, greedy, prompt, tiny

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


def request(number: int, ids: np.ndarray, sampling: Sampling = GREEDY, episode: str | None = None) -> Request:
    return Request(number, np.asarray(ids, np.int64), sampling, 100 + number, episode or f"e{number}")


def run(engine: LocalEngine, one: Request) -> Completion:
    engine.submit(one)
    for _ in range(200):
        done = engine.step()
        if done:
            return done[0]
    raise AssertionError("did not finish")


def joined(*parts: np.ndarray | list[int]) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int64) for part in parts])


def varied_prompts() -> list[np.ndarray]:
    """Shared prefixes, identical prompts, prompts that are prefixes of others, several lengths."""
    trunk = prompt(0, 20)
    return [
        joined(trunk, prompt(1, 5)),
        joined(trunk, prompt(2, 3)),
        joined(trunk, prompt(1, 5)),
        trunk,
        trunk[:9],
        joined(trunk, prompt(1, 5), prompt(3, 4)),
        prompt(4, 1),
        prompt(5, 31),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1024, 7])
def test_greedy_equals_transformers(family: str, chunk: int) -> None:
    model = tiny(family)
    engine = LocalEngine(model, options=LocalOptions(prefill_chunk=chunk))
    prompts = varied_prompts()
    completions = engine.generate([request(i, ids) for i, ids in enumerate(prompts)])
    for ids, completion in zip(prompts, completions, strict=True):
        assert completion.token_ids.tolist() == greedy(model, ids, 12)
    # 20 + 5 + 3 + 4 tokens below the trunk, and the two prompts of their own; what ends inside the trunk costs
    # nothing, since the trie is split there before anything is computed.
    assert engine.stats.prefilled_tokens == 32 + 1 + 31
    again = engine.generate([request(0, prompts[4][:5]), request(1, prompts[0])])
    assert again[0].token_ids.tolist() == greedy(model, prompts[4][:5], 12)
    assert again[1].token_ids.tolist() == completions[0].token_ids.tolist()
    # The first ends inside a computed segment: its last token is computed again, and nothing else.
    assert engine.stats.prefilled_tokens == 64 + 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral_windowed"])
def test_the_generic_runtime_agrees_with_the_lean_one(family: str) -> None:
    model = tiny(family)
    requests = [request(i, ids) for i, ids in enumerate(varied_prompts())]
    lean = LocalEngine(model, options=LocalOptions(runtime="lean")).generate(requests)
    generic = LocalEngine(model, options=LocalOptions(runtime="generic")).generate(requests)
    for a, b in zip(lean, generic, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral_windowed", "gemma2"])
def test_rows_that_join_midway_change_nothing(family: str) -> None:
    model = tiny(family)
    engine = LocalEngine(model, options=LocalOptions(max_batch=3))
    prompts = varied_prompts()
    lengths = [3, 12, 7, 1, 9, 12, 5, 8]
    done: dict[int, Completion] = {}
    for i, ids in enumerate(prompts):
        engine.submit(request(i, ids, GREEDY.model_copy(update={"max_new_tokens": lengths[i]})))
        done.update((c.request_id, c) for c in engine.step())
    for _ in range(60):
        done.update((c.request_id, c) for c in engine.step())
    for i, ids in enumerate(prompts):
        assert done[i].token_ids.tolist() == greedy(model, ids, lengths[i])


@pytest.mark.parametrize("family", ["llama", "mistral_windowed", "gemma3"])
def test_a_next_turn_prefills_only_what_is_new(family: str) -> None:
    model = tiny(family)
    engine = LocalEngine(model)
    others = [request(50 + i, ids) for i, ids in enumerate(varied_prompts()[:3])]
    history = joined(varied_prompts()[0], prompt(9, 2))
    for turn in range(3):
        before = engine.stats.prefilled_tokens
        for other in others if turn == 1 else ():
            engine.submit(other)
        completion = run(engine, request(turn, history, GREEDY.model_copy(update={"max_new_tokens": 4}), "talk"))
        assert completion.token_ids.tolist() == greedy(model, history, 4)
        if turn == 2:
            # The last sampled token and the 3 of the environment.
            assert engine.stats.prefilled_tokens - before == 4
        history = joined(history, completion.token_ids, prompt(20 + turn, 3))


def test_a_turn_that_rewrites_the_reply_keeps_the_part_before() -> None:
    model = tiny()
    engine = LocalEngine(model)
    first = prompt(0, 10)
    reply = run(engine, request(0, first, episode="talk")).token_ids
    rewritten = joined(first, reply[:5], [int(reply[5]) % 90 + 4], prompt(1, 2))
    before = engine.stats.prefilled_tokens
    again = run(engine, request(1, rewritten, episode="talk"))
    assert again.token_ids.tolist() == greedy(model, rewritten, 12)
    assert engine.stats.prefilled_tokens - before == 3
    restarted = joined(first[:4], prompt(2, 3))
    fresh = run(engine, request(2, restarted, episode="talk"))
    assert fresh.token_ids.tolist() == greedy(model, restarted, 12)


def test_close_frees_and_unknown_names_are_ignored() -> None:
    engine = LocalEngine(tiny())
    run(engine, request(0, prompt(0, 10), episode="talk"))
    # 10 prompt tokens and 11 of the reply: nothing is known of the last one.
    assert engine.kept_tokens == 21
    engine.close("talk")
    engine.close("nobody")
    assert engine.kept_tokens == 10
    engine.submit(request(1, prompt(1, 5)))
    engine.step()
    engine.close("e1")
    assert engine.step() == []
    assert engine.kept_tokens == 15


def test_a_small_budget_evicts_and_changes_nothing() -> None:
    model = tiny()
    engine = LocalEngine(model, options=LocalOptions(kv_budget_tokens=60, max_batch=4))
    prompts = varied_prompts()
    for seed in range(2):
        talk = run(engine, request(90 + seed, prompt(60 + seed, 15), episode=f"idle{seed}"))
        assert talk.token_ids.tolist() == greedy(model, prompt(60 + seed, 15), 12)
    for completion, ids in zip(
        engine.generate([request(i, ids) for i, ids in enumerate(prompts)]), prompts, strict=True
    ):
        assert completion.token_ids.tolist() == greedy(model, ids, 12)
    assert engine.stats.evicted_tokens > 0
    assert engine.kept_tokens <= 60
    turn = joined(prompt(60, 15), prompt(3, 4))
    assert run(engine, request(95, turn, episode="idle0")).token_ids.tolist() == greedy(model, turn, 12)


def with_lora(model: torch.nn.Module, seed: int) -> peft.PeftModel:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.5)
    wrapped = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    randomise(wrapped, seed)
    return wrapped


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_adapters_are_sampled_live(family: str) -> None:
    base_reply = greedy(tiny(family), prompt(0, 12), 12)
    policy = with_lora(tiny(family), 1)
    policy.train()
    frozen = {name: p.clone() for name, p in policy.named_parameters()}
    engine = LocalEngine(policy)
    first = engine.generate([request(0, prompt(0, 12))])[0].token_ids.tolist()
    randomise(policy, 2)
    engine.load(policy)
    second = engine.generate([request(0, prompt(0, 12))])[0].token_ids.tolist()
    assert policy.training
    assert all(module.training for module in policy.modules())
    policy.eval()
    assert second == greedy(policy, prompt(0, 12), 12)
    randomise(policy, 1)
    assert first == greedy(policy, prompt(0, 12), 12)
    assert len({tuple(base_reply), tuple(first), tuple(second)}) == 3
    assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters())
    with policy.disable_adapter():
        engine.load(policy)
        assert engine.generate([request(0, prompt(0, 12))])[0].token_ids.tolist() == base_reply


def test_full_weights_are_taken_by_load_and_shared_where_nothing_is_fused() -> None:
    model = tiny()
    engine = LocalEngine(model)
    before = run(engine, request(0, prompt(0, 12))).token_ids.tolist()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    engine.load(model)
    after = run(engine, request(1, prompt(0, 12))).token_ids.tolist()
    assert after == greedy(model, prompt(0, 12), 12) != before


@torch.no_grad()
def test_logprobs_are_those_of_the_model() -> None:
    model = tiny()
    sampling = Sampling(temperature=0.7, max_new_tokens=10)
    ids = varied_prompts()[0]
    completion = LocalEngine(model).generate([request(0, ids, sampling)])[0]
    logits = model(torch.tensor(joined(ids, completion.token_ids))[None]).logits[0, len(ids) - 1 : -1]
    expected = (logits / 0.7).log_softmax(-1)[torch.arange(10), torch.tensor(completion.token_ids)]
    np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=1e-4)
    assert not completion.kept_logmass.any()


def test_a_request_draws_the_same_in_any_company() -> None:
    engine = LocalEngine(tiny())
    sampling = Sampling(max_new_tokens=8)
    mixed = [sampling, sampling.model_copy(update={"top_k": 5}), GREEDY, sampling.model_copy(update={"top_p": 0.6})]
    requests = [request(i, ids, mixed[i % 4]) for i, ids in enumerate(varied_prompts())]
    together = engine.generate(requests)
    for one, completion in zip(requests, together, strict=True):
        alone = engine.generate([one])[0]
        assert alone.token_ids.tolist() == completion.token_ids.tolist()
    same_prompt = [request(i, varied_prompts()[0], sampling) for i in range(6)]
    assert len({tuple(c.token_ids) for c in engine.generate(same_prompt)}) > 1


class Letters:
    """A tokenizer with one letter a token."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(chr(0x4E00 + int(i)) for i in ids)


def test_why_replies_end() -> None:
    model = tiny()
    ids = prompt(0, 12)
    reply = greedy(model, ids, 12)
    fourth = reply.index(reply[3])
    engine = LocalEngine(model, Letters())

    def stopped(**changes: object) -> Completion:
        return engine.generate([request(0, ids, GREEDY.model_copy(update=changes))])[0]

    by_token = stopped(stop_token_ids=(reply[3],))
    assert by_token.token_ids.tolist() == reply[: fourth + 1]
    assert by_token.stop_reason is StopReason.STOP
    by_text = stopped(stop=("never", Letters().decode(reply[4:7])))
    assert by_text.token_ids.tolist() == reply[:7]
    assert by_text.stop_reason is StopReason.STOP
    assert stopped().stop_reason is StopReason.LENGTH
    model.generation_config.eos_token_id = [1, reply[3]]
    engine = LocalEngine(model, Letters())
    ended = stopped(stop_token_ids=(reply[3],))
    assert ended.stop_reason is StopReason.EOS
    assert ended.token_ids.tolist() == reply[: fourth + 1]
    assert stopped(ignore_eos=True).token_ids.tolist() == reply


def test_a_full_context_ends_the_reply() -> None:
    engine = LocalEngine(tiny(max_position_embeddings=20))
    completion = engine.generate([request(0, prompt(0, 15))])[0]
    assert completion.token_ids.size == 5
    assert completion.stop_reason is StopReason.CONTEXT
    with pytest.raises(BudgetError, match=r"20 tokens .* context of 20"):
        engine.submit(request(1, prompt(0, 20)))


def test_long_replies_outgrow_the_reserved_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapwood.engines.local._ROOM", 3)
    model = tiny()
    ours = LocalEngine(model).generate([request(i, prompt(i, 5 + i), GREEDY) for i in range(3)])
    for i, completion in enumerate(ours):
        assert completion.token_ids.tolist() == greedy(model, prompt(i, 5 + i), 12)


def test_what_is_refused() -> None:
    engine = LocalEngine(tiny())
    with pytest.raises(EngineError, match="an empty prompt"):
        engine.submit(request(0, np.empty(0, np.int64)))
    with pytest.raises(EngineError, match=r"0\.\.96"):
        engine.submit(request(0, np.array([3, VOCAB])))
    with pytest.raises(EngineError, match="need a tokenizer"):
        engine.submit(request(0, prompt(0, 3), GREEDY.model_copy(update={"stop": ("x",)})))
    engine.submit(request(0, prompt(0, 3)))
    with pytest.raises(EngineError, match="id 0 is taken"):
        engine.submit(request(0, prompt(0, 3)))
    engine.step()
    with pytest.raises(EngineError, match=r"load\(\) while 1 requests"):
        engine.load(tiny())
    with pytest.raises(EngineError, match="Gemma2ForCausalLM"):
        LocalEngine(tiny("gemma2"), options=LocalOptions(runtime="lean"))
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(EngineError, match=r"dynamic rotary embedding .*; choose another model"):
        LocalEngine(tiny(rope_parameters=dynamic))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_contract(family: str) -> None:
    model = tiny(family)
    check_engine(LocalEngine(model, options=LocalOptions(max_batch=3)), VOCAB, policy=model)


def test_bfloat16_stays_close() -> None:
    model = tiny().to(torch.bfloat16)
    exact = LocalEngine(tiny()).generate([request(0, prompt(0, 12))])[0]
    rough = LocalEngine(model).generate([request(0, prompt(0, 12))])[0]
    # The first log-probability doesn't depend on earlier choices.
    assert abs(float(exact.logprobs[0] - rough.logprobs[0])) < 0.3


def test_an_exception_leaves_an_engine_that_samples_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    engine = LocalEngine(model, options=LocalOptions(max_batch=3))
    requests = [request(i, ids) for i, ids in enumerate(varied_prompts())]
    expected = engine.generate(requests)
    for place in ("_prefill", "_decode"):  # with rows that are in neither queue, and with running ones
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                raise MemoryError

            patch.setattr(engine, place, fail)
            for one in requests:
                engine.submit(one)
            with pytest.raises(MemoryError):
                engine.step()
        assert engine.kept_tokens == 0
        assert engine.step() == []
        engine.load(model)
        again = engine.generate(requests)
        assert [c.token_ids.tolist() for c in again] == [c.token_ids.tolist() for c in expected]


def test_shrinking_halves_what_was_in_use_until_one_row_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(tiny(), options=LocalOptions(max_batch=64, prefill_chunk=256))
    requests = [request(i, prompt(i, 10)) for i in range(6)]

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_decode", fail)
        for one in requests:
            engine.submit(one)
        with pytest.raises(MemoryError):
            engine.step()
    assert engine.shrink()
    # 6 rows ran, with 10 prompt tokens each: in the trie, and in a copy of each row's own.
    assert (engine.options.max_batch, engine.options.prefill_chunk) == (3, 128)
    assert engine.options.kv_budget_tokens == 60
    assert len(engine.generate(requests)) == 6
    resumed = LocalEngine(tiny(), options=LocalOptions(max_batch=64, prefill_chunk=256))
    resumed.load_state(engine.state())
    assert resumed.options == engine.options
    other = LocalEngine(tiny(), options=LocalOptions(max_batch=32, prefill_chunk=256))
    other.load_state(engine.state())
    assert (other.options.max_batch, other.state()) == (32, {})
    assert [engine.shrink() for _ in range(2)] == [True, False]
    assert (engine.options.max_batch, engine.options.prefill_chunk) == (1, 64)
    assert len(engine.generate(requests)) == 6
