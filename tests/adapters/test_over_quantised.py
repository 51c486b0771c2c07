"""LoRA over a quantised layer as one operation, against stock PEFT's and against two operations."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn

from adapters import over_quantised
from adapters.delta import AdaptedLinear, Recompute
from adapters.lora import LoRA

KINDS = ("nf4", "nf4_double", "fp4", "int8")


def base(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    """A frozen layer from 64 to 96, as a model in training has it."""
    plain = nn.Linear(64, 96, bias).to(dtype)
    if kind == "int8":
        layer: Any = bnb.nn.Linear8bitLt(64, 96, bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(
            plain.weight.detach(), requires_grad=False, has_fp16_weights=False
        )
    else:
        layer = bnb.nn.Linear4bit(
            64, 96, bias, compute_dtype=dtype, compress_statistics=kind == "nf4_double",
            quant_type=kind[:3],
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(
            plain.weight.detach(), False, quant_type=kind[:3],
            compress_statistics=kind == "nf4_double",
        )  # fmt: skip
        layer.support_avx512bf16_for_cpu = False
    if bias:
        layer.bias = nn.Parameter(plain.bias.detach(), requires_grad=False)
    return layer.to("cpu").train()


def adapted(layer: Any, fused: bool, dropout: float = 0.0) -> AdaptedLinear:
    delta = LoRA(layer, 4, 0.7, dropout, torch.float32, fused)
    nn.init.normal_(delta.B)
    return AdaptedLinear(layer, delta).train()


def results(module: Any, x: Tensor, upstream: Tensor, parameters: Any) -> list[Tensor]:
    """y, dx, dA and dB."""
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], upstream)]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_stock_pefts_layer(kind):
    layer = base(kind)
    ours = adapted(layer, True)
    assert over_quantised.supports(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind != "int8", kind == "int8"
        settings = peft.LoraConfig(r=4, lora_alpha=2.8, target_modules=["layer"])
        stock: Any = peft.inject_adapter_in_model(settings, model).train()
    theirs: Any = stock["layer"]
    assert type(theirs).__module__ == "peft.tuners.lora.bnb"
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(ours.delta.A)
        b.copy_(ours.delta.B)
    x, upstream = torch.randn(3, 5, 64), torch.randn(3, 5, 96)
    actual = results(ours, x, upstream, [ours.delta.A, ours.delta.B])
    for mine, expected in zip(actual, results(theirs, x, upstream, [a, b]), strict=True):
        # Sums in another order: one gradient of A differed by 1.1e-5, of up to 88.
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_one_operation_is_two(kind, dtype):
    layer = base(kind, dtype, bias=kind != "fp4")
    one = adapted(layer, True)
    two = AdaptedLinear(layer, copy.deepcopy(one.delta))
    two.delta.fused = False
    x, upstream = (torch.randn(2, 9, n).to(dtype) for n in (64, 96))
    # sums in another order: some last bits of the compute dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    pairs = [results(m, x, upstream, [m.delta.A, m.delta.B]) for m in (one, two)]
    for mine, expected in zip(*pairs, strict=True):
        assert mine.dtype == expected.dtype
        assert (mine - expected).abs().max() <= tolerance * expected.abs().max()
    no_dx = one(x)
    torch.testing.assert_close(
        torch.autograd.grad(no_dx, one.delta.B, upstream)[0], pairs[0][3], rtol=0, atol=0
    )


def saved_bytes(module: Any, x: Any, recipe: bool) -> int:
    """The bytes that a forward pass keeps of activations."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() > 96 * 64:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        source = x.clone().requires_grad_()
        h = source * source  # which saves source
        if recipe:
            h.recompute = Recompute(torch.square, (source.detach(),))
        module(h)
    return sum(kept.values())


def test_an_input_that_can_be_recomputed_is_not_saved():
    layer = base("nf4")
    one, two = adapted(layer, True), adapted(layer, False)
    x = torch.randn(400, 64)
    assert saved_bytes(one, x, True) < saved_bytes(two, x, True)
    recomputed = x * 2.0
    recomputed.recompute = Recompute(lambda t: t * 2.0, (x,))  # type: ignore[attr-defined]
    expected = torch.autograd.grad(one(x * 2.0).sum(), one.delta.A)[0]
    assert torch.equal(torch.autograd.grad(one(recomputed).sum(), one.delta.A)[0], expected)


def test_dropout_autocast_and_other_layers_take_two_operations(monkeypatch):
    calls: list[int] = []
    apply = over_quantised.OverQuantised.apply
    monkeypatch.setattr(
        over_quantised.OverQuantised, "apply", lambda *a: (calls.append(1), apply(*a))[1]
    )
    layer = base("nf4")
    x = torch.randn(2, 64, requires_grad=True)
    adapted(layer, True)(x)
    assert calls == [1]
    adapted(layer, False)(x)
    adapted(layer, True, dropout=0.5)(x)
    with torch.autocast("cpu", torch.bfloat16):
        adapted(layer, True)(x)
    trained = nn.Linear(64, 96)
    adapted(trained, True)(x)
    assert calls == [1]
    assert not over_quantised.supports(trained)
