"""Parts of the memory against the real parts, on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sapwood import checkpoint
from sapwood.config import Recipe, parse_recipe
from sapwood.engines._runtime import LeanRuntime
from sapwood.engines.local import LocalEngine
from sapwood.models.forward import causal_lm
from sapwood.models.load import load_policy
from sapwood.opening import build_engine
from sapwood.parts import build
from sapwood.plan.making import Survey
from sapwood.plan.memory import FRAGMENTS_OF_CHURN, FRAGMENTS_OF_LIVE, PHASES, Memory, Parameters, Part
from sapwood.plan.meter import held
from sapwood.plan.workload import nodes
from sapwood.progress import Progress
from sapwood.sections import LoraSection, ModelSection
from tests.chats import tokenizer
from tests.learning import save_tiny_model

VOCABULARY = len(tokenizer())
HIDDEN, INNER, LAYERS, KV = 32, 64, 2, 16
#: q and o, k and v, gate, up and down of a layer.
LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * INNER
WEIGHTS = VOCABULARY * HIDDEN + LAYERS * (LAYER + 2 * HIDDEN) + HIDDEN


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def recipe(model_dir: Path, folder: Path, **changes) -> Recipe:
    data = {
        "run": {"dir": str(folder / "run"), "steps": 2, "seed": 1},
        "model": {"name": str(model_dir), "lora": {"rank": 4}},
        "env": {"name": "prompts", "items": [{"prompt": "go"}, {"prompt": "say"}]},
        "rewards": [{"name": "length"}],
        "algorithm": {"name": "grpo", "group_size": 4},
        "engine": {"name": "local", "max_new_tokens": 6},
        "optim": {"batch_size": 2},
        "eval": {"tasks": 1},
    }
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_recipe(data)


def at(memory: Memory, name: str, phase: str = "learning") -> int:
    return next((part.at(phase) for part in memory.parts if part.name == name), 0)


def test_weights_adapters_and_optimiser_are_counted(model_dir, tmp_path):
    survey = Survey.of(recipe(model_dir, tmp_path))
    memory = survey.memory
    # rank x (in + out) of q, o, k, v, gate, up and down
    ranks = 2 * 64 + 2 * 48 + 3 * 96
    adapters = LAYERS * 4 * ranks
    buffers = held(causal_lm(survey.parts.policy.model).buffers())
    assert at(memory, "weights") == 4 * WEIGHTS + buffers
    assert at(memory, "adapters and heads") == 4 * adapters
    assert at(memory, "optimiser") == 2 * 4 * adapters
    assert at(memory, "gradients", "sampling") == 4 * adapters
    assert Parameters.of(survey.parts) == Parameters(WEIGHTS + adapters, adapters, {})
    assert not (tmp_path / "run").exists()


def test_counts_are_those_of_the_models_with_weights(model_dir, tmp_path):
    wanted = recipe(model_dir, tmp_path, algorithm={"name": "ppo"}, critic={"kind": "model"})
    survey = Survey.of(wanted)
    parts = build(wanted, tmp_path, Progress())
    real = parts.models
    assert real.critic is not None
    assert Parameters.of(survey.parts) == Parameters.of(parts)
    assert list(survey.sizes.weights) == ["weights", "adapters and heads", "critic model"]
    everything = {id(m): m for m in (real.policy.model, real.critic.policy.model)}.values()
    kept = held([t for model in everything for t in (*model.parameters(), *model.buffers())])
    assert sum(survey.sizes.weights.values()) == kept


def test_all_weights_learn_with_a_copy_as_reference(model_dir, tmp_path):
    wanted = recipe(model_dir, tmp_path, model={"lora": None}, algorithm={"kl_coef": 0.1})
    memory = Survey.of(wanted).memory
    assert at(memory, "optimiser") == 2 * 4 * WEIGHTS
    assert at(memory, "reference model") == at(memory, "weights")
    assert at(memory, "checkpoint snapshot", "saving") == 3 * 4 * WEIGHTS
    # A head and embeddings are one matrix, whose gradient is counted once.
    assert at(memory, "gradients", "sampling") == 4 * WEIGHTS


@pytest.mark.parametrize("lora", [{"rank": 4}, None])
def test_the_samplers_copies_are_those_of_the_real_engine(model_dir, tmp_path, lora):
    wanted = recipe(model_dir, tmp_path, model={"lora": lora})
    engine = build_engine(wanted, policy := load_policy(wanted.model))
    assert isinstance(engine, LocalEngine)
    runtime = engine._runtime
    assert isinstance(runtime, LeanRuntime)
    mine = [value for layer in runtime._layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    packed = [layer.gate_up_packed for layer in runtime._layers if layer.gate_up_packed is not None]
    own = {p.untyped_storage()._cdata for p in policy.model.parameters()}
    copies = held(t for t in mine if not t.is_mkldnn and t.untyped_storage()._cdata not in own)
    expected = copies + 4 * (sum(INNER * 2 * HIDDEN for _ in packed) + VOCABULARY * HIDDEN * bool(packed))
    assert Survey.of(wanted).sizes.sampler.copies == expected


def test_keys_and_values_are_at_least_those_that_the_real_engine_keeps(model_dir, tmp_path):
    wanted = recipe(model_dir, tmp_path, engine={"ignore_eos": True})
    survey, parts = Survey.of(wanted), build(wanted, tmp_path, Progress())
    engine = parts.engine
    assert isinstance(engine, LocalEngine)
    most = 0
    step = engine.step

    def watched():
        nonlocal most
        done = step()
        segments = sum(node.kv.nbytes for node in engine._cache._nodes() if node.kv is not None)
        most = max(most, segments + engine._tails._kv.nbytes)
        return done

    engine.step = watched  # type: ignore[method-assign]
    assert parts.tasks is not None
    parts.tasks.play("base")
    parts.source.groups(1)
    assert most <= survey.sizes.sampler.kept <= 1.3 * most


def test_a_longer_micro_batch_stretches_what_depends_on_it(model_dir, tmp_path):
    survey = Survey.of(recipe(model_dir, tmp_path))
    one, two = survey.sizes.memory(survey.found), survey.sizes.memory(survey.found, 2.0)
    assert at(two, "activations") == 2 * at(one, "activations")
    assert at(two, "weights") == at(one, "weights")
    assert at(two, "activations", "sampling") == at(one, "activations", "sampling")
    live = at(one, "activations") + at(one, "logits")
    churn = survey.found["learning"].work.churn
    held_back = FRAGMENTS_OF_LIVE * live + FRAGMENTS_OF_CHURN * churn
    assert at(one, "kept by the allocator") == pytest.approx(held_back, abs=1)


def test_a_snapshot_is_held_while_training_goes_on_only_in_the_background(model_dir, tmp_path):
    for section, held_on in (({"every": 1}, True), ({"every": 1, "background": False}, False), ({}, False)):
        memory = Survey.of(recipe(model_dir, tmp_path, checkpoint=section)).memory
        assert (at(memory, "checkpoint snapshot") > 0) is held_on
        assert at(memory, "checkpoint snapshot", "saving") > 0


def test_other_types_and_quantised_weights_are_smaller_and_keep_or_pass_their_files(model_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    full = Survey.of(recipe(model_dir, tmp_path))
    half = Survey.of(recipe(model_dir, tmp_path, model={"dtype": "bfloat16"}))
    file = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    assert half.sizes.weights["weights"] < 0.55 * full.sizes.weights["weights"]
    assert at(half.memory, "weights", "loading") - at(half.memory, "weights") == file == half.sizes.files
    assert full.sizes.files == 0
    # The layers' matrices become a byte a number; embeddings and norms stay views of the file, so all of it stays.
    eight = Survey.of(recipe(model_dir, tmp_path, model={"quantize": "8bit"}))
    buffers = held(causal_lm(full.parts.policy.model).buffers())
    packed = 4 * (WEIGHTS - LAYERS * LAYER) + buffers + LAYERS * LAYER
    viewed = 4 * (WEIGHTS - LAYERS * LAYER) + buffers
    assert eight.sizes.weights["weights"] == packed + file - viewed
    assert eight.sizes.dense == 4 * HIDDEN * INNER


def test_the_small_optimiser_is_counted(model_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    plain = Survey.of(recipe(model_dir, tmp_path, model={"lora": None})).sizes
    small = Survey.of(recipe(model_dir, tmp_path, model={"lora": None}, optim={"name": "adamw_8bit"})).sizes
    embeddings, norms = VOCABULARY * HIDDEN, (2 * LAYERS + 1) * HIDDEN
    # Matrices below 4,096 numbers and norms stay in 32 bits: q, k, v, o (1,024 or 512) and the MLP's (2,048).
    assert small.moments == int(embeddings * 2 * (1 + 4 / 256)) + 8 * (LAYERS * LAYER + norms)
    assert plain.moments == 8 * WEIGHTS


def test_phases_add_up_and_the_largest_is_the_peak():
    memory = Memory((Part("a", {"learning": 5, "saving": 1}), Part("b", {"saving": 7})), PHASES)
    assert (memory.where, memory.peak) == ("saving", 8)
    assert memory.total("learning") == 5
    assert (memory.parts[0].most, memory.parts[0].at("loading")) == (5, 0)


def test_a_reward_model_on_the_policys_base_costs_its_adapter_and_one_of_its_own_all_of_it(model_dir, tmp_path):
    lora = LoraSection(rank=4)
    judge = load_policy(ModelSection(name=str(model_dir), lora=lora), head="scalar")
    checkpoint.save(judge, tmp_path / "judge", 1, 1)
    reward = {"name": "reward_model", "path": str(tmp_path / "judge")}
    plain = Survey.of(recipe(model_dir, tmp_path)).sizes.weights
    shared = Survey.of(recipe(model_dir, tmp_path, rewards=[reward])).sizes.weights
    own = Survey.of(recipe(model_dir, tmp_path, rewards=[{**reward, "dtype": "float32"}])).sizes.weights
    assert shared["weights"] == plain["weights"] == own["weights"]
    assert shared["adapters and heads"] == 2 * plain["adapters and heads"]
    assert own["adapters and heads"] == plain["adapters and heads"]
    # PEFT keeps the head that it was given beside the one that it trains.
    assert own["reward model"] == plain["weights"] + plain["adapters and heads"] + 2 * 4 * HIDDEN
    judged = Survey.of(recipe(model_dir, tmp_path, rewards=[reward]))
    assert "sampling" not in Survey.of(recipe(model_dir, tmp_path)).found
    assert judged.found["sampling"].nodes == nodes(judged.work.largest)
