"""The embedded default base, fetched from the package index, and the quickstart on a part of its
rows."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.delta import Start
from adapters.lora import LoRAAdapter
from tests.conftest import ROOT
from trainer import export
from trainer.assembly import trained as trained_module
from trainer.assembly.build import instantiate
from trainer.config import compose
from trainer.models.losses import CausalLoss
from trainer.storage import journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def base(cache):
    """conf/base/smollm2_135m.yaml's base."""
    composed = compose.compose(["base=smollm2_135m", "task.path=rows.jsonl"])
    return instantiate(dict(composed.base))


def padded(tokenizer, texts):
    """(ids, labels): every token but the first half of each row is trained."""
    rows = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    labels = torch.tensor(
        [
            [-100] * (len(row) // 2) + row[len(row) // 2 :] + [-100] * (longest - len(row))
            for row in rows
        ]
    )
    return ids, labels


TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Water boils at one hundred degrees Celsius at sea level; on a mountain it boils sooner.",
    "def add(a, b):\n    return a + b\n",
]


def test_the_base_is_a_normal_folder_that_transformers_loads(base):
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**chat, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, chat["input_ids"].shape[1] :])


def test_the_loss_and_its_gradients_are_those_of_full_logits(base):
    ids, labels = padded(base.tokenizer, TEXTS)
    model = base.load(torch.float32)
    model = LoRAAdapter(4, 8, False, 0.0, "all-linear", [], 1.0, "float32", True, [], []).attach(
        model, Start()
    )
    torch.manual_seed(0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.02)
    loss, _ = CausalLoss(model, chunk=7)({"input_ids": ids, "labels": labels})
    ours = torch.autograd.grad(loss, list(trained.values()))
    logits = model(input_ids=ids, use_cache=False).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    theirs = torch.autograd.grad(expected, list(trained.values()))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, one, other in zip(trained, ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm(), name


def test_lora_on_the_real_model_is_pefts(base, tmp_path):
    torch.manual_seed(0)
    adapter = LoRAAdapter(8, 16, False, 0.0, "all-linear", [], 1.0, "float32", True, [], [])
    model = adapter.attach(base.load(torch.float32), Start())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".delta.B"):
                parameter.normal_(std=0.02)
    adapter.save(model, tmp_path, base.path, "CAUSAL_LM")
    stock = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), tmp_path
    )
    ids, _ = padded(base.tokenizer, TEXTS)
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, stock.eval()(input_ids=ids).logits
        alone = base.load(torch.float32)(input_ids=ids).logits
    assert (ours - alone).abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """The quickstart on some of its rows, as a user starts it."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [
        sys.executable,
        "-m",
        "trainer",
        "+experiment=quickstart",
        "task.limit=160",
        "task.eval_rows=24",
        "max_length=384",
        "callbacks.evaluation.generate=8",
        "callbacks.evaluation.every=null",
        "logger=none",
    ]
    # One thread: another test runs next to it on two cores.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "runs" / "quickstart"


def test_the_quickstart_learns(run):
    before, after = [
        row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "evaluation"
    ]
    assert before["function_name"] == before["exact_call"] == 0
    assert after["loss"] < 0.4 * before["loss"]
    assert after["function_name"] >= 0.5
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text("utf-8").splitlines()]
    assert len(samples) == 6  # three before, three after
    assert "<html" in (run / "report.html").read_text("utf-8")


def test_its_checkpoints_hold_no_base(run):
    size = max(path.stat().st_size for path in (run / "checkpoints").glob("*.ckpt"))
    trained = json.loads((run / "preflight.json").read_text())["model"]["trainable"]
    assert trained * 12 <= size <= trained * 12 + 2_000_000  # fp32 weights and AdamW's two moments


def test_its_exports_answer_as_it_does(run, tmp_path):
    actual = trained_module.load_trained(str(run), fp32=True)
    rows, _ = padded(actual.base.tokenizer, TEXTS)
    with torch.no_grad():
        expected = actual.model(input_ids=rows).logits
    del actual
    assert export.main([f"run={run}", "to=merged", f"out={tmp_path / 'merged'}"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (merged(input_ids=rows).logits - expected).abs().max() <= 1e-3 * expected.std()
    shutil.rmtree(tmp_path / "merged")
