"""GGUF files: transformers reads back the model that was written, in every family and type; a LoRA
for llama.cpp is the update of the merged weights."""

from __future__ import annotations

import math
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from adapters.delta import AdapterError
from tests.toys.commands import exit_code
from trainer import export
from trainer.exporting import gguf_lora, gguf_model, gguf_vocabulary
from trainer.exporting.compare import distance
from trainer.models.tiny import byte_tokenizer

SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, own output layer": LlamaConfig(**SIZES, head_dim=32),
    "llama 3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma2": Gemma2Config(**SIZES, **GEMMA),
    "gemma3": Gemma3TextConfig(**(SIZES | {"num_hidden_layers": 6}), **GEMMA),
    "phi3": Phi3Config(**SIZES, sliding_window=128),
}
TYPES = ("float32", "float16", "bfloat16", "q8_0")


def words(*steps, merges=(("a", "b"), ("ab", "c"))):
    """A tokenizer over bytes with a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", *alphabet, *("".join(merge) for merge in merges)]
    vocab = {name: at for at, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def byte_level(use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(rule):
    return pre_tokenizers.Split(Regex(gguf_vocabulary.RULES[rule]), behavior="isolated")


def model_of(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def written(model, folder, dtype="float32", template=None, tokenizer=None):
    tokenizer = tokenizer or words(byte_level())
    vocabulary = gguf_vocabulary.of(tokenizer, model.config.vocab_size)
    kind = "conversation" if template else "text"
    renderer = SimpleNamespace(kind=kind, template=template, variables={})
    family = gguf_model.family_of(model.config)
    base = SimpleNamespace(load_tokenizer=lambda: tokenizer)
    serving = SimpleNamespace(
        renderer=renderer, ends=[1], base=base, chat_template=lambda tokenizer: template
    )
    gguf_model._write(folder / "model.gguf", model, family, dtype, vocabulary, serving)


def logits(model):
    ids = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_each_family_is_read_back_by_transformers(name, dtype, tmp_path):
    model = model_of(name)
    exact = logits(model)
    written(model, tmp_path, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        dtype=torch.float32,
        config=gguf_model.readable(CONFIGS[name]),
    ).eval()
    rounded = logits(gguf_model.round_weights(model, dtype))
    assert distance(rounded, logits(loaded)) < gguf_model.EXACT
    far = distance(exact, rounded)
    assert far == 0.0 if dtype == "float32" else 1e-4 < far < 0.2


def test_rounding_of_each_type():
    model = model_of("llama")
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    for dtype, kind in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        after = gguf_model.round_weights(model_of("llama"), dtype)
        weight = after.model.layers[0].mlp.up_proj.weight
        assert torch.equal(weight, before.to(kind).float())
    blocks = before.reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
    after = gguf_model.round_weights(model, "q8_0").model.layers[0].mlp.up_proj.weight
    naive = torch.round(blocks / (blocks.abs().amax(1, keepdim=True) / 127)) * scale
    assert torch.allclose(after.detach().reshape(-1, 32), naive, atol=2e-5)
    assert float((after.detach() - before).abs().max()) <= float(scale.max()) * 0.51 + 1e-4


def test_the_rows_of_q_are_in_pairs():
    weight = torch.arange(8.0)[:, None]  # 2 heads of 4: halves (0, 1), (2, 3)
    assert gguf_model.paired(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama_3s_divisors_are_those_of_transformers():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = CONFIGS["llama 3"]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = gguf_model.rope_tensors(config)["rope_freqs.weight"]
    assert np.allclose(divisors, (plain / scaled).numpy(), rtol=1e-5)
    assert divisors.max() == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("steps", "rule"),
    [
        ([byte_level()], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), byte_level()], "smollm"),
        *(([split(rule), byte_level(False)], rule) for rule in gguf_vocabulary.RULES),
    ],
)
def test_the_rule_of_splitting_is_named(steps, rule):
    vocabulary = gguf_vocabulary.of(words(*steps), 320)
    assert vocabulary.rule == rule
    assert len(vocabulary.tokens) == 320
    assert vocabulary.tokens[-1] == "[PAD319]"
    assert vocabulary.kinds[-1] == gguf.TokenType.UNUSED
    assert vocabulary.merges == ["a b", "ab c"]
    assert vocabulary.ids == {"bos": 0, "eos": 1, "pad": 1}


def test_what_llama_cpp_cannot_read_is_refused():
    other = pre_tokenizers.Split(Regex("x+"), behavior="isolated")
    with pytest.raises(AdapterError, match="no name for how this tokenizer splits"):
        gguf_vocabulary.of(words(other, byte_level(False)), 320)
    with pytest.raises(AdapterError, match="has 260 tokens, and the model 259"):
        gguf_vocabulary.of(words(byte_level()), 259)
    with pytest.raises(AdapterError, match="tokenizer is BPE without merges"):
        gguf_vocabulary.of(byte_tokenizer(), 320)
    with pytest.raises(AdapterError, match="does not know models of the type gpt2"):
        gguf_model.family_of(SimpleNamespace(model_type="gpt2"))
    yarn = LlamaConfig(**SIZES, rope_parameters=LLAMA3 | {"rope_type": "yarn"})
    with pytest.raises(AdapterError, match="rotary scaling 'yarn'"):
        gguf_model.family_of(yarn)
    with pytest.raises(AdapterError, match="no rotary scaling 'llama3' for qwen3"):
        gguf_model.family_of(Qwen3Config(**SIZES, rope_parameters=LLAMA3))
    for kind in (MistralConfig, Phi3Config):
        with pytest.raises(AdapterError, match="ignores sliding_window=8 of"):
            gguf_model.family_of(kind(**SIZES, sliding_window=8))
    for changes, text in (
        ({"query_pre_attn_scalar": 256}, "divides attention by the root of 16"),
        ({"layer_types": ["full_attention"] * 2}, "every layer 2 of this model"),
    ):
        with pytest.raises(AdapterError, match=text):
            gguf_model.family_of(Gemma2Config(**(SIZES | GEMMA | changes)))
    for config, tensors, text in (
        ({"peft_type": "IA3"}, {}, "is for LoRA, and this is IA3"),
        ({"peft_type": "LORA", "use_dora": True}, {}, "no DoRA"),
        ({"peft_type": "LORA"}, {"base_model.model.lm_head.weight": 0}, "no place for lm_head"),
    ):
        with pytest.raises(AdapterError, match=text):
            gguf_lora.check(config, tensors)
    layers = ["model.layers.0.mlp.up_proj", "lm_head"]
    gguf_lora.refuse_tied(layers, LlamaForCausalLM(CONFIGS["llama, own output layer"]))
    with pytest.raises(AdapterError, match="lm_head has the embedding's weight"):
        gguf_lora.refuse_tied(layers, LlamaForCausalLM(CONFIGS["llama"]))


@pytest.mark.parametrize("rslora", [True, False])
def test_scales_of_single_layers_are_in_b(rslora):
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    config = {"r": 8, "lora_alpha": 16, "use_rslora": rslora, "alpha_pattern": {"up_proj": 4}}
    tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    (pair,) = gguf_lora._pairs(tensors, config).values()
    alpha = gguf_lora.scale_of(config, 8, 16) * 8  # the file's
    expected = (4 / math.sqrt(2) if rslora else 4 / 2) * b @ a
    assert torch.allclose(alpha / 2 * pair[1] @ pair[0], expected)


@pytest.fixture(scope="module")
def run(train_in, tmp_path_factory):
    """A LoRA on chats, with a random Llama."""
    from tests.conftest import sums, write_rows

    place = tmp_path_factory.mktemp("gguf")
    path = write_rows(place / "rows.jsonl", sums(24))
    base = place / "base"
    model_of("llama").save_pretrained(base)
    words(byte_level()).save_pretrained(base)
    return train_in(
        place, "base=hf", f"base.path={base}", f"task.path={path}", "task.eval_fraction=0.2",
        "task.chat_template=none", "max_length=100", "adapter=rslora",
        "adapter.target_modules=all-linear", "max_steps=6", "max_epochs=null", "optimizer.lr=0.02",
    )  # fmt: skip


def test_the_command_writes_a_model_and_a_lora(run, tmp_path, capsys):
    assert (
        exit_code(export.main, [f"run={run}", "to=gguf", f"out={tmp_path / 'g'}", "dtype=q8_0"])
        == 0
    )
    assert {path.name for path in (tmp_path / "g").iterdir()} >= {
        "model.gguf", "Modelfile", "README.md",
    }  # fmt: skip
    reader = gguf.GGUFReader(str(tmp_path / "g" / "model.gguf"))
    assert "tokenizer.chat_template" in reader.fields
    assert (tmp_path / "g" / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    assert "llama-server -m model.gguf" in (tmp_path / "g" / "README.md").read_text()
    assert "GGUF tensors" not in capsys.readouterr().err  # transformers' bar
    assert exit_code(export.main, [f"run={run}", "to=gguf_lora", f"out={tmp_path / 'l'}"]) == 0
    reader = gguf.GGUFReader(str(tmp_path / "l" / "adapter.gguf"))
    names = {tensor.name for tensor in reader.tensors}
    assert "blk.0.attn_q.weight.lora_a" in names
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "l" / "Modelfile").read_text()


def test_a_type_that_only_gguf_has_is_refused_elsewhere(run, capsys):
    assert exit_code(export.main, [f"run={run}", "to=merged", "dtype=q8_0"]) == 2
    assert "dtype=q8_0 is a type of GGUF; to=" in capsys.readouterr().err
