"""Norms, gates and models of the trainer against what transformers and plain loops compute."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Qwen3Config

from adapters.delta import AdaptedLinear, Start, saved_for_backward
from adapters.lora import LoRA
from adapters.rosa import RoSA
from tests.toys import adapters as toys
from trainer.models.losses import CausalLoss
from trainer.speed import fused, malloc


def test_norms_and_gates_by_gradcheck():
    torch.manual_seed(0)
    x, w = (
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(5, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda x, w: fused.rms_norm(x, w, 1e-3), (x, w))
    expected = torch.stack(
        [w * row / math.sqrt(float((row * row).mean()) + 1e-3) for row in x.detach()]
    )
    torch.testing.assert_close(fused.rms_norm(x, w, 1e-3), expected)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(fused.swiglu, (gate, up))
    torch.testing.assert_close(fused.swiglu(gate, up), gate / (1 + (-gate).exp()) * up)


def grads(
    model: Any, batch: dict[str, Any], **changes: Any
) -> tuple[float, dict[str, torch.Tensor], int]:
    """(loss, gradients, bytes that wait for the backward pass) of a LoRA on a model."""
    torch.manual_seed(1)
    model = toys.lora(**changes).attach(model, Start()).train()
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.1)
    seen: dict[int, int] = {}
    alive = []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = CausalLoss(model, 8)(batch)
    loss.backward()
    return (
        float(loss.detach()),
        {n: p.grad for n, p in model.named_parameters() if p.requires_grad},
        sum(seen.values()),
    )


def rows(packed: bool = False) -> dict[str, Any]:
    torch.manual_seed(2)
    ids = torch.randint(3, 90, (2, 80))
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    if packed:
        batch["position_ids"] = torch.stack(
            [torch.cat([torch.arange(n), torch.arange(80 - n)]) for n in (30, 55)]
        )
    return batch


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_trains_the_same(family, packed):
    if family == "llama":
        plain: Any = toys.llama(torch.float32, vocab_size=97)
    else:
        shape = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "head_dim": 8,
        }
        plain = AutoModelForCausalLM.from_config(
            Qwen3Config(vocab_size=97, num_key_value_heads=2, **shape)
        )
    ours = copy.deepcopy(plain)
    counts = fused.fuse(ours)
    assert counts["attention"] == counts["gates"] == len(ours.model.layers)
    assert counts["norms"] >= 2 * len(ours.model.layers) + 1
    assert list(ours.state_dict()) == list(plain.state_dict())
    loss, expected, before = grads(plain, rows(packed), fused=False)
    found_loss, actual, after = grads(ours, rows(packed))
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert actual.keys() == expected.keys()
    for name in expected:
        # fp32's rounding is that of the largest numbers in a sum: either gradient is off by 3e-6 of
        # the largest from one in fp64.
        atol = 2e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=atol)
    assert after < 0.9 * before  # of numbers in fp32 less is saved than of bf16's


def test_generation_is_that_of_the_plain_model():
    plain: Any = toys.llama(torch.float32, vocab_size=97).eval()
    ours = copy.deepcopy(plain)
    fused.fuse(ours)
    ids = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(0))
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert ours.generate(ids, **arguments).tolist() == plain.generate(ids, **arguments).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_another_formula_is_left_alone(dtype):
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.randn(16, dtype=dtype)), 1e-6

        def forward(self, x):
            return (1 + self.weight) * x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()

    llama: Any = toys.llama(dtype)
    llama.model.norm = OddRMSNorm()
    fused.fuse(llama)
    assert "forward" not in vars(llama.model.norm)
    assert "forward" in vars(llama.model.layers[0].input_layernorm)


def test_what_computes_otherwise_is_left_alone():
    gemma: Any = AutoModelForCausalLM.from_config(
        Gemma2Config(
            vocab_size=97,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            attn_implementation="eager",
        )
    )
    # 1 + w, GELU, and a soft cap
    assert fused.fuse(gemma) == {"attention": 0, "norms": 0, "gates": 0}
    gpt: Any = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    )
    ids = torch.randint(3, 90, (1, 7))
    expected = gpt.eval()(ids).logits
    counts = fused.fuse(gpt)
    assert counts["norms"] == counts["gates"] == 0
    torch.testing.assert_close(gpt(ids).logits, expected)


def test_attention_dropout_is_transformers_own():
    model: Any = toys.llama(torch.float32, vocab_size=97, attention_dropout=0.5).train()
    fused.fuse(model)
    ids = rows()["input_ids"]
    with torch.no_grad():
        first, second = (model(ids).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_nothing_below_the_lowest_adapted_layer_has_a_backward_pass():
    model: Any = toys.llama(torch.float32, vocab_size=97)
    fused.fuse(model)
    last = len(model.model.layers) - 1
    toys.lora(target_modules=rf".*layers\.{last}\..*_proj").attach(model, Start()).train()
    needs: dict[str, bool] = {}
    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            module.register_forward_hook(
                lambda _, __, out, name=name: needs.update({name: out.requires_grad})
            )
    CausalLoss(model, 8)(rows())[0].backward()
    assert needs == {f"model.layers.{i}.mlp.down_proj": i == last for i in range(last + 1)}


def test_a_lora_keeps_what_its_input_is_made_of():
    gate, up = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    h = fused.swiglu(gate, up)
    make, *tensors = saved_for_backward(h)
    torch.testing.assert_close(make(*tensors), h.detach(), rtol=0, atol=0)
    assert [t.data_ptr() for t in tensors] == [gate.data_ptr(), up.data_ptr()]
    assert saved_for_backward(gate) == (None,)


def test_whoever_sets_the_allocator_decides(monkeypatch):
    for name in malloc.USER_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError()))
    assert not malloc.keep_freed()
    calls = []

    class Library:
        def mallopt(self, name, value):
            calls.append((name, value))
            return 1

    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: Library())
    assert malloc.keep_freed()
    assert dict(calls) == {-3: 1 << 30, -1: 2**31 - 1}
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert not malloc.keep_freed()
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["lora", "rosa"])
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_behind_a_gate_train_the_same(kind, autocast):
    torch.manual_seed(0)
    base = nn.Linear(12, 5).requires_grad_(False)
    if kind == "lora":
        delta: Any = LoRA(base, 3, 0.5, 0.0, torch.float32)
    else:
        delta = RoSA(base, 20, 3, 0.5, 0.0, torch.float32, torch.float32)
        delta.set_support(torch.arange(20) * 3, base)
    layer = AdaptedLinear(base, delta).train()
    nn.init.normal_(delta.B)
    inputs = [torch.randn(2, 7, 12, requires_grad=True) for _ in range(2)]
    trained = [p for p in layer.parameters() if p.requires_grad]
    actual = []
    for gated in (fused.swiglu, lambda gate, up: nn.functional.silu(gate) * up):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(gated(*inputs))
        actual.append([out, *torch.autograd.grad(out.float().square().sum(), [*inputs, *trained])])
    for ours, plain in zip(*actual, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_segments_grow_unless_the_user_has_decided():
    environment: dict[str, str] = {}
    assert malloc.expand_segments(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in malloc.SEGMENTS:
        environment = {name: "backend:native"}
        assert not malloc.expand_segments(environment)
        assert environment == {name: "backend:native"}
