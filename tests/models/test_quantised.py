"""Quantised bases: every CPU pass uses the dequantised weights, so a dense model with them is the oracle."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from sapwood.models.adapters import named_adapter
from sapwood.models.forward import causal_lm
from sapwood.models.load import load_policy
from sapwood.models.quantised import dense_weight, is_quantised
from sapwood.models.roles import Models, build_critic
from sapwood.ops.batch import Needs
from sapwood.sections import LoraSection, ModelSection
from tests.conftest import random_rows
from tests.learning import save_tiny_model
from tests.models.test_roles import PPO, gradients, stir

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
KINDS = ("8bit", "4bit")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def ppo(model_dir, quantize="none", **options) -> Models:
    # Not every layer has an adapter: the others are quantised and bare.
    lora = LoraSection(rank=4, target_modules=("q_proj", "down_proj"), dropout=options.pop("dropout", 0.0))
    section = ModelSection.model_validate({"name": str(model_dir), "lora": lora, "quantize": quantize, **options})
    policy = load_policy(section, seed=1)
    models = Models(policy, PPO, critic=build_critic(policy, None, section, seed=1))
    for i, group in enumerate(models.parameter_groups().values()):
        stir(group, seed=i)
    return models


def dense_twin(models: Models, model_dir) -> Models:
    """The same roles on a base in fp32 that has the quantised model's dequantised weights."""
    twin = ppo(model_dir)
    theirs = dict(causal_lm(models.policy.model).named_modules())
    count = 0
    with torch.no_grad():
        for name, module in causal_lm(twin.policy.model).named_modules():
            if isinstance(module, torch.nn.Linear) and name in theirs and is_quantised(theirs[name]):
                module.weight.copy_(dense_weight(theirs[name], torch.float32))
                count += 1
    assert count == 2 * 7
    return twin


@pytest.mark.parametrize("kind", KINDS)
def test_all_roles_equal_the_dequantised_model(model_dir, kind):
    quantised = ppo(model_dir, kind)
    dense = dense_twin(quantised, model_dir)
    one, other = random_rows(3, 2)[:6], random_rows(3, 2)[:6]
    quantised.score([one], PPO)
    dense.score([other], PPO)
    for a, b in zip(one, other, strict=True):
        for name in ("old_logprobs", "reference_logprobs", "values"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-4)
    quantised.train()
    ours, theirs = gradients(quantised, one), gradients(dense, other)
    for name, group in theirs.items():
        assert all(g.abs().max() > 0 for g in ours[name])
        for a, b in zip(ours[name], group, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_modes_and_neighbours_change_nothing(model_dir, kind):
    models = ppo(model_dir, kind)
    rows = random_rows(3, 2)[:6]
    together = models.forward(rows, PPO).logprobs.detach()
    models.train()
    assert torch.equal(models.forward(rows, PPO).logprobs.detach(), together)
    alone = torch.cat([models.forward([row], PPO).logprobs.detach() for row in rows])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_dropout_and_checkpointing_follow_their_role(model_dir, kind):
    rows = random_rows(3, 2)[:6]
    plain, recomputed = (ppo(model_dir, kind, dropout=0.2, gradient_checkpointing=flag) for flag in (False, True))
    plain.eval()
    recomputed.train()
    torch.manual_seed(0)
    found = gradients(recomputed, rows)
    assert all(g.abs().max() > 0 for group in found.values() for g in group)
    recomputed.eval()
    a, b = plain.forward(rows, PPO), recomputed.forward(rows, PPO)
    torch.testing.assert_close(a.logprobs, b.logprobs)
    torch.testing.assert_close(a.values, b.values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lean", [True, False])
def test_the_engine_samples_what_the_trainer_scores(model_dir, kind, lean, monkeypatch, capfd):
    from sapwood.engines import Request, Sampling, local
    from sapwood.rollout import to_rows
    from sapwood.types import Group, Task, Trajectory, Turn

    if not lean:
        monkeypatch.setattr(local, "lean_obstacle", lambda model: "the test asks for the other runtime")
    models = ppo(model_dir, kind)
    policy = models.policy
    engine = local.LocalEngine(policy, policy.tokenizer)
    sampling = Sampling(temperature=1.0, max_new_tokens=6)
    prompts = [np.array([5, 6, 7, 8 + i % 2]) for i in range(4)]
    replies = engine.generate([Request(i, p, sampling, seed=i, episode=str(i)) for i, p in enumerate(prompts)])
    groups = [
        Group(
            Task(str(i)),
            [
                Trajectory(
                    Task(str(i)),
                    [Turn(p, r.token_ids, r.logprobs, r.kept_logmass, r.stop_reason, "")],
                )
            ],
        )
        for i, (p, r) in enumerate(zip(prompts, replies, strict=True))
    ]
    rows = to_rows(groups, 1.0)
    models.score([rows], Needs(old_logprobs=True))
    for row in rows:
        assert row.old_logprobs is not None
        np.testing.assert_allclose(row.sampled_logprobs, row.old_logprobs, rtol=1e-4, atol=1e-4)
    assert "MatMul" not in capfd.readouterr().err


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (48, 96), (128, 64)])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_by_hand(shape, nested):
    # NF4's values lie at most .304 of a block's largest magnitude apart (from -1 to -.696), so no weight is off by more
    # than .152 of it; nested scales add up to about 1 %. Blocks of 64 run on over the ends of rows.
    import bitsandbytes as bnb

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4", compress_statistics=nested)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested)
    layer.weight = layer.weight.to("cpu")
    largest = weight.reshape(-1, 64).abs().amax(1).repeat_interleave(64).reshape(shape)
    assert ((dense_weight(layer, torch.float32) - weight).abs() / largest).max() < 0.165


def test_eight_bits_by_hand(model_dir):
    # 127 steps up to a row's largest magnitude: no weight is off by more than half a step, and what bitsandbytes' cast
    # to float16 before it (11 bits) adds to that: 127 / 2^12 = .03 steps.
    weight = causal_lm(ppo(model_dir).policy.model).model.layers[0].self_attn.k_proj.weight
    layer = causal_lm(ppo(model_dir, "8bit").policy.model).model.layers[0].self_attn.k_proj
    step = weight.abs().amax(1, keepdim=True) / 127
    error = (dense_weight(layer, torch.float32) - weight).abs() / step
    assert 0.3 < error.max() < 0.535


def test_adapters_stay_in_fp32(model_dir):
    models = ppo(model_dir, "4bit")
    assert all(p.dtype == torch.float32 for p in named_adapter(models.policy.model, "default").values())
