"""Compiled layers against the plain ones: the same numbers, for all lengths, in training only."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.delta import Start
from adapters.full import Full
from adapters.peft import Peft
from adapters.rosa import RoSAAdapter
from tests.conftest import ROOT
from tests.toys import adapters as toys
from trainer.config.errors import ConfigError
from trainer.models.losses import CausalLoss
from trainer.speed import attention, fused
from trainer.speed.compile import compile_layers, refuse
from trainer.storage import journal


def built(kind: str, dropout: float = 0.0) -> nn.Module:
    model = toys.llama(torch.float32, num_hidden_layers=3)
    fused.fuse(model)
    torch.manual_seed(0)
    if kind == "ours":
        model = toys.lora(dropout=dropout).attach(model, Start())
    elif kind == "stock":
        model = Peft("LORA", 0, r=4, lora_dropout=dropout, target_modules="all-linear").attach(
            model, Start()
        )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".B") or "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(B: int, T: int, packed: bool = False) -> dict[str, Any]:
    ids = torch.randint(0, 60, (B, T), generator=torch.Generator().manual_seed(T))
    actual: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    if packed:
        actual["position_ids"] = (torch.arange(T) % 7).expand(B, T)
    return actual


def results(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    loss, _ = CausalLoss(model, None)(batch)
    loss.backward()
    return {"loss": loss.detach()} | {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def parity(kind: str, backend: str) -> None:
    """In a process of its own: the tests' checks of shapes are nothing that can be traced."""
    torch.compile = functools.partial(torch.compile, backend=backend)
    plain, model = built(kind), built(kind)
    assert compile_layers(model) == 2
    graphs = []
    for B, T, packed in (
        (2, 17, False),
        (3, 30, True),
        (2, 9, True),
        (4, 70, False),
        (2, 130, True),
    ):
        expected, actual = results(plain, batch(B, T, packed)), results(model, batch(B, T, packed))
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(
                actual[name],
                expected[name],
                rtol=1e-4,
                atol=1e-5 * float(expected[name].abs().max()),
            )
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] <= graphs[1] == graphs[-1]  # lengths are symbols
    with torch.no_grad():
        CausalLoss(model.eval(), None)(batch(5, 11))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend"), [("ours", "inductor"), ("stock", "aot_eager"), ("full", "aot_eager")]
)
def test_the_same_numbers_for_all_lengths_from_few_graphs(kind, backend):
    refuse(Full(), torch.device("cpu"))
    code = f"from tests.speed.test_compile import parity; parity({kind!r}, {backend!r})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(900)  # four runs that compile
def test_a_compiled_run_learns_the_same_and_goes_on_as_the_same(program, chats):
    def losses(name: str, *overrides: str) -> list[float]:
        task = (
            f"task.path={chats}",
            "schedule=constant",
            "batch_size=4",
            "callbacks.evaluation=null",
            f"name={name}",
        )
        ran = program("+experiment=smoke", *task, *overrides, timeout=600)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return [
            row["loss"]
            for row in journal.read(chats.parent / "runs" / name / "metrics.jsonl")
            if row["kind"] == "step"
        ]

    expected, whole = (
        losses("plain", "max_steps=5"),
        losses("compiled", "max_steps=5", "compile=true"),
    )
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    assert losses("cut", "max_steps=3", "compile=true") == whole[:3]
    assert losses("cut", "max_steps=5", "compile=true", "resume=auto") == whole


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_evaluation_and_the_first_layer_are_plain():
    model = built("ours")
    names = list(model.state_dict())
    compile_layers(model)
    torch._dynamo.utils.counters.clear()
    assert list(model.state_dict()) == names
    with torch.no_grad():
        CausalLoss(model.eval(), None)(batch(2, 17))
    assert not torch._dynamo.utils.counters["stats"]
    layers: Any = model.get_submodule("model.layers")
    assert ["forward" in vars(layer) for layer in layers] == [False, True, True]
    attention.ALL_ATTENTION_FUNCTIONS.register(
        attention.BLOCKED, attention.blocked_attention_forward
    )


def test_what_cannot_be_compiled_is_refused(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    refuse(Full(), cpu)
    with pytest.raises(
        ConfigError,
        match="RoSAAdapter changes weights and gradients by code that cannot be compiled",
    ):
        refuse(RoSAAdapter.__new__(RoSAAdapter), cpu)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(
        ConfigError, match=r"a C\+\+ compiler is needed, and .*none is not installed"
    ):
        refuse(Full(), cpu)
    refuse(Full(), torch.device("cuda"))
    with pytest.raises(ConfigError, match="Linear does not say which modules are its layers"):
        compile_layers(nn.Linear(2, 2))
