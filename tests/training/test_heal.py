"""A teacher's loss against the naive formula, and teachers that are refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional as F

from tests.conftest import sums, write_rows
from tests.toys import adapters as toys
from trainer.config import compose, paths
from trainer.config.errors import ConfigError
from trainer.models.base import Base
from trainer.models.losses import CausalLoss
from trainer.training import heal


def batch_of(ids):
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    return {"input_ids": ids, "labels": labels}


def models():
    student, teacher = toys.llama(torch.float32), toys.llama(torch.float32, num_hidden_layers=3)
    return student, teacher


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_loss_and_its_gradient_are_those_of_the_naive_formula(weight):
    student, teacher = models()
    other = copy.deepcopy(student).double()
    batch = batch_of(toys.IDS)
    loss, counts = heal.TeacherLoss(student, 3, teacher, weight)(batch)  # 3 positions at a time
    loss.backward()

    where = batch["labels"][:, 1:] != -100
    logits = other(input_ids=batch["input_ids"]).logits[:, :-1][where]
    with torch.no_grad():
        theirs = copy.deepcopy(teacher).double()(input_ids=batch["input_ids"])
        p = theirs.logits[:, :-1][where].softmax(-1)
    ce = F.cross_entropy(logits, batch["labels"][:, 1:][where], reduction="sum")
    log_q = logits.log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum()
    expected = (1 - weight) * ce + weight * kl
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert counts["loss"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert int(counts["tokens"]) == int(where.sum())
    for mine, naive in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine.grad.double(), naive.grad, atol=2e-4 * naive.grad.abs().max())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_evaluation_has_no_teacher():
    student, teacher = models()
    batch = batch_of(toys.IDS)
    with torch.no_grad():
        loss, _ = heal.TeacherLoss(student, None, teacher, 0.5)(batch)
        alone, _ = CausalLoss(student, None)(batch)
    assert torch.equal(loss, alone)


def test_a_base_that_teaches_itself_at_full_weight_has_no_loss():
    student, _ = models()
    loss, _ = heal.TeacherLoss(student, None, copy.deepcopy(student), 1.0)(batch_of(toys.IDS))
    assert abs(loss.item()) < 1e-4


def base_at(path):
    return Base(str(path), "auto", "sdpa", "none", True)


def test_another_vocabulary_is_refused(tiny, tmp_path):
    assert heal.fault(tiny, tiny.path, False) is None
    assert "this task classifies" in heal.fault(tiny, tiny.path, True)
    other = tmp_path / "other"
    model = tiny.load(torch.float32)
    model.resize_token_embeddings(300)
    model.save_pretrained(other)
    tiny.tokenizer.save_pretrained(other)
    said = heal.fault(tiny, str(other), False)
    assert "has 300 tokens, and" in said
    assert "Give the base that it was made from" in said
    tokens = tmp_path / "tokens"
    tiny.load(torch.float32).save_pretrained(tokens)
    tiny.tokenizer.save_pretrained(tokens)
    text = (tokens / "tokenizer.json").read_text()
    (tokens / "tokenizer.json").write_text(text.replace("im_start", "im_begin"))
    for file in tokens.glob("*config.json"):
        file.write_text(file.read_text().replace("im_start", "im_begin"))
    assert "has other tokens than" in heal.fault(tiny, str(tokens), False)
    extended = base_at(tiny.path)
    extended.add_tokens = ["<tool>"]
    assert "with base.add_tokens" in heal.fault(extended, tiny.path, False)


def test_a_teacher_that_is_not_there_is_refused_before_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), sums(4))
    words = ["base=tiny", "task.path=rows.jsonl", "objective=heal", "objective.teacher=./none"]
    with pytest.raises(ConfigError, match=r"objective.teacher=./none: there is no such folder"):
        paths.check(OmegaConf.to_container(compose.compose(words)))
