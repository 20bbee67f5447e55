"""Stage 3: what a language model says is recorded as it was sampled, and its further replies are tried on copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from sapwood.chat import Chat
from sapwood.envs.hvac.text import Hvac
from sapwood.errors import BudgetError, ConfigError
from sapwood.models.load import Policy
from sapwood.pipeline import rollout, trajectories
from sapwood.pipeline.rollout import Played, RolloutOptions, record
from sapwood.sections import ModelSection
from tests.chats import tokenizer
from tests.pipeline.playing import Player, policy_of, save_model, silent

FAMILY = Hvac(horizon=3, few_shot=1, history=3, start="random", control="uniform")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return policy_of(save_model(tmp_path_factory.mktemp("tiny")))


def played(
    policy: Policy, folder: Path, engine: Player, family: Hvac = FAMILY, seed: int = 0, **options: Any
) -> Played:
    made = RolloutOptions(**{"episodes": 2, "temperature": 0.7, **options})
    tasks = family.tasks("train", made.episodes, seed)
    return record(made, family, tasks, policy, Chat(tokenizer()), engine, seed, silent(), folder / "x.json")


def three(member: int, prompt: str) -> str:
    return ['{"power": 0.5}', "[-0.25]", "I don't know"][member]


# --- what is recorded -------------------------------------------------------------------------------------------


def test_the_first_reply_acts_and_the_others_are_tried_on_copies(policy, tmp_path) -> None:
    found = played(policy, tmp_path, Player(three), replies_per_state=3)
    task = FAMILY.tasks("train", 2, 0)[0]
    twin = FAMILY.simulator()
    observation = FAMILY.reset_simulator(twin, task)
    for step in found.episodes[0].steps:
        assert step.observation == pytest.approx(observation.tolist(), abs=1e-5)
        assert (step.action, step.parsed, step.fallback) == ((0.5,), "json", False)
        second, third = step.others
        assert (second.action, second.parsed, second.fallback) == ((-0.25,), "list", False)
        assert (third.action, third.parsed, third.fallback) == ((0.0,), "failed", True)
        start = twin.temperatures
        for said in (second, third, step):
            # Every reply meets the same state: the simulator is put back between them.
            other = FAMILY.simulator()
            hour = (task.metadata["hour"] + step.step) % 24
            day = task.metadata["day"] + (task.metadata["hour"] + step.step) // 24
            other.reset(options={"day": day, "hour": hour, "initial_temperature": start})
            _, reward, _, _, info = other.step(np.array(said.action, np.float32))
            assert said.reward == pytest.approx(reward, abs=1e-9)
            assert said.energy == pytest.approx(info["energy"])
            assert said.comfort == pytest.approx(info["comfort"])
        observation = twin.step(np.array([0.5], np.float32))[0]
    assert found.episodes[0].total == pytest.approx(sum(s.reward for s in found.episodes[0].steps))


def test_further_replies_are_tried_in_energyplus_too(policy, tmp_path) -> None:
    pytest.importorskip("pyenergyplus")
    family = FAMILY.model_copy(update={"backend": "energyplus", "horizon": 2, "train_horizon": None})
    found = played(policy, tmp_path, Player(three), family=family, episodes=1, replies_per_state=2)
    first, second = found.episodes[0].steps
    assert [len(step.others) for step in (first, second)] == [1, 1]
    # what was only tried left the episode as it was: alone, the same actions lead to the same
    alone = played(policy, tmp_path / "alone", Player(three), family=family, episodes=1)
    assert [step.reward for step in alone.episodes[0].steps] == [first.reward, second.reward]
    assert first.others[0].reward != first.reward


def test_tokens_and_prompts_are_kept_as_they_were_sampled(policy, tmp_path) -> None:
    engine = Player(lambda member, prompt: '{"power": 0.25}')
    found = played(policy, tmp_path, engine)
    chat = Chat(tokenizer())
    [trunk] = found.prompts.values()  # one for all states
    assert [message.role for message in trunk] == ["system", "user", "assistant"]
    asked = {tuple(request.token_ids.tolist()) for request in engine.requests}
    for episode in found.episodes:
        for step in episode.steps:
            assert step.prompt in found.prompts
            assert step.state is not None
            prompt = chat.start((*trunk, trajectories.Message("user", step.state)))
            assert tuple(prompt.tolist()) in asked
            assert chat.decode(np.array(step.token_ids)) == step.reply
            assert step.sampled_logprobs == (-1.0,) * len(step.token_ids)
            assert step.kept_logmass == (0.0,) * len(step.token_ids)
    assert "0.25" not in (found.episodes[0].steps[0].state or "")
    assert (found.episodes[0].steps[2].state or "").count("0.25 (") == 2  # both past actions with their rewards


def test_every_episode_has_its_own_temperature(policy, tmp_path) -> None:
    engine = Player(lambda member, prompt: "0.1")
    found = played(policy, tmp_path, engine, temperature=(0.3, 0.7), episodes=6)
    drawn = [episode.steps[0].temperature for episode in found.episodes]
    assert len(set(drawn)) == 6
    assert all(t is not None and 0.3 <= t <= 0.7 for t in drawn)
    assert all(step.temperature == episode.steps[0].temperature for episode in found.episodes for step in episode.steps)
    asked = {request.id: request.sampling.temperature for request in engine.requests}
    assert [asked[i] for i in range(6)] == drawn
    assert RolloutOptions(episodes=6).temperatures(0) == drawn
    assert RolloutOptions(episodes=6).temperatures(1) != drawn
    assert RolloutOptions(episodes=2, temperature=0.5).temperatures(0) == [0.5, 0.5]


def test_seeds_follow_the_episode_and_the_reply_not_the_batch(policy, tmp_path) -> None:
    def seeds(**options: Any) -> dict[tuple[str, int], int]:
        engine = Player(three)
        played(policy, tmp_path / str(options), engine, episodes=4, replies_per_state=2, **options)
        turns: dict[str, int] = {}
        found = {}
        for request in engine.requests:
            turns[request.episode] = turns.get(request.episode, -1) + 1
            found[request.episode, turns[request.episode]] = request.seed
        return found

    one, other = seeds(at_once=4), seeds(at_once=1)
    assert one == other
    assert len(set(one.values())) == len(one) == 4 * 3 * 2


# --- going on ---------------------------------------------------------------------------------------------------


def test_a_killed_rollout_goes_on_with_what_is_missing(policy, tmp_path) -> None:
    options = {"episodes": 6, "at_once": 2, "replies_per_state": 2}
    whole = played(policy, tmp_path / "whole", Player(three), **options)
    # 2 episodes x 3 states x 2 replies are a chunk of 12 requests: the third chunk is never finished.
    with pytest.raises(KeyboardInterrupt):
        played(policy, tmp_path / "killed", Player(three, limit=30), **options)
    rest = Player(three)
    again = played(policy, tmp_path / "killed", rest, **options)
    assert len(rest.requests) == 12
    assert again == whole


def test_a_torn_last_line_is_played_again(policy, tmp_path) -> None:
    options = {"episodes": 4, "at_once": 1}
    with pytest.raises(KeyboardInterrupt):
        played(policy, tmp_path, Player(three, limit=8), **options)
    [part] = tmp_path.glob("*.part")
    part.write_bytes(part.read_bytes()[:-20])
    rest = Player(three)
    assert len(played(policy, tmp_path, rest, **options).episodes) == 4
    assert len(rest.requests) == 9


def test_other_options_begin_anew_and_leave_what_was_played(policy, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        played(policy, tmp_path, Player(three, limit=8), episodes=4, at_once=1)
    engine = Player(three)
    played(policy, tmp_path, engine, episodes=4, at_once=1, temperature=0.3)
    assert len(engine.requests) == 12
    assert len(list(tmp_path.glob("*.part"))) == 1


# --- the stage --------------------------------------------------------------------------------------------------


def test_a_real_model_plays(tmp_path) -> None:
    model = save_model(tmp_path / "tiny")
    family = FAMILY.model_copy(update={"few_shot": 0, "horizon": 2})
    options = RolloutOptions(episodes=2, replies_per_state=2, max_new_tokens=4, top_k=20, at_once=1)
    section = ModelSection(name=str(model), lora=None)
    result = rollout.run(options, family, section, tmp_path / "one", silent(), 3)
    file = trajectories.read(result.path)
    assert (file.controller, file.seed, result.decisions) == ("llm", 3, 4)
    assert file.world == json.loads(json.dumps(trajectories.world_of(family)))
    assert trajectories.check_world(file, family) == {}
    assert file.model is not None
    assert file.model["adapter"] is None
    assert file.model["sampling"]["top_k"] == 20
    said = [reply for _, step in file.steps for reply in (step, *step.others)]
    assert result.tokens == sum(len(reply.token_ids) for reply in said) == 8 * 4
    assert all(mass < 0 for reply in said for mass in reply.kept_logmass)  # 20 of 320 tokens
    assert result.forms == {"failed": 8}
    assert result.parsed == 0.0
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["llm_rollout.json"]
    again = rollout.run(options, family, section, tmp_path / "two", silent(), 3)
    assert again.path.read_bytes() == result.path.read_bytes()


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": (0.7, 0.3)}, "rollout.temperature is 0.7 to 0.3: give the lower one first"),
        ({"temperature": 0, "replies_per_state": 2}, "at temperature 0 they are all the same"),
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"top_p": 0}, "greater than 0"),
        ({"histroy": 3}, "Extra inputs are not permitted"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        RolloutOptions(**options)


@pytest.mark.parametrize(
    ("world", "options", "sentence"),
    [
        ({"memory": "chat"}, {}, r"env\.memory is chat: .* set env\.memory=state"),
    ],
)
def test_worlds_that_cannot_be_recorded(tmp_path, world, options, sentence) -> None:
    family = FAMILY.model_copy(update=world)
    with pytest.raises(ConfigError, match=sentence):
        rollout.run(RolloutOptions(**options), family, ModelSection(name="nowhere"), tmp_path, silent(), 0)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_leaves_no_room_is_told(policy, tmp_path) -> None:
    with pytest.raises(
        BudgetError, match=r"exceeds the model's context of 4096; lower env\.few_shot, or rollout\.max_"
    ):
        played(policy, tmp_path, Player(three), max_new_tokens=4000)
