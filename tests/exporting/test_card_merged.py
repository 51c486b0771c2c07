"""The card of merged runs has the Hub's metadata, as that of a run's adapter."""

from __future__ import annotations

import ast
import re

import pytest
from huggingface_hub import ModelCard

from tests.exporting.test_card import folder_of
from trainer.exporting import card_merged


def content(adapter, rows, base="HuggingFaceTB/SmolLM2-135M"):
    settings = {"base": {"path": base}, "task": {"path": rows}}
    return {"config": settings, "identity": {"choices": {"adapter": adapter}}}


def record(**changes):
    return {
        "runs": [{"given": "runs/private/maths@best"}, {"given": "runs/private/chats"}],
        "weights": [0.5, 0.25],
        "method": "cat",
        "density": None,
        "rank": None,
        "seed": 0,
        "logits_difference": 1.5e-6,
        "difference_from_weighted_sum": 0.0,
        "held_out_loss": [
            {"run": "runs/private/maths@best", "own": 1.0, "merged": 1.25},
            {"run": "runs/private/chats", "own": 2.0, "merged": 2.25},
        ],
    } | changes


CONTENTS = [content("lora", "openai/gsm8k:main"), content("rosa", ["a/b", "/home/x/rows.jsonl"])]


def text_of(place, contents=CONTENTS, **changes):
    card_merged.write(place, "both", contents, record(**changes))
    return (place / "README.md").read_text("utf-8")


def test_the_hub_reads_the_base_and_the_data_of_all_runs(tmp_path):
    text = text_of(folder_of(tmp_path / "out"))
    data = ModelCard(text).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.library_name == "peft"
    assert data.datasets == ["a/b", "openai/gsm8k"]
    assert data.tags == ["graft", "merge", "lora", "rosa"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", 1.75)  # the mean over the runs
    assert result.dataset_name == "openai/gsm8k, a/b, rows.jsonl, held out"
    assert re.search(r"\| maths@best +\| 0.5 +\| 1.0000 +\| 1.2500 +\|", text)
    assert "1.5e-06 of their spread" in text
    assert "the weighted sum of the runs' updates" in text
    assert "private" not in text
    assert "/home" not in text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(code)
    assert "--max-lora-rank 16" in text


@pytest.mark.parametrize("method", ["ties", "dare_linear_svd"])
def test_a_method_that_loses_some_says_so(tmp_path, method):
    text = text_of(
        folder_of(tmp_path / "out"),
        method=method,
        density=0.2,
        seed=3,
        held_out_loss=[],
        difference_from_weighted_sum=0.375,
    )
    assert f"The method is {method}, density=0.2, seed=3." in text
    assert "by 37.5% of its norm" in text
    assert ModelCard(text).data.eval_results is None


def test_a_base_of_this_machine_is_not_named_by_its_path(tmp_path):
    contents = [content("lora", "rows.jsonl", base="/home/x/bases/own")] * 2
    text = text_of(folder_of(tmp_path / "out"), contents)
    assert "for the base own as one" in text
    assert "path/to/base" in text
    assert "/home" not in text
    assert "base_model" not in ModelCard(text).data.to_dict()
