"""What a user is told of a model, an adapter or a run that can't be opened: one sentence with the place and the fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sapwood import checkpoint
from sapwood.errors import ModelError
from sapwood.models.critic import CriticChoice, build_critic
from sapwood.models.export import export
from sapwood.models.load import called, find_adapter, load_classifier, load_policy, resolve
from sapwood.sections import LoraSection, ModelSection
from tests.chats import CHATML, metaspace_tokenizer
from tests.learning import save_tiny_model

WEIGHT = "model.layers.1.mlp.down_proj.weight"
CPU = (torch.device("cpu"), torch.float32, "none", False)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter_dir(model_dir, tmp_path_factory):
    policy = load_policy(ModelSection(name=str(model_dir), lora=LoraSection(rank=2)))
    folder = tmp_path_factory.mktemp("adapter")
    checkpoint.save_policy(policy, folder)
    return folder


@pytest.fixture
def broken(model_dir, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(model_dir, tmp_path / "broken"))


def refusal(name: Path | str, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        load_policy(ModelSection.model_validate({"name": str(name), "lora": None, **options}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 2000])
def test_weights_that_are_cut_short(broken, size):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    told = refusal(broken)
    assert told.startswith(f"model.name: the weights of {broken} are damaged or cut short (")
    assert told.endswith("; copy or download them again.")


def change_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_weight_that_is_missing_is_never_drawn_at_random(broken):
    change_weights(broken, lambda tensors: tensors.pop(WEIGHT))
    assert f"{broken} lacks the weight {WEIGHT}; its files are incomplete" in refusal(broken)
    with pytest.raises(ModelError, match=f"lacks the weight {WEIGHT}"):
        load_classifier(str(broken), *CPU)


def test_a_weight_of_another_shape_is_named(broken):
    change_weights(broken, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:3].clone()}))
    assert f"the weight {WEIGHT} has the shape [3, 64], where its config.json says [32, 64]" in refusal(broken)


def test_a_config_that_is_no_json_names_its_file(broken):
    (broken / "config.json").write_text("{")
    assert refusal(broken).startswith(f"{broken}/config.json: not JSON (")


def test_a_model_without_a_tokenizer(broken):
    for file in broken.glob("tokenizer*"):
        file.unlink()
    assert f"{broken} has no tokenizer that can be opened" in refusal(broken)


def test_a_tokenizer_with_more_words_than_the_model(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save_tiny_model(tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)
    told = refusal(folder)
    assert f"{folder} has embeddings for 300 tokens, and its tokenizer gives ids up to 317" in told


def test_an_encoder_is_no_policy(tmp_path, model_dir):
    from transformers import AutoModelForCausalLM, BertConfig

    folder = Path(shutil.copytree(model_dir, tmp_path / "bert"))
    small = BertConfig(vocab_size=318, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    AutoModelForCausalLM.from_config(small).save_pretrained(folder)
    assert f"{folder} is an encoder (BertLMHeadModel)" in refusal(folder)


def test_a_run_or_an_adapter_in_place_of_a_model_says_where_it_belongs(adapter_dir, tmp_path):
    (tmp_path / "recipe.yaml").write_text("run: {dir: x, steps: 1}\n")
    assert refusal(tmp_path).endswith(f"is a run: set model.init_from={tmp_path} to start from what it trained.")
    assert refusal(adapter_dir).endswith(f"goes on with a model: set model.init_from={adapter_dir}.")
    assert "is a file; give the folder of a model" in refusal(tmp_path / "recipe.yaml")


def test_the_nearest_name_is_offered(model_dir, monkeypatch):
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m'"):
        load_policy(ModelSection(name="smollm2-135n"))
    monkeypatch.chdir(model_dir.parent)
    assert refusal("tny").endswith("did you mean 'tiny'?")
    assert refusal("./tny").endswith("did you mean 'tiny'?")


def test_a_run_is_offered_where_runs_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "runs" / "dpo").mkdir(parents=True)
    (tmp_path / "runs" / "dpo" / "recipe.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with called(""):
        assert refusal("runs/dpoo").endswith("did you mean 'runs/dpo'?")
    assert "did you mean" not in refusal("runs/dpoo")


def test_a_run_without_a_checkpoint_is_told_from_a_wrong_path(model_dir, tmp_path):
    (tmp_path / "recipe.yaml").write_text("run: {dir: x, steps: 1}\n")
    assert "is a run that has saved no checkpoint yet" in refusal(model_dir, init_from=tmp_path)
    gone = tmp_path.with_name(tmp_path.name + "x")
    assert refusal(model_dir, init_from=gone) == (
        f"model.init_from: there is no folder '{gone}'; did you mean '{tmp_path}'?"
    )


def test_a_start_with_another_vocabulary(model_dir, tmp_path):
    other = Path(shutil.copytree(model_dir, tmp_path / "other"))
    metaspace_tokenizer(CHATML).save_pretrained(other)
    told = refusal(model_dir, init_from=other)
    assert told.startswith(f"model.init_from: {other} has another vocabulary than {model_dir} (")
    assert f"set model.name={other}" in told


def test_errors_name_the_option_that_the_caller_wrote(tmp_path):
    with called("critic.name", "critic.init_from"):
        with pytest.raises(ModelError, match=r"^critic\.name: .* has no config\.json"):
            resolve(str(tmp_path))
        with pytest.raises(ModelError, match=r"^critic\.init_from: .* holds no adapter or model"):
            find_adapter(tmp_path)
    with called(""), pytest.raises(ModelError, match=f"^{tmp_path} has no config"):
        resolve(str(tmp_path))
    with pytest.raises(ModelError, match=r"^model\.name: "):
        resolve(str(tmp_path))


def test_a_critics_path_is_called_the_critics(model_dir, tmp_path):
    section = ModelSection(name=str(model_dir), lora=LoraSection(rank=2))
    policy = load_policy(section)
    with pytest.raises(ModelError, match=r"^critic\.name: there is no model folder"):
        build_critic(policy, CriticChoice(kind="model", name="/no/such"), section)
    with pytest.raises(ModelError, match=r"^critic\.init_from: .* holds no adapter"):
        build_critic(policy, CriticChoice(kind="adapter", init_from=tmp_path), section)


def test_an_adapter_that_lacks_weights(model_dir, adapter_dir, tmp_path):
    folder = Path(shutil.copytree(adapter_dir, tmp_path / "adapter"))
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    gone = sorted(whole)[0]
    save_file({name: value for name, value in whole.items() if name != gone}, file)
    assert f"the adapter {folder} lacks 1 of its weights" in refusal(model_dir, init_from=folder)
    file.write_bytes(b"x" * 20)
    assert "; copy it again, or take another checkpoint." in refusal(model_dir, init_from=folder)
    file.unlink()
    assert f"can't read the adapter {folder} (it has no adapter_model.safetensors)" in refusal(
        model_dir, init_from=folder
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    shutil.copy(adapter_dir / "adapter_model.safetensors", folder)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "PROMPT_TUNING"}))
    assert "adapter_config.json: peft_type is PROMPT_TUNING; Sapwood reads LoRA" in refusal(model_dir, init_from=folder)


def test_an_export_of_what_is_not_there(adapter_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(adapter_dir, run / "checkpoints" / "step_000001" / "policy")
    with pytest.raises(ModelError, match=r"run has no critic; export its policy"):
        export(run, tmp_path / "out", role="critic")
    head = run / "checkpoints" / "step_000001" / "critic" / "head.safetensors"
    head.parent.mkdir()
    head.write_bytes(b"")
    with pytest.raises(ModelError, match=r"is a head on the policy's hidden states .* no model by itself"):
        export(run, tmp_path / "out", role="critic")
    with pytest.raises(ModelError, match=r"is a file; export to a folder of its own"):
        export(run, head)
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_a_base_asks_for_it(adapter_dir, tmp_path):
    folder = Path(shutil.copytree(adapter_dir, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="names no base model; give it with --base"):
        export(folder, tmp_path / "out")
    with pytest.raises(ModelError, match=r"^--base: there is no model folder '/no/such'"):
        export(folder, tmp_path / "out", base="/no/such")
