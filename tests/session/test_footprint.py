"""What a run is said to train and to take is what it trains and takes, and it is said without the
weights."""

from __future__ import annotations

import json
import re
from collections import namedtuple
from types import SimpleNamespace

import psutil
import pytest
import torch
from omegaconf import OmegaConf

from adapters.delta import Start
from tests.conftest import write_rows
from trainer.assembly.build import instantiate, new_modules
from trainer.assembly.recipe import Recipe
from trainer.models.base import Base
from trainer.session import footprint
from trainer.session.footprint import estimate
from trainer.storage import checkpoints


@pytest.fixture
def estimated(compose, chats, tmp_path, monkeypatch):
    """Estimates for the smoke experiment with some overrides, of 5 steps, on a base whose weights
    cannot be loaded."""

    def estimated_for(*overrides):
        files = (f"task.path={chats}", f"task.eval_path={chats}")
        cfg = compose(
            "+experiment=smoke",
            "lightning=cpu",
            "precision=fp32",
            "max_steps=5",
            *files,
            *overrides,
        )
        config = OmegaConf.to_container(cfg, resolve=False)
        recipe = Recipe.of(config, instantiate(config["adapter"]))
        with monkeypatch.context() as patched:
            patched.setattr(Base, "load", lambda *_, **__: pytest.fail("weights were loaded"))
            result = estimate(recipe, tmp_path / "runs" / "smoke")
        return SimpleNamespace(
            config=config,
            base=recipe.base,
            adapter=recipe.adapter,
            model=result.as_record(),
            errors=result.errors,
            warnings=result.warnings,
        )

    return estimated_for


VIRTUAL = "adapter.num_virtual_tokens=4"
PARTS = [
    ("sft", "lora"),
    ("sft", "dora"),
    ("sft", "adalora", "adapter.tfinal=2"),
    ("sft", "ia3"),
    ("sft", "full"),
    ("sft", "none"),
    ("sft", "prompt_tuning", VIRTUAL),
    ("sft", "prefix_tuning", VIRTUAL),
    ("classification", "lora"),
    ("classification", "full"),
    ("classification", "none"),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("task", "adapter", "more"), [(task, adapter, more) for task, adapter, *more in PARTS]
)
def test_parameters_are_those_of_the_model_that_is_trained(
    estimated, tmp_path, chats, task, adapter, more
):
    rows, labels = chats, None
    if task == "classification":
        rows = write_rows(
            tmp_path / "c.jsonl", [{"text": "a" * i, "label": str(i % 3)} for i in range(1, 9)]
        )
        labels = ["0", "1", "2"]
    actual = estimated(
        f"task={task}", f"adapter={adapter}", *more, f"task.path={rows}", f"task.eval_path={rows}"
    )
    model = actual.base.load(torch.float32, labels)
    assert actual.model["parameters"] == sum(p.numel() for p in model.parameters())
    model = instantiate(actual.config["adapter"]).attach(
        model, Start(new_modules(model, labels), 5)
    )
    assert actual.model["trainable"] == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert footprint.parameters(model).startswith(f"{actual.model['trainable']:,} of ")


