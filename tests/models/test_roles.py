"""Several roles on one base: each forward under its own adapter, one backward over all, heads once per node."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sapwood import checkpoint
from sapwood.errors import ModelError
from sapwood.models.adapters import POLICY, add_adapter, lora_config, named_adapter
from sapwood.models.critic import CRITIC
from sapwood.models.forward import Batch, Hidden, causal_lm, uses_tree
from sapwood.models.load import load_policy, scalar_head
from sapwood.models.role import BASE, role
from sapwood.models.roles import REFERENCE, Models, build_critic
from sapwood.ops.batch import Needs
from sapwood.sections import CriticSection, LoraSection, ModelSection
from tests.conftest import make_row, random_rows
from tests.learning import save_tiny_model

PPO = Needs(old_logprobs=True, reference_logprobs=True, values=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def stir(parameters, seed: int = 0, std: float = 0.2) -> None:
    """Move weights away from where they start, the same way every time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def ppo_models(model_dir, kind="adapter", critic=None, **options) -> Models:
    section = ModelSection(name=str(model_dir), **{"lora": LoraSection(rank=4), **options})
    policy = load_policy(section, seed=1)
    models = Models(
        policy,
        PPO,
        critic=build_critic(policy, critic or CriticSection.model_validate({"kind": kind}), section, seed=1),
    )
    for i, group in enumerate(models.parameter_groups().values()):
        stir(group, seed=i)
    return models


def loss_of(models: Models, rows) -> torch.Tensor:
    forward = models.forward(rows, PPO)
    assert forward.values is not None
    weight = torch.linspace(-1, 1, len(forward.logprobs))
    return (forward.logprobs * weight).sum() + (forward.values**2).sum()


def gradients(models: Models, rows) -> dict[str, list[torch.Tensor]]:
    groups = models.parameter_groups()
    for group in groups.values():
        for parameter in group:
            parameter.grad = None
    loss_of(models, rows).backward()
    return {name: [p.grad for p in group if p.grad is not None] for name, group in groups.items()}


