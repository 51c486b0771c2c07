"""LoRA against its formula in dense matrices, and against stock PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from adapters.delta import AdaptedLinear, Start
from adapters.linear import float_weight
from adapters.lora import LoRA, LoRAAdapter, scaling
from tests.toys import adapters as toys

# PEFT warns that merging an adapted, tied output layer would be wrong. Graft's merge is right.
TIED = pytest.mark.filterwarnings("ignore:Model.*tie_word_embeddings=True.*:UserWarning")


def make(**changes: Any) -> LoRAAdapter:
    return toys.lora(**{"alpha": 6.0, "dtype": "float64"} | changes)


def attached(adapter: LoRAAdapter, model: Any) -> Any:
    """The model with A and B both random, so that nothing is hidden behind a zero."""
    torch.manual_seed(3)
    adapter.attach(model, Start())
    for name, parameter in model.named_parameters():
        if name.endswith("delta.B"):
            nn.init.normal_(parameter, std=0.3)
    return model


def stock(adapter: LoRAAdapter, model: Any, base: Any, **settings: Any) -> Any:
    """Stock PEFT with the same A and B on `base`."""
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.rslora,
        target_modules=adapter.target_modules,
        **settings,
    )
    wrapped = peft.get_peft_model(base, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            own = name.removeprefix("base_model.model.").replace(
                ".lora_A.default.weight", ".delta.A"
            )
            parameter.data.copy_(
                model.get_parameter(own.replace(".lora_B.default.weight", ".delta.B")).data
            )
    return wrapped


def pairs(model: Any, wrapped: Any) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """A and B in both, in the same order."""
    ours = [p for p in model.parameters() if p.requires_grad]
    theirs = [p for p in wrapped.parameters() if p.requires_grad]
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    return list(zip(ours, theirs, strict=True))


def layer(
    o: int = 5,
    i: int = 7,
    rank: int = 3,
    bias: bool = True,
    dropout: float = 0.0,
    dtype=torch.float64,
) -> AdaptedLinear:
    torch.manual_seed(4)
    linear = nn.Linear(i, o, bias=bias, dtype=dtype).requires_grad_(False)
    delta = LoRA(
        linear, rank, 0.7, dropout, torch.float64 if dtype == torch.float64 else torch.float32
    )
    nn.init.normal_(delta.B)
    return AdaptedLinear(linear, delta)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [3, 11])
def test_one_layer_is_its_formula(bias, rank):
    adapted = layer(rank=rank, bias=bias)
    x = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 6, 5, dtype=torch.float64)
    y = adapted(x)
    (y * upstream).sum().backward()
    w, a, b = adapted.base.weight, adapted.delta.A.detach(), adapted.delta.B.detach()
    rows, gradients = x.detach().reshape(12, 7), upstream.reshape(12, 5)
    expected = torch.zeros(12, 5, dtype=torch.float64)
    wanted_a, wanted_b, wanted_x = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(rows)
    for t in range(12):
        expected[t] = w @ rows[t] + 0.7 * (b @ (a @ rows[t])) + (adapted.base.bias if bias else 0)
        wanted_b += 0.7 * torch.outer(gradients[t], a @ rows[t])
        wanted_a += 0.7 * torch.outer(b.T @ gradients[t], rows[t])
        wanted_x[t] = w.T @ gradients[t] + 0.7 * (a.T @ (b.T @ gradients[t]))
    torch.testing.assert_close(y.reshape(12, 5), expected)
    torch.testing.assert_close(adapted.delta.A.grad, wanted_a)
    torch.testing.assert_close(adapted.delta.B.grad, wanted_b)
    torch.testing.assert_close(x.grad.reshape(12, 7), wanted_x)
    assert adapted.base.weight.grad is None


def test_its_gradient_is_that_of_its_value():
    adapted = layer()
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)

    def of(x, a, b):
        return torch.func.functional_call(adapted, {"delta.A": a, "delta.B": b}, (x,))

    assert torch.autograd.gradcheck(of, (x, adapted.delta.A, adapted.delta.B))


@pytest.mark.long
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [4, 80])  # 80 is more than any layer has features
@pytest.mark.parametrize("bias", [False, True])
def test_stock_peft_computes_the_same(rslora, rank, bias):
    base = toys.llama(attention_bias=bias, mlp_bias=bias)
    for name, parameter in base.named_parameters():
        if name.endswith("proj.bias"):
            nn.init.normal_(parameter)
    adapter = make(rank=rank, rslora=rslora)
    model = attached(adapter, copy.deepcopy(base))
    wrapped = stock(adapter, model, base)
    torch.testing.assert_close(toys.logits(model), toys.logits(wrapped), rtol=0, atol=1e-12)
    toys.loss(model).backward()
    toys.loss(wrapped).backward()
    for ours, theirs in pairs(model, wrapped):
        assert ours.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("bias", [False, True])
def test_five_steps_of_training_are_stock_pefts(bias):
    adapter = make(dtype="float32")
    model = attached(adapter, toys.llama(torch.float32, attention_bias=bias))
    wrapped = stock(adapter, model, toys.llama(torch.float32, attention_bias=bias))
    before = [ours.detach().clone() for ours, _ in pairs(model, wrapped)]
    for trained in (model, wrapped):
        optimizer = torch.optim.AdamW(
            [p for p in trained.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
        )
        for _ in range(5):
            toys.loss(trained).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (ours, theirs), old in zip(pairs(model, wrapped), before, strict=True):
        assert (ours - old).abs().mean() > 1e-2  # AdamW moves by its rate in each step
        # Adam divides by the gradient's size, so that an entry with a gradient near 0 may turn
        # rounding into a visible move.
        assert (ours - theirs).abs().max() < 1e-3
        assert (ours - theirs).abs().mean() < 1e-6


def test_a_half_precision_base_keeps_a_and_b_in_fp32():
    adapted = layer(o=48, i=64, rank=8, dtype=torch.bfloat16)
    x = torch.randn(3, 10, 64, dtype=torch.bfloat16)
    upstream = torch.randn(3, 10, 48, dtype=torch.bfloat16)
    y = adapted(x)
    y.backward(upstream)
    exact = copy.deepcopy(adapted).double()
    exact.zero_grad()
    expected = exact(x.double())
    expected.backward(upstream.double())
    assert y.dtype == torch.bfloat16
    assert adapted.delta.A.grad.dtype == adapted.delta.B.grad.dtype == torch.float32
    # bf16 keeps 8 bits, and a result passes through at most four such roundings: of A or B, of x
    # Aᵀ, of the sum, of the result.
    for got, right in (
        (y, expected),
        (adapted.delta.A.grad, exact.delta.A.grad),
        (adapted.delta.B.grad, exact.delta.B.grad),
    ):
        assert right.abs().max() > 0
        assert (got.double() - right).abs().max() < 4 * 2**-8 * right.abs().max()


def test_under_autocast_the_products_are_bf16_and_gradients_fp32():
    adapted = layer(o=48, i=64, rank=8, dtype=torch.float32)
    x = torch.randn(3, 10, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x)
    y.float().square().sum().backward()
    exact = copy.deepcopy(adapted).double()
    expected = exact(x.double())
    assert y.dtype == torch.bfloat16
    assert adapted.delta.A.grad.dtype == adapted.delta.B.grad.dtype == torch.float32
    assert (y.double() - expected).abs().max() < 4 * 2**-8 * expected.abs().max()
    assert (y.double() - expected).abs().max() > 0


def test_dropout_falls_on_the_adapters_input_only():
    adapted = layer(dropout=0.5)
    x = torch.randn(9, 7, dtype=torch.float64)
    frozen = adapted.base(x)
    torch.manual_seed(5)
    y = adapted.train()(x)
    torch.manual_seed(5)
    stored = F.dropout(x, 0.5)
    torch.testing.assert_close(y, frozen + 0.7 * stored @ adapted.delta.A.T @ adapted.delta.B.T)
    assert not torch.equal(adapted(x), y)
    torch.testing.assert_close(
        adapted.eval()(x), frozen + 0.7 * x @ adapted.delta.A.T @ adapted.delta.B.T
    )
    assert torch.equal(adapted(x), adapted(x))


def test_gpt2s_transposed_layers(tmp_path):
    adapter = make()
    model = attached(adapter, toys.gpt2())
    wrapped = stock(adapter, model, toys.gpt2(), fan_in_fan_out=True)
    torch.testing.assert_close(toys.logits(model), toys.logits(wrapped), rtol=0, atol=1e-12)
    assert not torch.allclose(toys.logits(model), toys.logits(toys.gpt2()), atol=1e-2)
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    loaded = peft.PeftModel.from_pretrained(toys.gpt2(), tmp_path)
    torch.testing.assert_close(toys.logits(loaded), toys.logits(model), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        toys.logits(adapter.merge(model)), toys.logits(loaded), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("nf4", 1e-5),  # the dequantised weight is what computes
        ("int8", 0.02),  # inputs are rounded to 8 bits too, 1/127 of each row's largest
    ],
)
def test_quantised_bases_answer_as_their_dequantised_weights_and_the_update(
    tmp_path, kind, tolerance
):
    toys.llama(torch.float32).save_pretrained(tmp_path)
    adapter = make(dtype="float32")
    model = attached(adapter, toys.quantised(tmp_path, kind))
    adapted = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 6, 64, requires_grad=True)
    upstream = torch.randn(2, 6, 128)
    y = adapted(x)
    y.backward(upstream)
    w = float_weight(adapted.base).double()
    a, b = adapted.delta.A.detach().double(), adapted.delta.B.detach().double()
    dense = w + scaling(adapter.rank, adapter.alpha, adapter.rslora) * b @ a
    expected = x.detach().double() @ dense.T
    assert (y - expected).abs().max() < tolerance * expected.abs().max()
    wanted_x = upstream.double() @ dense
    assert (x.grad - wanted_x).abs().max() < tolerance * wanted_x.abs().max()
    rows, gradients = x.detach().double().reshape(12, 64), upstream.double().reshape(12, 128)
    torch.testing.assert_close(
        adapted.delta.B.grad.double(),
        scaling(adapter.rank, adapter.alpha, adapter.rslora) * gradients.T @ (rows @ a.T),
        rtol=1e-4,
        atol=1e-4,
    )
    plain = toys.llama(torch.float32).model.layers[0].mlp.up_proj.weight
    # it was rounded, and is the same weight still
    assert 0 < (w - plain).abs().max() < 0.3 * plain.abs().max()


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_lora_plus_rates_are_stock_pefts(ratio):
    adapter = make(lr_ratio=ratio)
    model = attached(adapter, toys.llama())
    rates = {
        name: 1e-3 * group["lr_scale"]
        for group in adapter.parameter_groups(model)
        for name, p in model.named_parameters()
        if any(p is q for q in group["params"])
    }
    wrapped = stock(adapter, model, toys.llama())
    optimizer = create_loraplus_optimizer(
        wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio
    )
    theirs = {
        name.removeprefix("base_model.model.")
        .replace(".lora_A.default.weight", ".delta.A")
        .replace(".lora_B.default.weight", ".delta.B"): group["lr"]
        for group in optimizer.param_groups
        for name, p in wrapped.named_parameters()
        if any(p is q for q in group["params"])
    }
    assert rates == pytest.approx(theirs)
    assert set(rates.values()) == {1e-3, 1e-3 * ratio}
    assert len(rates) == 2 * 2 * 7


@pytest.mark.parametrize(
    ("expected", "saved"),
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (
            "all-linear",
            ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        ),
        (r"model\.layers\.1\..*\.q_proj", ["model.layers.1.self_attn.q_proj"]),
        (["layers.0.mlp.up_proj", "lm_head"], ["lm_head", "model.layers.0.mlp.up_proj"]),
    ],
)
@TIED
def test_saved_names_mean_the_adapted_layers_and_no_others(tmp_path, expected, saved):
    adapter = make(target_modules=expected)
    model = attached(adapter, toys.llama())
    adapter.save(model, tmp_path, "base", "CAUSAL_LM")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == saved
    adapted = {name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    loaded = peft.PeftModel.from_pretrained(toys.llama(), tmp_path)
    layers = {
        name
        for name, module in loaded.get_base_model().named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert layers == adapted
    torch.testing.assert_close(toys.logits(loaded), toys.logits(model), rtol=0, atol=1e-12)


def test_on_a_tied_output_layer_a_merge_leaves_the_embedding_alone(tmp_path):
    adapter = make(target_modules=["lm_head", "q_proj"])
    model = attached(adapter, toys.llama())
    expected = toys.logits(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    merged: Any = adapter.merge(model)
    torch.testing.assert_close(toys.logits(merged), expected, rtol=0, atol=1e-12)
    assert torch.equal(merged.model.embed_tokens.weight, toys.llama().model.embed_tokens.weight)
    merged.float().save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    torch.testing.assert_close(toys.logits(loaded).double(), expected, rtol=0, atol=1e-4)


def test_the_saved_files_are_the_same_each_time(tmp_path: Path):
    adapter = make(dtype="float32")
    model = attached(adapter, toys.llama(torch.float32))
    first, second = tmp_path / "first", tmp_path / "second"
    adapter.save(model, first, "base", "CAUSAL_LM")
    adapter.save(model, second, "base", "CAUSAL_LM")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    config = json.loads((first / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"], config["r"]) == (
        "base",
        "CAUSAL_LM",
        4,
    )
    saved = load_file(first / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 7
    assert torch.equal(
        saved["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"],
        model.model.layers[0].mlp.up_proj.delta.B,
    )
