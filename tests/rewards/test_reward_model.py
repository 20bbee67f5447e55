"""A reward model as a reward: on the policy's base or its own, whole conversations, another tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.chats import CHATML, LLAMA, metaspace_tokenizer, tokenizer
from tests.learning import save_tiny_model

from sapwood import checkpoint, plugins
from sapwood.chat import Chat
from sapwood.errors import DataError, ModelError
from sapwood.models.adapters import named_adapter
from sapwood.models.load import load_policy
from sapwood.models.roles import Models, build_critic
from sapwood.models.scorer import load_scorer
from sapwood.ops.batch import Needs
from sapwood.rewards.reward_model import RewardModel
from sapwood.sections import CriticSection, LoraSection, ModelSection
from sapwood.types import Group, Message, StopReason, Task, Trajectory, Turn

NO_FLOATS = np.zeros(0, np.float32)
PROMPT = (Message("user", "you are in a room"),)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def save_reward_model(model_dir, folder, lora=True):
    section = ModelSection(name=str(model_dir), lora=LoraSection(rank=4) if lora else None)
    policy = load_policy(section, seed=2, head="scalar")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    checkpoint.save(policy, folder, 1, 1)
    return folder


@pytest.fixture(scope="module")
def reward_dir(model_dir, tmp_path_factory):
    return save_reward_model(model_dir, tmp_path_factory.mktemp("reward"))


def turn(prompt, reply, **options) -> Turn:
    ids = np.array(reply, np.int64)
    return Turn(np.array(prompt, np.int64), ids, NO_FLOATS, NO_FLOATS, StopReason.EOS, "lamp", **options)


def groups() -> list[Group]:
    task = Task("a", PROMPT)
    one = Trajectory(task, [turn([5, 6, 7], [8, 9, 2]), turn([10, 11], [12, 2])])
    two = Trajectory(task, [turn([5, 6, 7], [13, 2])])
    broken = Trajectory(task, [turn([5, 6, 7], [8, 9, 2]), turn([20, 21], [22, 2], restart=True)])
    return [Group(task, [one, two]), Group(task, [broken, Trajectory(task)])]


def classifier_score(folder, ids) -> float:
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    policy = checkpoint_folder(folder)
    # The tiny base's own pad token is its end token: transformers would then read the score one token early.
    pad = AutoTokenizer.from_pretrained(policy).pad_token_id
    model = AutoPeftModelForSequenceClassification.from_pretrained(policy, num_labels=1, pad_token_id=pad).eval()
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def checkpoint_folder(folder):
    return folder / "checkpoints" / "step_000001" / "policy"


def test_it_scores_whole_conversations(reward_dir):
    assert plugins.load("reward", "reward_model") is RewardModel
    parts = RewardModel(path=str(reward_dir)).score(groups())
    long, short = (
        classifier_score(reward_dir, [5, 6, 7, 8, 9, 2, 10, 11, 12, 2]),
        classifier_score(reward_dir, [5, 6, 7, 13, 2]),
    )
    first, second = classifier_score(reward_dir, [5, 6, 7, 8, 9, 2]), classifier_score(reward_dir, [20, 21, 22, 2])
    wanted = [[long, short], [(first + second) / 2, 0.0]]
    for group, expected in zip(parts, wanted, strict=True):
        assert [p["reward_model"] for p in group] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_it_shares_the_policys_base(model_dir, reward_dir):
    section = ModelSection(name=str(model_dir), lora=LoraSection(rank=8))
    policy = load_policy(section)
    models = Models(policy, Needs(values=True), critic=build_critic(policy, CriticSection(), section))
    before = {name: list(group) for name, group in models.parameter_groups().items()}
    models.train()
    shared, again = RewardModel(path=str(reward_dir)), RewardModel(path=str(reward_dir))
    shared.bind(models)
    again.bind(models)
    assert list(policy.model.peft_config) == ["default", "critic", "reward", "reward2"]
    assert shared.score(groups()) == again.score(groups())
    alone = RewardModel(path=str(reward_dir)).score(groups())
    for mine, theirs in zip(shared.score(groups()), alone, strict=True):
        assert [p["reward_model"] for p in mine] == pytest.approx([p["reward_model"] for p in theirs], rel=1e-4)
    assert policy.model.training
    assert not any(p.requires_grad for p in named_adapter(policy.model, "reward").values())
    after = models.parameter_groups()
    for name, group in before.items():
        assert [id(p) for p in group] == [id(p) for p in after[name]]
        assert all(p.requires_grad for p in group)


def test_a_base_of_its_own(model_dir, reward_dir, tmp_path):
    policy = load_policy(ModelSection(name=str(model_dir)))
    own = load_scorer(reward_dir, policy, dtype="float32")
    assert own.policy.model is not policy.model
    assert list(policy.model.peft_config) == ["default"]
    full = load_policy(ModelSection(name=str(model_dir), lora=None))
    assert load_scorer(reward_dir, full).policy.model is not full.model  # that base moves
    whole = load_scorer(save_reward_model(model_dir, tmp_path, lora=False), policy)
    assert not whole.policy.has_lora
    assert not any(p.requires_grad for p in whole.policy.model.parameters())


def test_shaping(reward_dir):
    [[first, second], _] = RewardModel(path=str(reward_dir)).score(groups())
    a, b = first["reward_model"], second["reward_model"]
    shaped = RewardModel(path=str(reward_dir), center=a, scale=2.0).score(groups())[0]
    assert [p["reward_model"] for p in shaped] == pytest.approx([0.0, 2 * (b - a)], abs=1e-5)
    [[low, high], _] = RewardModel(path=str(reward_dir), scale=1e6, clip=0.5).score(groups())
    assert {abs(low["reward_model"]), abs(high["reward_model"])} == {0.5}


def test_small_budgets_and_long_rows_change_nothing(reward_dir):
    wanted = RewardModel(path=str(reward_dir)).score(groups())
    small = RewardModel(path=str(reward_dir), token_budget=2).score(groups())
    for one, other in zip(wanted, small, strict=True):
        assert [p["reward_model"] for p in one] == pytest.approx([p["reward_model"] for p in other], rel=1e-4)


def test_another_tokenizer(model_dir, tmp_path):
    foreign = save_tiny_model(tmp_path / "foreign", seed=3)
    metaspace_tokenizer(LLAMA).save_pretrained(foreign)
    reward = save_reward_model(foreign, tmp_path / "reward")
    models = Models(load_policy(ModelSection(name=str(model_dir))))
    with pytest.raises(ModelError, match=r"another tokenizer than the policy .*retokenize: true"):
        RewardModel(path=str(reward)).bind(models)
    retokenized = RewardModel(path=str(reward), retokenize=True)
    retokenized.bind(models)
    policy_chat, its_chat = Chat(tokenizer(CHATML)), Chat(metaspace_tokenizer(LLAMA))
    task = Task("a", PROMPT)
    prompt, reply = policy_chat.start(PROMPT), policy_chat.reply("the lamp")
    said = Turn(prompt, reply, NO_FLOATS, NO_FLOATS, StopReason.EOS, "the lamp")
    [[part]] = retokenized.score([Group(task, [Trajectory(task, [said])])])
    ids = [*its_chat.start(PROMPT).tolist(), *its_chat.reply("the lamp").tolist()]
    assert part["reward_model"] == pytest.approx(classifier_score(reward, ids), rel=1e-4, abs=1e-5)
    with pytest.raises(DataError, match=r"task 'a' has 2 turns"):
        retokenized.score([Group(task, [Trajectory(task, [said, said])])])
    unwritten = Task("b")
    with pytest.raises(DataError, match="a prompt that its environment wrote"):
        retokenized.score([Group(unwritten, [Trajectory(unwritten, [said])])])


def test_what_is_no_reward_model(model_dir, tmp_path):
    policy = load_policy(ModelSection(name=str(model_dir)))
    checkpoint.save(policy, tmp_path, 1, 1)
    for path in (model_dir, tmp_path):
        with pytest.raises(ModelError, match="no trained scalar head, so it is no reward model"):
            load_scorer(path)
    with pytest.raises(ModelError, match="no trained scalar head"):
        load_scorer(tmp_path, policy)
