"""Liger's kernels in a model, against the plain modules: by Triton's interpreter on a CPU, where no
GPU is needed."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from adapters.delta import Start
from adapters.full import Full
from tests.conftest import ROOT
from tests.toys import adapters as toys
from trainer.config import compose
from trainer.config.errors import ConfigError
from trainer.models.losses import CausalLoss
from trainer.speed import fused, liger

INSTALLED = (
    importlib.util.find_spec("liger_kernel") is not None
    and importlib.util.find_spec("triton") is not None
)
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="started by test_the_kernels_by_tritons_interpreter"
)


def test_without_its_packages_it_is_refused(monkeypatch):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    fault = liger.fault("llama", True)
    assert "pip install 'liger-kernel" in fault


def test_without_a_gpu_or_kernels_for_the_model_it_is_refused(monkeypatch):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(liger, "known", lambda: frozenset({"llama", "qwen3"}))
    fault = liger.fault("llama", False, "cpu")
    assert "lightning.accelerator=cpu" in fault
    assert "fused=true" in fault
    fault = liger.fault("gpt2", True)
    assert "gpt2" in fault
    assert "llama, qwen3" in fault
    assert liger.fault("llama", True) is None


def test_it_is_refused_with_what_it_has_not_been_tried_with():
    with pytest.raises(ConfigError) as refused:
        compose.compose(
            ["base=tiny", "task.path=rows", "fused=liger", "lightning=cpu", "compile=true"]
        )
    assert "set fused=true with lightning.accelerator=cpu" in str(refused.value)
    assert "compile=false" in str(refused.value)


@pytest.mark.skipif(
    not INSTALLED or INTERPRETED,
    reason="needs liger-kernel and triton: pip install 'graft-trainer[liger]'",
)
def test_the_kernels_by_tritons_interpreter():
    # Triton reads the variable when it is imported, and other tests may have done that.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture
def kernels(monkeypatch):
    """What Triton's interpreter lacks: it hands numbers to a kernel as Python's, and has no
    functions of CUDA's libdevice."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    plain = interpreter._implicit_cvt

    def converted(value):
        if isinstance(value, float):
            return tl.tensor(
                interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32),
                tl.float32,
            )
        return plain(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.math.rsqrt(x))


def batch(packed: bool) -> dict[str, Any]:
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(2))
    actual: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    if packed:
        actual["position_ids"] = torch.stack(
            [torch.cat([torch.arange(n), torch.arange(7 - n)]) for n in (3, 5)]
        )
    return actual


def family(name: str, dtype: torch.dtype) -> Any:
    if name == "llama":
        model: Any = toys.llama(
            torch.float32, vocab_size=97, hidden_size=24, intermediate_size=40
        ).to(dtype)
    else:
        torch.manual_seed(0)
        shape = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "head_dim": 8,
        }
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(vocab_size=97, num_key_value_heads=2, **shape)
        ).to(dtype)
    for norm, parameter in model.named_parameters():
        if "norm" in norm:
            nn.init.normal_(
                parameter, mean=1.0, std=0.2, generator=torch.Generator().manual_seed(1)
            )
    return model


def trained(model: Any, adapter: Any, packed: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of an adapter on a model."""
    model = adapter.attach(model, Start()).train()
    for name, parameter in model.named_parameters():
        if name.endswith((".A", ".B")):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    loss, _ = CausalLoss(model, 8)(batch(packed))
    loss.backward()
    return float(loss.detach()), {
        name: p.grad for name, p in model.named_parameters() if p.requires_grad
    }


@interpreted
@pytest.mark.parametrize(
    ("name", "adapter", "packed", "dtype", "tolerance"),
    [
        ("llama", toys.lora(), False, torch.float32, 1e-5),
        ("llama", toys.lora(fused=False), True, torch.float32, 1e-5),
        # the interpreter multiplies bf16 as if it were integers
        ("llama", toys.lora(), True, torch.float16, 3e-3),
        ("qwen3", toys.lora(), True, torch.float32, 1e-5),
        ("llama", Full(), False, torch.float32, 1e-5),  # norms are trained, too
    ],
)
def test_a_model_trains_the_same(kernels, name, adapter, packed, dtype, tolerance):
    plain = family(name, dtype)
    ours = copy.deepcopy(plain)
    exact = copy.deepcopy(plain).float()
    layers = len(plain.model.layers)
    assert liger.put_in(ours) == {
        "norms": (4 if name == "qwen3" else 2) * layers + 1,
        "gates": layers,
        "rotations": layers,
    }
    assert [*ours.state_dict()] == [*plain.state_dict()]
    wanted_loss, expected = trained(exact, adapter, packed)
    loss, actual = trained(ours, adapter, packed)
    assert loss == pytest.approx(wanted_loss, rel=tolerance)
    assert actual.keys() == expected.keys()
    errors = {
        key: float((actual[key].float() - expected[key]).norm() / expected[key].norm())
        for key in expected
    }
    if dtype == torch.float32:
        assert max(errors.values()) < tolerance
    else:  # as near as the plain modules come in this dtype
        _, theirs = trained(plain, adapter, packed)
        for key, error in errors.items():
            assert error < max(
                tolerance,
                1.5 * float((theirs[key].float() - expected[key]).norm() / expected[key].norm()),
            ), key


@interpreted
def test_other_models_of_the_family_are_left_alone(kernels):
    before = [dict(vars(modeling)) for modeling in (modeling_llama, modeling_qwen3)]
    for name in ("llama", "qwen3"):
        liger.put_in(family(name, torch.float32))
    assert [dict(vars(modeling)) for modeling in (modeling_llama, modeling_qwen3)] == before
    other = family("llama", torch.float32)
    assert not any("forward" in vars(module) for module in other.modules())
    assert fused.fuse(other)["gates"] == len(other.model.layers)


@interpreted
def test_a_norm_leaves_the_gradient_that_came_as_it_was(kernels):
    model = family("llama", torch.float32)
    liger.put_in(model)
    x = torch.randn(3, 24, requires_grad=True)
    came = torch.randn(3, 24)
    as_it_was = came.clone()
    torch.autograd.grad(model.model.norm(x), x, came)
    assert torch.equal(came, as_it_was)


@interpreted
def test_what_its_packages_know():
    assert {"llama", "qwen3", "mistral"} <= liger.known()
    torch.manual_seed(0)
    gpt: Any = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    )
    assert gpt.config.model_type not in liger.known()
    fault = liger.fault("gpt2", True)
    assert "gpt2" in fault


@pytest.mark.gpu
def test_on_a_gpu_a_model_trains_the_same():
    plain = family("llama", torch.float32).cuda()
    ours = copy.deepcopy(plain)
    liger.put_in(ours)
    rows = {name: tensor.cuda() for name, tensor in batch(True).items()}
    actual = []
    for model in (plain, ours):
        torch.manual_seed(0)
        model = toys.lora().attach(model, Start()).train()
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                nn.init.normal_(parameter, std=0.1)
        loss, _ = CausalLoss(model, 8)(rows)
        loss.backward()
        actual.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(actual[1], actual[0], rtol=1e-3, atol=1e-5)
