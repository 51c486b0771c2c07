"""Diversity of what a model writes, and texts that it continues in an evaluation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import composed, write_rows
from trainer.assembly.build import instantiate
from trainer.assembly.rows import add_prompts, load_data
from trainer.data.stops import Stops
from trainer.evaluation import answers as answers_module
from trainer.evaluation.diversity import type_token_ratio
from trainer.session.inspect import refuse_monitor

PROMPT = 6


def test_type_token_ratio():
    assert type_token_ratio([1, 2, 3, 4]) == 1.0
    assert type_token_ratio([7] * 10) == 0.1
    assert type_token_ratio([1, 2, 1, 2, 3]) == 0.6
    assert type_token_ratio([]) == 0.0
    assert type_token_ratio([1] * 500 + list(range(96))) == 1.0  # the last 96
    assert type_token_ratio([1, 2, 3, 3], last=2) == 0.5


@pytest.fixture
def continued(tiny, tmp_path):
    """Held-out texts with their first tokens as prompts."""
    words = [" ".join(f"word{i} of row {row}" for i in range(9)) for row in range(5)]
    file = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in [*words, "a"]])

    def load(*overrides):
        cfg = composed(
            "experiment=smoke", "base=tiny", "task=completion", f"task.path={file}",
            f"task.eval_path={file}", f"task.prompt_tokens={PROMPT}", *overrides,
        )  # fmt: skip
        bare = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        config = OmegaConf.to_container(bare, resolve=True)
        task = instantiate(config["task"])
        data = load_data(config, tiny, task, train=False)
        add_prompts(data, 10, Stops([tiny.tokenizer.eos_token_id]))
        return config, task, data.held_out

    return load


def test_texts_are_continued_and_measured(tiny, continued, monkeypatch):
    _, task, held_out = continued()
    assert task.metrics == ["ttr"]
    assert len(held_out.prompts) == 5  # the last text has nothing after its prompt
    ids = [tiny.tokenizer(example.text)["input_ids"] for example, _ in held_out.prompts]
    assert [prompt for _, prompt in held_out.prompts] == [row[:PROMPT] for row in ids]
    end, pad = tiny.tokenizer.eos_token_id, tiny.tokenizer.pad_token_id
    written = [[20, 21, 20, end, pad, pad], [30, 31, 32, 33, 34, 35]]
    calls = iter([written, written, written[:1]])
    monkeypatch.setattr(answers_module, "continuations", lambda *_: next(calls))
    graded = answers_module.answers(SimpleNamespace(), held_out, 2, 6, torch.device("cpu"))
    ratios = sorted(row["scores"]["ttr"] for row in graded)
    assert ratios == [2 / 3, 2 / 3, 2 / 3, 1.0, 1.0]
    first = next(row for row in graded if row["where"].endswith(":1"))
    assert first["expected"] == tiny.tokenizer.decode(ids[0][PROMPT : PROMPT + 6])
    assert first["prompt"] == tiny.tokenizer.decode(ids[0][:PROMPT])
    assert answers_module.means(graded) == {"ttr": pytest.approx(4 / 5)}


def test_without_prompt_tokens_nothing_is_continued(continued):
    config, task, held_out = continued("task.prompt_tokens=null")
    assert not held_out.prompts
    assert task.metrics == []
    config["callbacks"]["evaluation"] |= {"monitor": "ttr", "generate": 4, "generate_every": 1}
    with pytest.raises(Exception, match=r"monitor=ttr is no metric of this task"):
        refuse_monitor(config, task)


def test_hyperfitting_keeps_its_last_weights():
    cfg = composed("+experiment=hyperfit", "base=tiny", "task.path=texts.jsonl")
    assert (cfg.export, cfg.max_epochs, cfg.callbacks.evaluation.patience) == ("last", 20, None)
    assert cfg.schedule._target_.endswith("constant")
    assert cfg.task.prompt_tokens == 32
    assert not cfg.branch
    assert "cooldown" not in cfg.callbacks
