"""Reward models and critics as others open them: transformers' and PEFT's own classes give our scores."""

from __future__ import annotations

import json

import pytest
import torch

from sapwood import checkpoint
from sapwood.errors import ModelError
from sapwood.models.export import export
from sapwood.models.load import find_adapter, load_policy, scalar_head, set_pad_token
from sapwood.models.roles import Models, build_critic
from sapwood.ops.batch import Needs
from sapwood.sections import CriticSection, LoraSection, ModelSection
from tests.conftest import make_row, random_rows
from tests.learning import save_tiny_model
from tests.models.test_roles import stir

SCORES = Needs(logprobs=False, scores=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def reward_model(model_dir, lora: bool) -> Models:
    section = ModelSection(name=str(model_dir), lora=LoraSection(rank=4) if lora else None)
    models = Models(load_policy(section, seed=2, head="scalar"), SCORES)
    for i, group in enumerate(models.parameter_groups().values()):
        stir(group, seed=i, std=0.1)
    return models


def ending_rows(tokenizer):
    """Rows of several lengths, one of which ends with the end token."""
    rows = random_rows(8, 1)[:4]
    return [*rows, make_row([4, 9, 11, tokenizer.eos_token_id], [3])]


def scores_of(models: Models, rows) -> torch.Tensor:
    with torch.no_grad():
        scores = models.forward(rows, SCORES).scores
    assert scores is not None
    return scores


def padded_scores(model, tokenizer, rows, side: str) -> torch.Tensor:
    tokenizer.padding_side = side
    batch = tokenizer.pad({"input_ids": [row.token_ids.tolist() for row in rows]}, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0].float()


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_others_get_our_scores_from_padded_batches(model_dir, tmp_path, lora, side):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    models = reward_model(model_dir, lora)
    folder = checkpoint.save(models, tmp_path, 1, 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = ending_rows(tokenizer)
    wanted = scores_of(models, rows)
    if lora:
        theirs = AutoPeftModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, pad_token_id=tokenizer.pad_token_id
        )
    else:
        theirs = AutoModelForSequenceClassification.from_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["problem_type"] == "regression"
    assert theirs.config.num_labels == 1
    torch.testing.assert_close(padded_scores(theirs, tokenizer, rows, side), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [True, False])
def test_an_exported_reward_model_is_a_plain_folder(model_dir, tmp_path, lora):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    models = reward_model(model_dir, lora)
    checkpoint.save(models, tmp_path / "run", 1, 1)
    out = export(tmp_path / "run", tmp_path / "out")
    assert not (out / "adapter_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = ending_rows(tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(out)
    torch.testing.assert_close(
        padded_scores(theirs, tokenizer, rows, "right"), scores_of(models, rows), rtol=1e-4, atol=1e-4
    )


def test_an_exported_policy_is_a_plain_folder(model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    models = Models(load_policy(ModelSection(name=str(model_dir), lora=LoraSection(rank=4))))
    stir(models.policy.parameters())
    checkpoint.save(models, tmp_path / "run", 1, 1)
    out = export(tmp_path / "run", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        wanted = models.policy.model.eval()(ids).logits
        torch.testing.assert_close(theirs(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    with pytest.raises(ModelError, match="is not empty"):
        export(tmp_path / "run", tmp_path / "out")


def test_a_reward_model_continues_where_it_was(model_dir, tmp_path):
    rows = random_rows(3, 1)[:4]
    for lora in (True, False):
        models = reward_model(model_dir, lora)
        checkpoint.save(models, tmp_path / str(lora), 1, 1)
        section = ModelSection(
            name=str(model_dir), init_from=tmp_path / str(lora), lora=LoraSection(rank=4) if lora else None
        )
        again = load_policy(section, seed=99, head="scalar")
        assert again.trained_head
        torch.testing.assert_close(scores_of(Models(again, SCORES), rows), scores_of(models, rows))
        with pytest.raises(ModelError, match=r"adapter of a reward model|is a sequence classifier"):
            load_policy(section)


def test_a_reward_model_starts_from_a_policys_adapter(model_dir, tmp_path):
    section = ModelSection(name=str(model_dir), lora=LoraSection(rank=4))
    policy = load_policy(section)
    stir(policy.parameters())
    checkpoint.save(policy, tmp_path, 1, 1)
    reward = load_policy(section.model_copy(update={"init_from": tmp_path}), seed=5, head="scalar")
    assert not reward.trained_head
    for a, b in zip(policy.parameters(), reward.trunk_parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_critic_is_saved_beside_its_policy(model_dir, tmp_path, kind):
    from peft import AutoPeftModelForSequenceClassification

    section = ModelSection(name=str(model_dir), lora=LoraSection(rank=4))
    needs = Needs(values=True)
    policy = load_policy(section)
    models = Models(policy, needs, critic=build_critic(policy, CriticSection.model_validate({"kind": kind}), section))
    for i, group in enumerate(models.parameter_groups().values()):
        stir(group, seed=i)
    folder = checkpoint.save(models, tmp_path, 1, 1).parent
    assert sorted(p.name for p in folder.iterdir()) == ["critic", "manifest.json", "policy"]
    assert find_adapter(tmp_path, "critic") == folder / "critic"
    rows = random_rows(3, 1)[:4]
    models.score([rows], needs)
    again = build_critic(
        load_policy(section), CriticSection.model_validate({"kind": kind, "init_from": tmp_path}), section
    )
    restored = Models(load_policy(section), needs, critic=again)
    wanted = [(row.values.tolist(), row.bootstrap) for row in rows if row.values is not None]
    restored.score([rows], needs)
    assert [(row.values.tolist(), row.bootstrap) for row in rows if row.values is not None] == wanted
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(folder / "critic", num_labels=1)
    with torch.no_grad():
        value = theirs(torch.from_numpy(rows[0].token_ids)[None]).logits.item()
    assert value == pytest.approx(rows[0].bootstrap, rel=1e-4, abs=1e-5)


def test_a_head_is_saved_by_itself(model_dir, tmp_path):
    from safetensors.torch import load_file

    section = ModelSection(name=str(model_dir))
    policy = load_policy(section)
    models = Models(policy, Needs(values=True), critic=build_critic(policy, CriticSection(kind="head"), section))
    stir(models.parameter_groups()["critic_head"])
    folder = checkpoint.save(models, tmp_path, 1, 1).parent / "critic"
    [parameter] = models.parameter_groups()["critic_head"]
    assert torch.equal(load_file(folder / "head.safetensors")["score.weight"], parameter)


def test_a_critic_starts_from_a_reward_model(model_dir, tmp_path):
    models = reward_model(model_dir, lora=True)
    checkpoint.save(models, tmp_path, 1, 1)
    section = ModelSection(name=str(model_dir), lora=LoraSection(rank=8))
    policy = load_policy(section)
    critic = build_critic(policy, CriticSection(init_from=tmp_path), section)
    assert critic.kind == "adapter"
    assert torch.equal(next(critic.head.parameters()), next(scalar_head(models.policy.model).parameters()))
    rows = random_rows(3, 1)[:4]
    both = Models(policy, Needs(values=True), critic=critic)
    both.score([rows], Needs(values=True))
    wanted = scores_of(models, rows)
    torch.testing.assert_close(torch.tensor([row.bootstrap for row in rows]), wanted, rtol=1e-4, atol=1e-5)


def test_the_pad_token_ends_no_row(model_dir):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(model_dir), AutoConfig.from_pretrained(model_dir)
    assert config.pad_token_id == config.eos_token_id
    set_pad_token(tokenizer, config)
    # The only special tokens that the chat template doesn't write are Llama's.
    assert tokenizer.pad_token == "<|begin_of_text|>"
    assert config.pad_token_id == tokenizer.pad_token_id
