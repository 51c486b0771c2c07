"""Families of models: loaded, given an adapter, exported; the whole way of some of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftModel

from scripts.zoo import families, running, table
from scripts.zoo.checks import stock
from scripts.zoo.making import make
from tests.toys import adapters as toys
from tests.toys.families import logits, moved
from trainer.models.hub import from_hub

# of each kind: attention that is no sdpa, transposed layers, own forwards, shared experts, routers,
# recurrences, and bases for vision and language
LIGHT = [
    "qwen3",
    "gemma2",
    "gpt2",
    "falcon",
    "bloom",
    "phi3",
    "mixtral",
    "deepseek_v3",
    "llama4_text",
    "gpt_oss",
    "mamba2",
    "smolvlm",
]
WHOLE = ["llama", "qwen3_next", "gemma3", "mamba"]


@pytest.mark.parametrize("name", LIGHT)
def test_an_adapter_leaves_for_stock_peft(name, tmp_path):
    place = make(families.every()[name], tmp_path)
    base = from_hub(place.base, None, None, "auto", "auto", "none", True, False, [])
    model, adapter = base.load(torch.float32), toys.lora(target_modules="all-linear")
    plain = logits(model)
    torch.testing.assert_close(plain, logits(stock(place)), rtol=1e-3, atol=1e-4)
    model = moved(adapter, model)
    expected = logits(model)
    adapter.save(model, tmp_path / "adapter", "base", "CAUSAL_LM")
    loaded = PeftModel.from_pretrained(stock(place), tmp_path / "adapter").eval()
    lost = (logits(loaded) - expected).norm() / (expected - plain).norm()
    assert float(lost) < 1e-3


def test_there_are_families_of_each_kind():
    groups = [family.group for family in families.every().values()]
    assert len(groups) >= 45
    assert {"dense", "moe", "state", "vision"} <= set(groups)


def cells(**outcomes: str) -> dict[str, Any]:
    return {key: {"outcome": value, "text": f"{key} | why"} for key, value in outcomes.items()}


def test_a_cell_of_the_table_has_its_outcome_or_its_reason(tmp_path, monkeypatch):
    content = {"group": "dense", "checks": cells(load="ok", lora="refused", rosa="failed")}
    (tmp_path / "llama.json").write_text(json.dumps(content))
    monkeypatch.setattr(table, "PAGE", tmp_path / "page.md")
    table.write(tmp_path)
    page = (tmp_path / "page.md").read_text("utf-8")
    assert "| llama | ✓ | 1 | ✗ 2 |" in page
    assert "1. lora / why\n2. rosa / why" in page
    assert "1 ok, 1 refused, 1 failed" in page


def test_an_outcome_tells_a_refusal_from_a_fault(tmp_path):
    from trainer.models.base import BaseError

    def refused(place: Any) -> str:
        raise BaseError("no such thing")

    def late(place: Any) -> str:
        (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / "a" / "checkpoints" / "step.ckpt").touch()
        return refused(place)

    def fault(place: Any) -> str:
        raise RuntimeError("a traceback")

    place = families.Place(families.every()["llama"], "base", tmp_path / "rows", tmp_path)
    found = [
        running._outcome(check, place, "x", None)["outcome"]
        for check in (refused, fault, late, lambda _: "fine")
    ]
    assert found == ["refused", "failed", "failed", "ok"]  # a refusal after training is a fault


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_way(name, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    content = running.check_all(families.every()[name], tmp_path, tmp_path / "result.json")
    assert not [
        (key, cell["text"])
        for key, cell in content["checks"].items()
        if cell["outcome"] in ("failed", "skipped")
    ]
