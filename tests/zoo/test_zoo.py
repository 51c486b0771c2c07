"""Families of models: loaded, given an adapter, exported; the whole way of some of them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from peft import PeftModel

from scripts.zoo import families, running, table
from scripts.zoo.__main__ import RESULTS
from scripts.zoo.checks import ROOT, stock
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


@pytest.mark.long
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
    assert {"dense", "moe", "state", "more", "vision", "encoder", "pairs"} == set(groups)


def cells(**outcomes: str) -> dict[str, Any]:
    return {key: {"outcome": value, "text": f"{key} | why"} for key, value in outcomes.items()}


def test_a_cell_of_the_table_has_its_outcome_or_its_reason(tmp_path, monkeypatch):
    content = {"group": "dense", "checks": cells(load="ok", lora="refused", rosa="failed")}
    (tmp_path / "llama.json").write_text(json.dumps(content))
    monkeypatch.setattr(table, "PAGE", tmp_path / "page.md")
    table.write(tmp_path)
    page = (tmp_path / "page.md").read_text("utf-8")
    assert "| llama | ✓ | 1 | ✗ 2 |" in page
    assert "1. Lora / why\n2. Rosa / why" in page
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
    actual = [
        running._outcome(check, place, "x", None)["outcome"]
        for check in (refused, fault, late, lambda _: "fine")
    ]
    assert actual == ["refused", "failed", "failed", "ok"]  # a refusal after training is a fault


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


def test_the_page_is_that_of_the_results_and_of_all_families():
    page = table.PAGE.read_text("utf-8")
    assert re.findall(r"^\| ([\w-]+) \| ", page, re.MULTILINE) == sorted_by_group(families.every())
    assert versions_out(page) == versions_out(table.page(RESULTS))
    count = table.distinct(families.every())
    assert f"{count} families" in (ROOT / "README.md").read_text("utf-8")
    assert not [line for line in page.splitlines() if "| ✗" in line]  # nothing fails


def sorted_by_group(every: dict[str, Any]) -> list[str]:
    """The families in the order of the page, after the heading of each table."""
    groups = dict.fromkeys(family.group for family in every.values())
    return [
        name
        for group in groups
        for name in ["family", *(n for n, family in every.items() if family.group == group)]
    ]


def versions_out(page: str) -> str:
    return re.sub(r"transformers [\w.]+\s+and\s+PEFT\s+[\w.]+", "", page)


def test_every_check_has_its_column_and_every_group_its_heading():
    for family in families.every().values():
        assert family.group in table.GROUPS
        assert set(family.checks) <= set(table.COLUMNS)


def test_a_reason_is_that_of_all_families():
    one = table.plain("MptForCausalLM has no x: set y. (logits differ by 2.69 of 3.9) <b> | c")
    assert one == "The model has no x: set y. (b) / c"


def test_some_checks_may_run_again(tmp_path, monkeypatch, capsys):
    from scripts.zoo import __main__ as program

    runs: list[tuple[str, list[str], bool]] = []

    def run(family: Any, results: Any, log: Any, keep: bool) -> dict[str, Any]:
        runs.append((family.name, list(family.checks), keep))
        return {"checks": {}}

    monkeypatch.setattr(running, "run", run)
    assert program.main(["llama", "bert", "checks=generate", f"results={tmp_path}"]) == 0
    assert runs == [("llama", ["lora", "generate"], True)]  # it needs the other's run
    assert program.main(["checks=generat", f"results={tmp_path}"]) == 2
    assert "generat: unknown" in capsys.readouterr().err
