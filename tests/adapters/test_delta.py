"""The contract's own parts: which layers are meant, states, weights in and out, new modules,
everything and nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForSequenceClassification

from adapters.delta import (
    AdaptedLinear,
    AdapterError,
    Start,
    copy_tensors,
    merge_linear,
    switched_off,
    targets,
)
from adapters.full import Full, Nothing
from adapters.linear import features, float_weight, set_float_weight
from adapters.lora import LoRA, LoRAAdapter
from tests.toys import adapters as toys
from trainer.models.base import Base


def names(*arguments: Any) -> list[str]:
    return [name for name, _ in targets(*arguments)]


def classifier(dtype: torch.dtype = torch.bfloat16) -> Any:
    """A Llama with a new head of three classes."""
    config = copy.deepcopy(toys.llama().config)
    config.num_labels, config.pad_token_id = 3, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config).to(dtype).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toys.llama(torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# targets


@pytest.mark.parametrize(
    "model", [toys.llama(), toys.llama(tie_word_embeddings=False), toys.gpt2(), classifier()]
)
def test_all_linear_layers_are_those_of_stock_peft(model):
    new = ("score",) if hasattr(model, "score") else ()
    actual = names(model, "all-linear", (), new)
    task = "SEQ_CLS" if new else "CAUSAL_LM"
    config = peft.LoraConfig(
        target_modules="all-linear",
        task_type=task,
        fan_in_fan_out=isinstance(model, type(toys.gpt2())),
    )
    wrapped: Any = peft.get_peft_model(copy.deepcopy(model), config)
    theirs = [
        n
        for n, module in wrapped.get_base_model().named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    assert actual == theirs
    assert len(actual) in (8, 14)


@pytest.mark.parametrize(
    ("expected", "exclude", "count"),
    [
        (["q_proj", "v_proj"], [], 4),
        (["layers.1.mlp.up_proj"], [], 1),
        (["lm_head"], [], 1),  # on its own wish
        ("all-linear", ["mlp.down_proj"], 12),
        ("all-linear", ["q_proj", "layers.0.self_attn.k_proj"], 11),
        (r".*\.(gate|up)_proj", ["layers.0.mlp.up_proj"], 3),
        (r"model\.layers\.1\..*", [], 7),
    ],
)
def test_names_ends_patterns_and_exceptions(expected, exclude, count):
    model = toys.llama()
    actual = names(model, expected, exclude)
    assert len(actual) == len(set(actual)) == count
    for name in actual:
        assert not any(name.endswith("." + entry) for entry in exclude)
        assert (
            expected == "all-linear"
            or isinstance(expected, str)
            or any(f".{name}".endswith("." + entry) for entry in expected)
        )


@pytest.mark.parametrize(
    ("expected", "exclude", "message"),
    [
        # ends of names, not of words
        (["q_proj", "proj"], [], r"target_modules has 'proj', which matches no linear layer"),
        (["q_proj", "embed_tokens"], [], "target_modules has 'embed_tokens', which matches"),
        # a pattern is for the whole name
        ("q_proj", [], "target_modules='q_proj' matches no linear layer"),
        ("(q_proj", [], r"target_modules='\(q_proj' is no regular expression: missing \)"),
        ("all-linear", ["q_porj"], "exclude_modules has 'q_porj', which matches no linear layer"),
        (
            ["q_proj"],
            ["self_attn.q_proj"],
            r"\['q_proj'\] without \['self_attn.q_proj'\] leaves no linear layer",
        ),
    ],
)
def test_what_matches_nothing_is_named_with_the_choices(expected, exclude, message):
    with pytest.raises(AdapterError, match=message) as error:
        targets(toys.llama(), expected, exclude)
    if "regular" not in message:
        assert "k_proj (2x)" in str(error.value)
        assert "lm_head (1x)" in str(error.value)


def test_a_new_module_is_no_target_and_its_namesakes_are():
    model = nn.ModuleDict(
        {
            "score": nn.Linear(2, 2),
            "scores": nn.Linear(2, 2),
            "body": nn.ModuleDict({"score": nn.Linear(2, 2)}),
        }
    )
    assert names(model, "all-linear", (), ("score",)) == ["scores", "body.score"]


# states


def test_tensors_are_copied_all_or_none():
    live = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    good = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    for wrong, message in (
        ({"a": good["a"]}, r"1 tensors are missing \['b'\], 0 are unknown"),
        (good | {"c": torch.ones(1)}, r"0 tensors are missing \[\], 1 are unknown \['c'\]"),
        (
            good | {"b": torch.ones(5)},
            r"b is \(5,\) torch.float32 there and \(4,\) torch.float32 here",
        ),
        (good | {"b": torch.ones(4, dtype=torch.float64)}, r"b is \(4,\) torch.float64 there"),
    ):
        with pytest.raises(AdapterError, match=message):
            copy_tensors(live, wrong)
        assert all((tensor == 0).all() for tensor in live.values())
    copy_tensors(live, good)
    assert all((tensor == 1).all() for tensor in live.values())


def test_a_deltas_buffers_are_part_of_its_state():
    class Counted(LoRA):
        def __init__(self, linear: Any):
            super().__init__(linear, 2, 1.0, 0.0, torch.float32)
            self.register_buffer("indices", torch.arange(3))
            self.register_buffer("scratch", torch.zeros(2), persistent=False)

    adapter = toys.lora(target_modules=["lm_head"])
    adapter.make = Counted
    model = adapter.attach(toys.llama(), Start())
    state = copy.deepcopy(adapter.state(model))
    assert set(state["tensors"]) == {f"lm_head.delta.{name}" for name in ("A", "B", "indices")}
    model.lm_head.delta.indices.zero_()
    adapter.load_state(model, state)
    assert model.lm_head.delta.indices.tolist() == [0, 1, 2]


# weights


def test_an_nf4_weight_is_its_table_times_its_scales(folder):
    linear: Any = (
        Base(str(folder), "auto", "sdpa", "nf4", False)
        .load(torch.float32)
        .model.layers[0]
        .self_attn.k_proj
    )
    state = linear.weight.quant_state
    packed = linear.weight.data.flatten().tolist()
    values = []
    for byte in packed:
        for code in (byte >> 4, byte & 15):
            values.append(
                float(state.code[code]) * float(state.absmax[len(values) // state.blocksize])
            )
    actual = float_weight(linear)
    assert actual.shape == features(linear)[::-1] == (32, 64)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, torch.tensor(values).reshape(32, 64))
    assert not torch.equal(
        actual, toys.llama(torch.float32).model.layers[0].self_attn.k_proj.weight
    )


def test_a_doubly_quantised_weight_is_bitsandbytes_own(folder):
    linear: Any = toys.quantised(folder, "nf4", torch.bfloat16).model.layers[0].mlp.up_proj
    assert linear.weight.quant_state.nested
    own = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert own.dtype == torch.bfloat16
    assert torch.equal(float_weight(linear), own.float())


def test_an_int8_weight_is_its_integers_times_their_rows_scales(folder):
    linear: Any = toys.quantised(folder, "int8").model.layers[0].self_attn.k_proj
    for used in (False, True):  # bitsandbytes moves the scales at the first use
        if used:
            linear(torch.randn(3, 64))
        integers, scales = (
            linear.weight.data,
            linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB,
        )
        expected = torch.stack(
            [row.double() * float(scale) / 127 for row, scale in zip(integers, scales, strict=True)]
        )
        torch.testing.assert_close(float_weight(linear).double(), expected, rtol=1e-6, atol=0)
    plain = toys.llama(torch.float32).model.layers[0].self_attn.k_proj.weight
    assert 0 < (float_weight(linear) - plain).abs().max() <= plain.abs().max() / 127


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_dense_weights_go_out_and_in(dtype, transposed):
    linear: Any = (
        toys.gpt2(dtype).transformer.h[0].mlp.c_fc
        if transposed
        else toys.llama(dtype).model.layers[0].mlp.up_proj
    )
    held, address = linear.weight.detach().clone(), linear.weight.data_ptr()
    dense = float_weight(linear)
    o, i = dense.shape
    assert (i, o) == features(linear)
    assert dense.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(2, i, dtype=dtype)
    bias = linear.bias if transposed else torch.zeros(o, dtype=dtype)
    expected = x.double() @ dense.double().T + bias.double()
    assert (linear(x).double() - expected).abs().max() < 2 * torch.finfo(
        dtype
    ).eps * 64 * expected.abs().max()
    set_float_weight(linear, dense)
    assert torch.equal(linear.weight, held)
    set_float_weight(linear, 2 * dense)
    assert torch.equal(linear.weight, 2 * held)
    assert linear.weight.data_ptr() == address
    assert linear.weight.dtype == dtype


def test_a_merge_rounds_once():
    linear = nn.Linear(64, 48, bias=False).to(torch.bfloat16).requires_grad_(False)
    delta = LoRA(linear, 4, 0.5, 0.0, torch.float32)
    nn.init.normal_(delta.B, std=0.01)
    before = linear.weight.clone()
    expected = (before.double() + 0.5 * delta.B.detach().double() @ delta.A.detach().double()).to(
        torch.bfloat16
    )
    merge_linear(AdaptedLinear(linear, delta))
    different = linear.weight != expected
    assert different.float().mean() < 0.001  # fp32 may fall on the other side of a tie
    assert (linear.weight != before).float().mean() > 0.5


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_merge_into_a_quantised_base_is_refused(folder, kind):
    adapter = toys.lora()
    model = adapter.attach(toys.quantised(folder, kind), Start())
    with pytest.raises(AdapterError, match=r"base is quantised.*base.quantization=none"):
        adapter.merge(model)
    assert sum(isinstance(module, AdaptedLinear) for module in model.modules()) == 14


# AdaptedLinear


def test_a_failure_while_switched_off_switches_it_on_again():
    adapter = toys.lora(dtype="float64")
    model = adapter.attach(toys.llama(), Start())
    toys.train(adapter, model)
    expected = toys.logits(model)

    def fails() -> None:
        with switched_off(model):
            assert torch.equal(toys.logits(model), toys.logits(toys.llama()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert torch.equal(toys.logits(model), expected)
    assert not torch.equal(expected, toys.logits(toys.llama()))


def test_models_still_find_weight_and_bias():
    linear = nn.Linear(3, 4)
    adapted = AdaptedLinear(linear, LoRA(linear, 2, 1.0, 0.0, torch.float32))
    assert adapted.weight is linear.weight
    assert adapted.bias is linear.bias


# new modules


@pytest.mark.parametrize("adapter", [toys.lora(), Nothing()])
def test_a_new_head_is_trained_in_fp32_on_a_half_precision_base(adapter):
    model: Any = adapter.attach(classifier(), Start(new_modules=("score",)))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained
    assert len(trained) == (29 if isinstance(adapter, LoRAAdapter) else 1)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert not isinstance(model.score, AdaptedLinear)
    output = model(input_ids=toys.IDS).logits
    assert output.dtype == torch.float32
    hidden = model.model(input_ids=toys.IDS).last_hidden_state[:, -1]
    assert hidden.dtype == torch.bfloat16
    # The head multiplies all tokens, this line the last ones. Another shape may add in another
    # order, so fp32's rounding (1e-6) is allowed; a head that computes in bf16 is off by 1e-2.
    torch.testing.assert_close(output, hidden.float() @ model.score.weight.T, rtol=1e-5, atol=1e-5)
    output.sum().backward()
    assert model.score.weight.grad.dtype == torch.float32
    assert "score.weight" in adapter.state(model)["tensors"]


def test_a_new_head_is_saved_for_stock_peft(tmp_path):
    adapter = toys.lora()
    model: Any = adapter.attach(classifier(torch.float32), Start(new_modules=("score",)))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    adapter.save(model, tmp_path, "base", "SEQ_CLS")
    assert "base_model.model.score.weight" in load_file(tmp_path / "adapter_model.safetensors")
    other = classifier(torch.float32)
    nn.init.normal_(other.score.weight)  # each start draws its own
    stock: Any = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    expected = model(input_ids=toys.IDS).logits
    torch.testing.assert_close(stock(input_ids=toys.IDS).logits, expected, rtol=0, atol=1e-4)
    assert (expected - classifier(torch.float32)(input_ids=toys.IDS).logits).abs().max() > 0.1


def test_a_new_head_on_a_quantised_base_is_not_quantised(folder):
    model = LlamaForSequenceClassification.from_pretrained(
        folder,
        num_labels=3,
        pad_token_id=0,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    toys.lora().attach(model, Start(new_modules=("score",)))
    assert type(model.score) is nn.Linear
    assert model.score.weight.dtype == torch.float32
    model.train()(input_ids=toys.IDS).logits.sum().backward()
    assert model.score.weight.grad.abs().max() > 0
    assert model.model.layers[0].self_attn.q_proj.delta.B.grad.abs().max() > 0


# everything and nothing


def test_full_trains_every_weight_and_holds_a_tied_one_once():
    adapter = Full()
    model = adapter.attach(toys.llama(), Start())
    assert all(p.requires_grad for p in model.parameters())
    state = adapter.state(model)
    assert set(state["tensors"]) == {name for name, _ in toys.llama().named_parameters()}
    assert "lm_head.weight" not in state["tensors"]
    before = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    toys.train(adapter, model)
    assert all(
        not torch.equal(before[name], tensor)
        for name, tensor in adapter.state(model)["tensors"].items()
    )
    expected = toys.logits(model)
    again = Full()
    other = again.attach(toys.llama(), Start())
    again.load_state(other, adapter.state(model))
    assert torch.equal(toys.logits(other), expected)
    assert torch.equal(toys.logits(again.merge(other)), expected)


def test_nothing_trains_nothing():
    adapter = Nothing()
    model = adapter.attach(toys.llama(), Start())
    assert not any(p.requires_grad for p in model.parameters())
    assert adapter.state(model) == {"tensors": {}, "extra": {}}
    with adapter.disabled(model):
        assert torch.equal(toys.logits(adapter.merge(model)), toys.logits(toys.llama()))
