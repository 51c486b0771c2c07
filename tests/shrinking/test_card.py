"""The card of a smaller base has the Hub's metadata, as those of runs have."""

from __future__ import annotations

import ast
import re

import pytest
from huggingface_hub import ModelCard

from trainer.shrinking import card

RECORD = {
    "method": "wanda",
    "pattern": "2:4",
    "part": "all",
    "rows": 128,
    "tokens": 4096,
    "before": {"parameters": 100, "nonzero": 100, "bytes": 200, "loss": 1.0, "perplexity": 2.7},
    "after": {"parameters": 100, "nonzero": 50, "bytes": 200, "loss": 1.5, "perplexity": 4.5},
    "layers_figures": [],
}


def config(base="Qwen/Qwen3-0.6B", rows="openai/gsm8k:main"):
    return {"base": {"path": base, "revision": None}, "task": {"path": rows}, "seed": 0}


def written(place, **settings):
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    card.write(place, "small", config(**settings), RECORD, 2e-7)
    return (place / "README.md").read_text("utf-8")


def test_the_hub_reads_base_data_and_figures(tmp_path):
    text = written(tmp_path / "out")
    data = ModelCard(text).data
    assert data.base_model == "Qwen/Qwen3-0.6B"
    assert data.library_name == "transformers"
    assert data.datasets == ["openai/gsm8k"]
    assert data.tags == ["graft", "pruned", "wanda"]
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {
        "loss": 1.5, "perplexity": 4.5,
    }  # fmt: skip
    assert "[Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B), shrunk by wanda" in text
    assert "2.0e-07 of their spread" in text
    assert "4,096 tokens) of openai/gsm8k" in text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(code)
    assert 'from_pretrained("ORG/NAME")' in text  # graft push and a reader put the name there


def test_a_base_that_code_makes_has_the_name_of_the_code(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    made = config() | {"base": {"_target_": "trainer.models.tiny.tiny"}}
    card.write(tmp_path, "small", made, RECORD, 2e-7)
    assert "\nThe base tiny, shrunk by wanda" in (tmp_path / "README.md").read_text("utf-8")


def test_a_small_divergence_keeps_its_digits():
    plain = RECORD | {"pattern": "unstructured", "density": 0.5}
    assert "layers keep 0.5 of each row: the other" in card.removed(plain)
    assert "layers have the pattern 2:4: the other" in card.removed(RECORD)
    search = {"pattern": "unstructured", "density": 0.5, "search": "evolution", "generations": 3}
    figures = {"divergence": 4.8928e-05, "divergence_uniform": 5.87815e-05}
    assert "4.89e-05 on the calibration rows. It is 5.88e-05" in card.removed(
        RECORD | search | figures
    )


@pytest.mark.parametrize("lineage", [None, "Qwen/Qwen3-0.6B"])
def test_a_base_in_a_folder_passes_its_licence_on(tmp_path, lineage):
    base = tmp_path / "private" / "base"
    base.mkdir(parents=True)
    line = f"base_model: {lineage}\n" if lineage else ""
    (base / "README.md").write_text(f"---\nlicense: apache-2.0\nlanguage: [en, de]\n{line}---\nx")
    text = written(tmp_path / "out", base=str(base), rows=str(tmp_path / "rows.jsonl"))
    data = ModelCard(text).data
    assert (data.license, data.language) == ("apache-2.0", ["en", "de"])
    assert data.get("base_model") == lineage
    assert data.get("datasets") is None
    assert "The base base, shrunk by wanda" in text
    assert "of rows.jsonl" in text
    assert str(tmp_path) not in text
    assert "private" not in text
