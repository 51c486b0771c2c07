"""Model cards: what the Hub reads is right, what a reader runs is right, and nothing of this
machine is in them."""

from __future__ import annotations

import ast
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.conftest import ROOT
from tests.session.test_compared import make
from tests.session.test_report_html import NASTY
from trainer.exporting import card, card_loading

OLD = ROOT / "tests" / "data" / "runs_0.1" / "runs"
SECRET = "hf_" + "a1B2" * 8
FORMATS = [
    "adapter",
    "shira",
    "merged",
    "gguf",
    "gguf_lora",
    "mtp",
    "drafter",
    "speculators",
    "sglang",
    "medusa",
    "gguf_draft",
]


@pytest.fixture
def run(tmp_path):
    """A run on a base and a data set of the Hub."""
    change = {
        "base.path": "HuggingFaceTB/SmolLM2-135M",
        "task.path": "openai/gsm8k:main",
        "adapter.rank": 12,
    }
    return make(tmp_path / "runs" / "mine", change, (2.0, 0.75, 1.0), name="mine")


def folder_of(place, **config):
    """An adapter's folder as far as a card reads it."""
    place.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 12} | config
    (place / "adapter_config.json").write_text(json.dumps(config))
    for name in ("chat_template.jinja", "generation_config.json"):
        (place / name).write_text("{}")
    return place


def text_of(folder, to, run, parity=1.5e-6, **more):
    card.write(folder, to, run, parity, **more)
    return (folder / "README.md").read_text("utf-8")


def code_of(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_hub_reads_what_the_run_says(run, tmp_path):
    text = text_of(folder_of(tmp_path / "adapter"), "peft", run, step=8)
    data = ModelCard(text).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["openai/gsm8k"]
    assert data.tags == ["graft", "lora"]
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"loss": 1.0, "exact_match": 0.0}  # the last ones, of metrics.jsonl
    assert "| loss | 2.0000 | 1.0000 | 0.7500 |" in text
    assert "rank=12" in text
    assert "1.5e-06 of their spread" in text
    assert "this is step 8" in text
    assert (tmp_path / "adapter" / "loss.svg").read_text().count("<svg") == 1
    assert "![loss](loss.svg)" in text


@pytest.mark.long
@pytest.mark.parametrize("to", FORMATS)
def test_a_card_of_each_format_is_whole_and_the_same_each_time(run, tmp_path, to):
    place = folder_of(tmp_path / "out")
    text = text_of(place, to, run)
    assert text == text_of(place, to, run)
    assert ModelCard(text).data.tags[0] == "graft"
    blocks = code_of(text, "python") + code_of(text, "bash")
    assert blocks
    for block in code_of(text, "python"):
        ast.parse(block)
    assert card.card_loading.PLACE in text or to == "drafter"
    assert str(tmp_path) not in text
    assert "None" not in text


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "expected", "unexpected"),
    [
        ({}, ["--max-lora-rank 16", "AutoModelForCausalLM"], ["to=merged out=FOLDER\nvllm"]),
        ({"rank_pattern": {"q": 40}}, ["--max-lora-rank 64"], []),
        ({"use_dora": True}, ["vllm serve FOLDER"], ["--enable-lora"]),
        ({"peft_type": "SHIRA"}, ["vllm serve FOLDER"], ["--enable-lora"]),
        ({"task_type": "SEQ_CLS"}, ["AutoModelForSequenceClassification"], ["vllm", "generate("]),
        ({"task_type": "SEQ_2_SEQ_LM"}, ["AutoModelForSeq2SeqLM", "generate("], ["vllm"]),
    ],
)
def test_the_commands_fit_the_adapter(run, tmp_path, config, expected, unexpected):
    text = text_of(folder_of(tmp_path / "out", **config), "peft", run)
    assert all(words in text for words in expected)
    assert not [words for words in unexpected if words in text]


def test_no_path_no_secret_and_no_markup_of_a_stranger(tmp_path):
    change = {
        "base.path": str(tmp_path / "base"),
        "task.path": str(tmp_path / "secret-place" / "rows.jsonl"),
        "adapter.target_modules": [NASTY],
    }
    run = make(tmp_path / "runs" / "x", change, name=f"{NASTY} {SECRET}\n# heading")
    text = text_of(folder_of(tmp_path / "adapter"), "peft", run)
    assert str(tmp_path) not in text
    assert "secret-place" not in text
    assert SECRET not in text
    assert "<script" not in re.sub(r"\\<", "", text)
    assert "\n# heading" not in text
    assert "rows.jsonl" in text
    assert ModelCard(text).data.base_model is None


@pytest.mark.long
@pytest.mark.parametrize(
    ("own", "licence", "language"),
    [
        ("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n", "apache-2.0", ["en"]),
        ("---\nlicense: [x, y]\n---\n", None, None),
        ("---\nlicense: *broken\n---\n", None, None),
        ("no metadata", None, None),
    ],
)
def test_licence_and_language_are_those_of_the_base(tmp_path, own, licence, language):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(own)
    run = make(tmp_path / "run", {"base.path": str(base)})
    data = ModelCard(text_of(folder_of(tmp_path / "adapter"), "peft", run)).data
    assert (data.license, data.language) == (licence, language)


@pytest.mark.long
def test_old_runs_have_cards_too(tmp_path):
    for name in ("lora", "rosa", "eagle3", "branch"):
        run = shutil.copytree(OLD / name, tmp_path / name)
        text = text_of(folder_of(tmp_path / f"{name}-out"), "peft", run, None)
        assert "No comparison of this folder" in text
        assert yaml.safe_load(text.split("---")[1])["library_name"] == "peft"


def test_a_card_of_the_users_own_stays(run, tmp_path):
    folder = folder_of(tmp_path / "adapter")
    (folder / "README.md").write_text("# My own words\n")
    card.write(folder, "adapter", run, 1e-6)
    assert (folder / "README.md").read_text() == "# My own words\n"
    (folder / "README.md").unlink()
    card.write(folder, "adapter", run, 1e-6)
    card.write(folder, "adapter", run, 2e-6)
    assert "2.0e-06" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("drafter", "to", "expected", "unexpected"),
    [
        ("eagle", "sglang", "--speculative-algorithm EAGLE ", "EAGLE3"),
        ("eagle3", "sglang", "--speculative-algorithm EAGLE3 ", "DSPARK"),
        ("dflash", "sglang", "--speculative-algorithm DSPARK ", "EAGLE"),
        ("uno", "sglang", "--speculative-algorithm UNO ", "EAGLE"),
        ("eagle3", "speculators", '"method": "eagle3"', "RUNNER"),
        ("dspark", "speculators", '"method": "dspark"', "eagle"),
        ("dspark", "speculators", "VLLM_USE_V2_MODEL_RUNNER=1 vllm serve ", "eagle"),
        ("peagle", "speculators", "vllm serve ", "method"),
    ],
)
def test_a_drafts_card_names_the_method_of_each_engine(drafter, to, expected, unexpected):
    source = SimpleNamespace(choices={"adapter": "none", "drafter": drafter}, settings={})
    text = "\n".join(card_loading._drafter(to, "BASE", source))
    assert expected in text
    assert unexpected not in text