@pytest.mark.long
@pytest.mark.parametrize(
    ("adapter", "drafter", "precision", "dtype"),
    [
        ("lora", "none", "bf16-true", "bfloat16"),
        ("lora", "mtp_shared", "bf16-true", "bfloat16"),
        ("full", "none", "fp32", "float32"),
        ("full", "mtp_shared", "fp32", "float32"),
    ],
)
def test_the_precision_of_auto_is_that_of_the_run(
    estimated, monkeypatch, adapter, drafter, precision, dtype
):
    monkeypatch.setattr("trainer.models.precision.bf16_is_fast", lambda cuda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    actual = estimated(f"adapter={adapter}", f"drafter={drafter}", "precision=auto").model
    assert (actual["precision"], actual["dtype"]) == (precision, dtype)


@pytest.mark.parametrize(
    "settings", [("adapter.rank=256",), ("adapter=full", "base.hidden_size=64")]
)
def test_a_checkpoints_size_is_about_as_told(train, chats, settings):
    run = train(f"task.path={chats}", "max_steps=1", "callbacks.evaluation=null", *settings)
    (saved,) = checkpoints.complete(run / "checkpoints")
    reported = json.loads((run / "preflight.json").read_text())["model"]["checkpoint_bytes"]
    assert 0.8 < reported / saved.path.stat().st_size < 1.25


@pytest.mark.long
def test_memory_grows_with_what_takes_it(estimated):
    def needed(*overrides):
        return estimated(*overrides).model

    plain = needed()
    assert plain["memory_needed"] == sum(plain["memory_bytes"].values())
    assert plain["memory_bytes"]["weights"] == 4 * plain["parameters"]
    # weight, gradient, two moments
    assert plain["memory_bytes"]["trained"] == 16 * plain["trainable"]
    half = needed("precision=bf16-true")
    assert half["memory_bytes"]["weights"] == 2 * half["parameters"]
    for name, override, factor in (
        ("activations", "batch_size=16", 2),
        ("activations", "base.layers=4", 2),
        ("logits", "objective.logits_chunk=2048", None),
        ("trained", "adapter.rank=32", 2),
    ):
        other = needed(override)["memory_bytes"][name]
        assert other == (factor * plain["memory_bytes"][name] if factor else other)
        assert other > plain["memory_bytes"][name] or factor is None
    wide = ("base.hidden_size=256",)
    assert (
        needed(*wide, "base.quantization=nf4")["memory_bytes"]["weights"]
        < 0.4 * needed(*wide)["memory_bytes"]["weights"]
    )
    less = needed("objective.gradient_checkpointing=true", "base.layers=8")["memory_bytes"][
        "activations"
    ]
    half = needed("objective.gradient_checkpointing=2", "base.layers=8")["memory_bytes"][
        "activations"
    ]
    assert 2 * less < half < 0.7 * needed("base.layers=8")["memory_bytes"]["activations"]
    shorter, same = (
        needed(f"objective.context_window={window}")["memory_bytes"] for window in (4, 1000)
    )
    assert shorter["activations"] < 0.8 * plain["memory_bytes"]["activations"]
    assert same == plain["memory_bytes"]


@pytest.mark.long
def test_too_little_memory_is_a_warning(estimated, monkeypatch):
    Memory = namedtuple("Memory", "available total")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(1000, 1000))
    actual = estimated()
    assert actual.errors == []
    (warning,) = [line for line in actual.warnings if "of memory, and 0.0 GB are free" in line]
    ways = re.findall(r"([\d.]+) GB with ([^;]+)", warning)
    assert ways[0][1].startswith("batch_size=")
    assert ways[-1][1] == "all of these"
    assert all(float(ways[-1][0]) <= float(size) for size, _ in ways)
    needed = actual.model["memory_needed"]
    for free, warns in ((needed - 1, True), (needed, False)):
        memory = Memory(free, free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        assert any("of memory, and" in line for line in estimated().warnings) is warns


@pytest.mark.long
def test_a_disk_too_small_for_the_checkpoints_is_an_error(estimated, monkeypatch, tmp_path):
    Disk = namedtuple("Disk", "total used free")
    size = estimated("callbacks.checkpoints.keep=3").model["checkpoint_bytes"]
    requested = []

    def disk(free):
        monkeypatch.setattr(
            footprint.shutil, "disk_usage", lambda path: requested.append(path) or Disk(1, 1, free)
        )
        return estimated("callbacks.checkpoints.keep=3").errors

    assert disk(5 * size) == []
    (error,) = disk(5 * size - 1)
    assert error.startswith(f"5 checkpoints of about {size / 1e6:.3g} MB do not fit on the disk of")
    assert requested[0] == tmp_path  # the nearest folder that is there
