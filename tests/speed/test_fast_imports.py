"""What is done before the libraries are imported."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.conftest import ROOT
from trainer.speed import fast_imports


@pytest.fixture(autouse=True)
def unfrozen():
    yield
    gc.unfreeze()


def test_swift_imports_collect_no_garbage(monkeypatch):
    frozen = gc.get_freeze_count()
    with fast_imports.without_gc():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen
    monkeypatch.setenv("GRAFT_PLAIN_IMPORTS", "1")
    with fast_imports.without_gc():
        assert gc.isenabled()


def test_a_function_is_compiled_when_it_is_called(monkeypatch):
    asked = []

    def compile(model=None, **options):
        asked.append(options)
        return lambda x: model(x) + 1

    monkeypatch.setattr(torch, "compile", compile)
    with fast_imports.lazy_compile():

        @torch.compile
        def bare(x):
            return x * 10

        @torch.compile(dynamic=False)
        def chosen(x):
            """Says what it does."""
            return x * 100

        assert asked == []
        torch.compile(nn.Linear(1, 1))  # an object has more to it than its call
        assert asked == [{}]
    assert torch.compile is compile
    assert [bare(1), bare(2), chosen(1), chosen(2)] == [11, 21, 101, 201]
    assert asked == [{}, {}, {"dynamic": False}]
    assert chosen.__doc__ == "Says what it does."


def test_torch_has_its_compile_back_after_an_error():
    plain = torch.compile
    with pytest.raises(ImportError), fast_imports.lazy_compile():
        raise ImportError
    assert torch.compile is plain


def test_who_wraps_torchs_compile_meanwhile_keeps_its_own(monkeypatch):
    asked = []

    def asked_at_once(x):
        return x

    monkeypatch.setattr(
        torch, "compile", lambda model=None, **options: asked.append((model, options))
    )
    with fast_imports.lazy_compile():
        inner = torch.compile

        def wrapped(*args, **options):
            return inner(*args, mine=True, **options)

        torch.compile = wrapped
    assert torch.compile is wrapped
    torch.compile(asked_at_once, dynamic=True)
    torch.compile(len)
    assert asked == [(asked_at_once, {"mine": True, "dynamic": True}), (len, {"mine": True})]


def test_bitsandbytes_does_not_bring_the_compiler():
    program = """
import sys
from trainer.speed import fast_imports
with fast_imports.lazy_compile():
    import bitsandbytes
print("torch._inductor.compile_fx" in sys.modules)
import torch
torch.compile(len)
print("torch._inductor.compile_fx" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_its_kernels_compute_the_same():
    """bitsandbytes' own compiled functions, called in a process that imported them so and in one
    that did not."""
    program = """
import torch
from trainer.speed import fast_imports
with fast_imports.lazy_compile():
    import bitsandbytes.functional as F
x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
q, state = F.quantize_4bit(x, quant_type="nf4")
b, more = F.quantize_blockwise(x)
print(q.sum(), F.dequantize_4bit(q, state).double().sum().item())
print(b.sum(), F.dequantize_blockwise(b, more).double().sum().item())
"""
    outputs = []
    for plain in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"GRAFT_PLAIN_IMPORTS": plain},
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
