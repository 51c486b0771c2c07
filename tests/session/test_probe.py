"""Two steps on the longest batch: its choice, the measured memory, and the refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import write_rows
from tests.toys.commands import exit_code
from trainer import preflight
from trainer.assembly.build import instantiate
from trainer.assembly.recipe import Recipe
from trainer.config.errors import ConfigError
from trainer.data.batches import BatchOrder
from trainer.session import smaller
from trainer.session.probe import longest_step, measured, refuse

MB = 1 << 20


def order_of(lengths, **settings):
    return BatchOrder(np.array(lengths), np.array(lengths), 0, 2, 3, epochs=1.0, **settings)


def test_the_longest_step_is_that_of_plain_loops():
    lengths = np.random.default_rng(0).integers(1, 1000, 37).tolist()
    order = order_of(lengths)
    sizes = []
    for step in range(order.steps(None, None)):
        for batch in order.micro_batches(step):
            sizes.append((len(batch) * max(lengths[pick.sequence] for pick in batch), step))
    best = max(size for size, _ in sizes)
    chosen = longest_step(order, 1000)
    assert best == max(
        len(batch) * max(lengths[pick.sequence] for pick in batch) for batch in chosen
    )
    assert chosen in [order.micro_batches(step) for size, step in sizes if size == best]
    assert longest_step(order, 1) == order.micro_batches(0)  # of a run of one step


def test_memory_is_what_was_in_use_at_most():
    with measured(torch.device("cpu")) as peak:
        big = torch.ones(200 * MB, dtype=torch.uint8)
        del big
        torch.ones(50 * MB, dtype=torch.uint8)
    assert 150 * MB < peak.bytes < 260 * MB


@pytest.fixture
def recipe_of(compose, chats):
    def made(*overrides, ranks=1):
        cfg = compose("+experiment=smoke", f"task.path={chats}", *overrides)
        config = OmegaConf.to_container(cfg, resolve=False)
        return Recipe.of(config, instantiate(config["adapter"]), ranks=ranks)

    return made


@pytest.mark.long
@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["task.streaming=true", "task.eval_fraction=0"], 1, "shows its rows only while it trains"),
        ([], 2, r"set lightning\.devices=1"),
        (["adapter=none"], 1, "the run trains nothing"),
    ],
)
def test_what_cannot_be_measured_is_refused(recipe_of, overrides, ranks, message):
    with pytest.raises(ConfigError, match=message):
        refuse(recipe_of(*overrides, ranks=ranks))


@pytest.mark.run
@pytest.mark.parametrize(
    "extra", [[], ["adapter=rosa", "adapter.density=0.1"], ["penalty=deft"], ["drafter=medusa"]]
)
def test_the_command_reports_it_and_leaves_nothing(tmp_path, monkeypatch, capsys, extra):
    monkeypatch.chdir(tmp_path)
    texts = ["a", "b" * 40, "c" * 9]
    rows = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]}
        for text in texts * 4
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    words = ["experiment=smoke", "task.path=rows.jsonl", "batch_size=2", "accumulate=1"]
    words += ["max_steps=5", "probe=true", "json=out.json", "samples=0", *extra]
    assert exit_code(preflight.main, words) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    longest = result["data"]["train"]["longest"]
    assert 2 * longest <= result["probe"]["tokens"] < 2 * (longest + 64)  # padded
    assert result["probe"]["peak_bytes"] > 0
    assert result["probe"]["step_seconds"] > 0
    assert "longest batch, measured" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_a_change_sets_its_keys_and_leaves_the_config():
    config = {"batch_size": 6, "accumulate": 2, "objective": {"gradient_checkpointing": False}}
    changes = smaller.settings(config)
    assert [*changes] == [
        "batch_size=3 accumulate=4 (the same step in smaller parts)",
        "objective.gradient_checkpointing=true",
    ]
    first, second = changes.values()
    assert smaller.changed(config, first) == config | {"batch_size": 3, "accumulate": 4}
    assert smaller.changed(config, second)["objective"] == {"gradient_checkpointing": True}
    assert config["objective"] == {"gradient_checkpointing": False}
