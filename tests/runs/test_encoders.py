"""Encoders and encoder-decoders through whole runs: training, resume, exports, evaluation."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import write_rows
from tests.toys import encoders
from trainer import density, evaluate
from trainer.assembly.trained import load_trained
from trainer.exporting.compare import outputs
from trainer.exporting.formats import export
from trainer.storage import checkpoints, journal

SHORT = (
    "base=hf",
    "max_length=64",
    "max_steps=3",
    "batch_size=4",
    "schedule=constant",
    "schedule.warmup=0",
    "optimizer.lr=1e-2",
    "callbacks.checkpoints.every=1",
    "callbacks.checkpoints.keep=null",
)
ANSWERS = ("callbacks.evaluation.generate=2", "callbacks.evaluation.max_new_tokens=8")
LABELS = [
    {"text": "good " * (1 + i % 4) if i % 2 else "bad " * (1 + i % 3), "label": i % 2}
    for i in range(24)
]
ADDED = [{"prompt": f"{i}+{2 * i}=", "completion": str(3 * i)} for i in range(24)]
ROWS = {
    "sft": ADDED,
    "regression": [{"text": "good " * (1 + i % 5), "label": i % 5 - 1.5} for i in range(24)],
    "multi_label": [
        {"text": f"{i:03b}", "labels": [name for n, name in enumerate("abc") if i >> n & 1]}
        for i in range(8)
    ],
}


@pytest.fixture
def trained(train, tmp_path):
    """A short run of a family on a task; returns its folder."""

    def run(family, kind, *overrides):
        base = tmp_path / family
        if not base.exists():
            encoders.made(family, base)
        if kind != "sst2":
            rows = write_rows(tmp_path / "rows.jsonl", ROWS[kind])
        else:
            rows = tmp_path / "rows.tsv"
            lines = [f"{row['text']}\t{row['label']}" for row in LABELS]
            rows.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
        task = (f"task={kind}", f"task.path={rows}", f"task.eval_path={rows}")
        return train(*SHORT, *task, f"base.path={base}", *overrides)

    return run


def logits_of(model, run):
    with torch.no_grad():
        return outputs(model, run)[-1]


def check_exports(folder, auto, task_type, wrapper):
    """Load the adapter with stock PEFT and the merged folder with transformers alone."""
    import peft
    import transformers

    run = load_trained(str(folder), fp32=True)
    expected = logits_of(run.model, run)
    kind = getattr(transformers, auto)
    labels = {} if task_type != "SEQ_CLS" else {"num_labels": expected.shape[-1]}
    stock = kind.from_pretrained(run.base.path, attn_implementation="eager", **labels)
    loaded = peft.PeftModel.from_pretrained(stock, folder / "adapter").eval()
    assert type(loaded).__name__ == wrapper
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["task_type"] == (
        task_type
    )
    torch.testing.assert_close(logits_of(loaded, run), expected, rtol=1e-3, atol=1e-4)
    merged, _ = export(str(folder), "merged", None, "float32")
    plain = kind.from_pretrained(merged, attn_implementation="eager").eval()
    torch.testing.assert_close(logits_of(plain, run), expected, rtol=1e-3, atol=1e-4)
    with run.adapter.disabled(run.model):
        assert (logits_of(run.model, run) - expected).abs().max() > 1e-3


def check_resume(folder, again):
    """Do the last step again from the checkpoint before it: the same bits."""
    whole = load_file(folder / "adapter" / "adapter_model.safetensors")
    checkpoints.remove(checkpoints.complete(folder / "checkpoints")[-1])
    shutil.rmtree(folder / "adapter")
    actual = load_file(again("resume=auto") / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == actual.keys()
    assert all(torch.equal(whole[name], actual[name]) for name in whole)


def classified(trained, family, *overrides):
    settings = ("sst2", "adapter=deft", "adapter.rank=4", "adapter.dropout=0.1", *overrides)
    folder = trained(family, *settings)
    check_resume(folder, lambda *more: trained(family, *settings, *more))
    check_exports(
        folder,
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        "PeftModelForSequenceClassification",
    )
    file = folder / "metrics.json"
    assert evaluate.main([f"run={folder}", f"json={file}"]) == 0
    assert json.loads(file.read_text())["adapted"].keys() == {"loss", "accuracy", "f1"}
    return folder


def answered(trained, family, *overrides):
    settings = ("sft", "adapter=deft", "adapter.rank=4", "adapter.dropout=0.1", *ANSWERS)
    folder = trained(family, *settings, *overrides)
    check_exports(folder, "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "PeftModelForSeq2SeqLM")
    return folder, lambda *more: trained(family, *settings, *overrides, *more)


def test_the_classifier_of_the_readme_trains_on_roberta(trained):
    folder = classified(trained, "roberta")
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    heads = {name for name in saved if "classifier" in name}
    assert heads == {
        f"base_model.model.classifier.{layer}.{part}"
        for layer in ("dense", "out_proj")
        for part in ("weight", "bias")
    }


def test_flan_t5_answers_prompts(trained, capsys):
    folder, _ = answered(trained, "flan_t5")
    run = load_trained(str(folder), fp32=True)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    prompt = ADDED[0]["prompt"]
    last = [row for row in samples if row["prompt"].startswith(prompt)][-1]
    ids = run.base.tokenizer(prompt, return_tensors="pt")
    written = run.model.generate(**ids, max_new_tokens=8, do_sample=False, num_beams=1)[0]
    assert last["answer"] == run.base.tokenizer.decode(written, skip_special_tokens=True)
    assert density.main([f"run={folder}", "ppl=0"]) == 0
    actual = json.loads((folder / "density.json").read_text())["adapted"]
    for side in ("encoder", "decoder"):
        inside = [row["non_zero"] for name, row in actual["layers"].items() if side in name]
        assert len(inside) == 2
        assert actual[side]["non_zero"] == pytest.approx(sum(inside) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in encoders.ENCODERS if f != "roberta"])
def test_every_encoder_classifies(trained, family):
    classified(trained, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "flan_t5", "bart"])
def test_encoder_decoders_classify(trained, family):
    classified(trained, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", encoders.PAIRS)
def test_every_encoder_decoder_answers_prompts(trained, family):
    check_resume(*answered(trained, family))


@pytest.mark.parametrize(
    ("kind", "problem", "metrics"),
    [
        ("regression", "regression", {"mse", "pearson", "spearman"}),
        ("multi_label", "multi_label_classification", {"f1_micro", "f1_macro", "exact_match"}),
    ],
)
def test_numbers_and_several_classes_are_learnt(trained, kind, problem, metrics):
    monitor = "callbacks.evaluation.monitor=" + sorted(metrics)[-1]
    mode = "callbacks.evaluation.mode=max"
    folder = trained("bert", kind, "adapter.rank=4", monitor, mode)
    file = folder / "metrics.json"
    assert evaluate.main([f"run={folder}", f"json={file}"]) == 0
    actual = json.loads(file.read_text())["adapted"]
    assert actual.keys() == {"loss", *metrics}
    if kind == "regression":
        assert actual["mse"] == pytest.approx(actual["loss"], rel=1e-5)
    merged, _ = export(str(folder), "merged", None, "float32")
    config = json.loads((merged / "config.json").read_text())
    assert config["problem_type"] == problem
    steps = [row for row in journal.read(folder / "metrics.jsonl") if row["kind"] == "step"]
    assert steps
    assert not any("accuracy" in row for row in steps)