@pytest.mark.parametrize("kind", ["adapter", "head", "model"])
def test_one_backward_over_policy_and_critic_with_checkpointing(model_dir, kind):
    rows = random_rows(3, 2)[:6]
    plain = ppo_models(model_dir, kind)
    recomputed = ppo_models(model_dir, kind, gradient_checkpointing=True)
    plain.train()
    recomputed.train()
    ours, theirs = gradients(recomputed, rows), gradients(plain, rows)
    assert set(ours) == {"policy", "critic_head"} | ({"critic"} if kind != "head" else set())
    for name, group in ours.items():
        assert group
        assert all(g.abs().max() > 0 for g in group), name
        for a, b in zip(group, theirs[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_each_role_is_what_it_would_be_alone(model_dir):
    # The oracle: the policy's own gradient and log-probabilities without any other adapter on its base.
    rows = random_rows(4, 2)[:5]
    section = ModelSection(name=str(model_dir), lora=LoraSection(rank=4))
    alone = Models(load_policy(section, seed=1))
    stir(alone.policy.parameters(), seed=0)
    together = ppo_models(model_dir)
    assert together.policy.adapter == POLICY
    assert together.critic is not None
    assert together.critic.policy.model is together.policy.model
    wanted = alone.forward(rows).logprobs
    torch.testing.assert_close(together.forward(rows, PPO).logprobs, wanted, rtol=1e-5, atol=1e-5)
    gradients(together, rows)
    weight = torch.linspace(-1, 1, len(wanted))
    (wanted * weight).sum().backward()
    for a, b in zip(together.policy.parameters(), alone.policy.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_of_every_kind_follow_the_role(model_dir, dropout):
    policy = load_policy(ModelSection(name=str(model_dir), lora=LoraSection(rank=4, dropout=dropout)))
    base = load_policy(ModelSection(name=str(model_dir), lora=None))
    add_adapter(policy.model, "other", lora_config(LoraSection(rank=2, dropout=dropout)), seed=5)
    stir(policy.parameters(), seed=1)
    stir(named_adapter(policy.model, "other").values(), seed=2)
    policy.model.eval()
    batch = Batch.of(random_rows(1, 1)[:3])

    def hidden(adapter):
        with role(adapter), torch.no_grad():
            nodes = Hidden.of(policy.model, batch).nodes
        assert nodes is not None
        return nodes

    own = Hidden.of(policy.model, batch).nodes
    assert own is not None
    assert torch.equal(hidden(None), own.detach())
    assert torch.equal(hidden(POLICY), own.detach())
    assert not torch.allclose(hidden("other"), own, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(hidden(BASE), Hidden.of(base.model, batch).nodes, rtol=1e-5, atol=1e-5)
    assert all(p.requires_grad for p in policy.parameters())


def test_values_and_scores_by_hand(model_dir):
    # Two rows share a trunk: [5, 6, 7] and [5, 6, 8, 9]. The value before a scored token is the head at the token
    # before it; bootstrap is the head at the row's last token.
    rows = [make_row([5, 6, 7], [1, 2]), make_row([5, 6, 8, 9], [3])]
    models = ppo_models(model_dir)
    critic = models.critic
    assert critic is not None
    with torch.no_grad(), role(CRITIC):
        trunk = causal_lm(models.policy.model).base_model
        wanted = [
            critic.head(trunk(input_ids=torch.from_numpy(row.token_ids)[None]).last_hidden_state[0])[:, 0]
            for row in rows
        ]
    models.score([rows], PPO)
    assert rows[0].values is not None
    assert rows[1].values is not None
    np.testing.assert_allclose(rows[0].values, wanted[0][[0, 1]].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows[1].values, wanted[1][[2]].numpy(), rtol=1e-4, atol=1e-5)
    assert [row.bootstrap for row in rows] == pytest.approx([float(w[-1]) for w in wanted], rel=1e-4)
    values = models.forward(rows, PPO).values
    assert values is not None
    packed = [row.values for row in rows if row.values is not None]
    np.testing.assert_allclose(values.detach().numpy(), np.concatenate(packed), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adapter", "head", "model"])
def test_plain_rows_give_the_same(model_dir, kind):
    by_tree, by_rows = ppo_models(model_dir, kind), ppo_models(model_dir, kind, tree=False)
    assert uses_tree(by_tree.policy.model)
    assert not uses_tree(by_rows.policy.model)
    one, other = random_rows(7, 2), random_rows(7, 2)
    by_tree.score([one], PPO)
    by_rows.score([other], PPO)
    for a, b in zip(one, other, strict=True):
        assert a.bootstrap == pytest.approx(b.bootstrap, rel=1e-4, abs=1e-4)
        for name in ("old_logprobs", "reference_logprobs", "values"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-4)
    for name, group in gradients(by_tree, one).items():
        for x, y in zip(group, gradients(by_rows, other)[name], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_a_head_shares_the_trunk_or_leaves_it(model_dir):
    rows = random_rows(2, 1)[:3]
    for detach in (False, True):
        models = ppo_models(model_dir, critic=CriticSection(kind="head", detach=detach))
        values = models.forward(rows, PPO).values
        assert values is not None
        values.sum().backward()
        moved = [p for p in models.policy.parameters() if p.grad is not None and p.grad.abs().max() > 0]
        assert bool(moved) is not detach


def test_the_reference_of_an_adapter_with_a_past(model_dir, tmp_path):
    from sapwood import checkpoint

    first = load_policy(ModelSection(name=str(model_dir), lora=LoraSection(rank=4)))
    stir(first.parameters())
    checkpoint.save(first, tmp_path / "run", 1, 1)
    section = ModelSection(name=str(model_dir), init_from=tmp_path / "run", lora=LoraSection(rank=4))
    models = Models(load_policy(section), PPO, critic=build_critic(first, None, section))
    rows = random_rows(5, 1)[:4]
    assert models.reference is not None
    assert models.reference.adapter == REFERENCE
    before = models.forward(rows).logprobs.detach()
    stir(models.policy.parameters(), seed=9)
    trained = [p.detach().clone() for p in models.policy.parameters()]
    models.score([rows], Needs(old_logprobs=True, reference_logprobs=True))
    reference = np.concatenate([row.reference_logprobs for row in rows if row.reference_logprobs is not None])
    old = np.concatenate([row.old_logprobs for row in rows if row.old_logprobs is not None])
    np.testing.assert_allclose(reference, before.numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(old - reference).max() > 0.01
    assert all(torch.equal(a, b) for a, b in zip(trained, models.policy.parameters(), strict=True))
    assert not any(p.requires_grad for p in named_adapter(models.policy.model, REFERENCE).values())
    assert models.parameter_groups().keys() == {"policy"} | {"critic", "critic_head"}


def test_a_full_model_keeps_a_frozen_copy_and_a_critic_of_its_own(model_dir):
    section = ModelSection(name=str(model_dir), lora=None)
    policy = load_policy(section)
    models = Models(policy, PPO, critic=build_critic(policy, None, section))
    assert models.critic is not None
    assert models.critic.kind == "model"
    rows = random_rows(6, 1)[:3]
    before = models.forward(rows, PPO)
    assert before.values is not None
    assert torch.equal(before.values, torch.zeros(len(before.values)))  # a head at zero
    stir(policy.parameters(), std=0.05)
    models.score([rows], PPO)
    reference = np.concatenate([row.reference_logprobs for row in rows if row.reference_logprobs is not None])
    np.testing.assert_allclose(reference, before.logprobs.detach().numpy(), rtol=1e-4, atol=1e-5)
    policy_parameters = {id(p) for p in models.parameter_groups()["policy"]}
    assert policy_parameters.isdisjoint(id(p) for p in models.parameter_groups()["critic"])


def test_scores_of_a_reward_model(model_dir):
    section = ModelSection(name=str(model_dir), lora=LoraSection(rank=4))
    policy = load_policy(section, seed=2, head="scalar")
    needs = Needs(logprobs=False, scores=True)
    models = Models(policy, needs)
    stir(policy.trunk_parameters())
    rows = random_rows(8, 2)
    forward = models.forward(rows, needs)
    assert forward.logprobs.shape == (0,)
    assert forward.entropies is None
    assert forward.scores is not None
    assert forward.scores.shape == (len(rows),)
    assert forward.scores.dtype == torch.float32
    assert forward.scores[-2] == forward.scores[-3]  # the same row twice
    plain = Models(load_policy(section.model_copy(update={"tree": False}), seed=2, head="scalar"), needs)
    stir(plain.policy.trunk_parameters())
    torch.testing.assert_close(plain.forward(rows, needs).scores, forward.scores, rtol=1e-4, atol=1e-5)
    forward.scores.sum().backward()
    assert set(models.parameter_groups()) == {"policy", "head"}
    assert all(p.grad is not None for group in models.parameter_groups().values() for p in group)
    other = load_policy(section, seed=3, head="scalar")
    assert not torch.equal(next(scalar_head(other.model).parameters()), next(scalar_head(policy.model).parameters()))


def test_needs_that_the_models_cannot_meet(model_dir):
    policy = load_policy(ModelSection(name=str(model_dir)))
    with pytest.raises(ModelError, match="there is no critic"):
        Models(policy, Needs(values=True))
    with pytest.raises(ModelError, match="head='scalar'"):
        Models(policy, Needs(scores=True))
    with pytest.raises(ModelError, match="keep no reference"):
        Models(policy).score([random_rows(0, 0)], Needs(reference_logprobs=True))
    section = ModelSection(name=str(model_dir), lora=None)
    with pytest.raises(ModelError, match=r"critic\.kind: adapter needs a frozen base"):
        build_critic(load_policy(section), CriticSection(kind="adapter"), section)


def test_a_critic_with_another_vocabulary(model_dir, tmp_path):
    from tests.chats import LLAMA, metaspace_tokenizer

    foreign = save_tiny_model(tmp_path / "foreign")
    metaspace_tokenizer(LLAMA).save_pretrained(foreign)
    section = ModelSection(name=str(model_dir))
    with pytest.raises(ModelError, match=r"critic\.name: .*has another vocabulary than the policy \(.* tokens against"):
        build_critic(load_policy(section), CriticSection(name=str(foreign)), section)


@pytest.mark.parametrize(("dtype", "near"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_mixed_precision(model_dir, dtype, near):
    # Products in half precision, weights and gradients in fp32. bfloat16 keeps 8 bits (relative steps of .004, which
    # add up over two layers and both directions), float16 keeps 11.
    rows = random_rows(3, 2)[:6]
    full = ppo_models(model_dir, gradient_checkpointing=True)
    mixed = ppo_models(model_dir, gradient_checkpointing=True)
    mixed.autocast = getattr(torch, dtype)
    mixed.train()
    wanted, got = gradients(full, rows), gradients(mixed, rows)
    for name, group in wanted.items():
        for a, b in zip(group, got[name], strict=True):
            assert b.dtype == torch.float32
            assert (a - b).norm() < near * a.norm() + 1e-4, name
    with torch.no_grad():
        a, b = full.forward(rows, PPO), mixed.forward(rows, PPO)
    assert not torch.equal(a.logprobs, b.logprobs)
    torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0.1, atol=0.1)
    torch.testing.assert_close(a.values, b.values, rtol=0.1, atol=0.1)


def test_half_precision_base_with_full_precision_adapters(model_dir):
    models = ppo_models(model_dir, dtype="float16")
    assert causal_lm(models.policy.model).get_input_embeddings().weight.dtype == torch.float16
    assert all(p.dtype == torch.float32 for group in models.parameter_groups().values() for p in group)
    rows = random_rows(3, 1)[:4]
    full = ppo_models(model_dir)
    torch.testing.assert_close(
        models.forward(rows, PPO).logprobs, full.forward(rows, PPO).logprobs, rtol=0.05, atol=0.05
    )
    assert all(torch.isfinite(g).all() for group in gradients(models, rows).values() for g in group)


def test_copies_of_a_model_keep_their_roles(model_dir):
    models = ppo_models(model_dir)
    twin = copy.deepcopy(models.policy.model)
    batch = Batch.of(random_rows(1, 1)[:3])
    for adapter in (POLICY, CRITIC, BASE):
        with role(adapter), torch.no_grad():
            assert torch.equal(Hidden.of(twin, batch).nodes, Hidden.of(models.policy.model, batch).nodes)  # type: ignore[arg-type]
    assert isinstance(twin, nn.Module)


def test_a_critic_goes_on_on_the_base_that_its_adapter_was_trained_on(model_dir, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=4)
    start = load_policy(ModelSection(name=str(other), lora=LoraSection(rank=3)), head="scalar")
    checkpoint.save(start, tmp_path / "reward", 1, keep=1)
    section = ModelSection(name=str(model_dir), lora=LoraSection(rank=4))
    policy = load_policy(section)
    critic = build_critic(policy, CriticSection(init_from=tmp_path / "reward"), section)
    assert critic.kind == "model"
    assert critic.policy.public_name == str(other)
    with pytest.raises(ModelError, match=r"critic\.lora has no effect"):
        build_critic(policy, CriticSection(init_from=tmp_path / "reward", lora=LoraSection(rank=9)), section)
