"""Steps that are read one step later, as on a GPU: the same journal, weights and checkpoints as
when each is read at once. A CPU stands in for the device."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.peft import Peft
from adapters.rosa import RoSAAdapter
from adapters.spiel import SpIEL
from tests.toys import adapters as toys
from tests.toys.finetuning import Run, adapted
from trainer.cluster.slurm_job import Stopped
from trainer.models.losses import NonFinite
from trainer.storage import checkpoints, journal
from trainer.training import late
from trainer.training.finetune import FineTune

TIMES = {"seconds", "answer_seconds", "tokens_per_s", "trained_per_s", "minutes"}
WORDS = (
    "max_steps=7",
    "batch_size=2",
    "schedule.warmup=0",
    "callbacks.evaluation.samples=0",
    "callbacks.evaluation.every=3",
    "callbacks.checkpoints.every=2",
    "callbacks.checkpoints.keep=null",
    "report=false",
    "check_export=false",
)


@pytest.fixture
def runs(train, chats, monkeypatch):
    """Train a run, late or not, with steps whose loss is `value`; returns its folder and how many
    steps were still unread at the end of one."""

    def run(reads_late: bool, *words: str, spoilt: Any = (), value: float = math.nan) -> Any:
        left: list[int] = []
        with monkeypatch.context() as patch:
            whole, after = FineTune.training_step, FineTune.optimizer_step

            def step(self: Any, batch: Any, index: int) -> Any:
                loss = whole(self, batch, index)
                if self.step + 1 in spoilt:
                    self.sums["loss"] = self.sums["loss"] + value
                    loss = loss * value
                return loss

            def optimizer_step(self: Any, *args: Any, **more: Any) -> None:
                after(self, *args, **more)
                left.extend([] if self.unread is None else [self.unread.step])

            patch.setattr(FineTune, "training_step", step)
            patch.setattr(FineTune, "optimizer_step", optimizer_step)
            patch.setattr(late, "on_gpu", lambda module: reads_late)
            name = words[0] if words and words[0].startswith("name=") else f"name=late_{reads_late}"
            try:
                return train(f"task.path={chats}", *WORDS, name, *words), left
            except (NonFinite, Stopped) as error:
                folder = chats.parent / "runs" / name.removeprefix("name=")
                return folder, left, error

    return run


def rows(run: Path) -> list[dict[str, Any]]:
    """The journal without times."""
    return [
        {name: value for name, value in row.items() if name not in TIMES}
        for row in journal.read(run / "metrics.jsonl")
    ]


def saved(run: Path) -> list[Any]:
    """What each checkpoint holds of training."""
    contents = [checkpoints.load(each) for each in checkpoints.complete(run / "checkpoints")]
    keys = ("adapter", "counters", "optimizer_states")
    return [{key: content[key] for key in keys} for content in contents]


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(*pair) for pair in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize(
    ("words", "spoilt"),
    [
        ([], {2, 3, 6}),
        (["accumulate=2", "callbacks.progress.every=3", "drafter=medusa"], {4, 7}),
        pytest.param(
            [
                "adapter=rosa",
                "adapter.density=0.05",
                "adapter.warmup_steps=1",
                "adapter.mask_steps=1",
            ],
            {5},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["lora", "heads", "rosa"],
)
def test_late_is_the_same_as_at_once(runs, words, spoilt):
    (once, none), (after, left) = (runs(late, *words, spoilt=spoilt) for late in (False, True))
    assert none == []
    assert left == list(range(1, rows(after)[-1]["step"] + 1))
    assert rows(after) == rows(once)
    skipped = [row["step"] for row in rows(after) if row["kind"] == "skipped"]
    assert skipped == sorted(spoilt)
    assert len(saved(after)) >= 4
    assert same(saved(after), saved(once))


def test_the_step_that_ends_a_run_is_named_and_nothing_of_it_is_saved(runs):
    words, spoilt = ["objective.nonfinite_limit=3"], {3, 4, 5}
    (once, _, error), (after, _, later) = (
        runs(late, *words, spoilt=spoilt) for late in (False, True)
    )
    assert isinstance(later, NonFinite)
    assert str(later) == str(error)
    assert str(later).startswith("3 steps in a row, up to step 5, had a loss")
    assert rows(after) == rows(once)
    assert saved(after)[-1]["counters"] | {"tokens": 0} == {
        "step": 4, "tokens": 0, "skipped": 2, "skipped_in_a_row": 2, "rows_at_once": None
    }  # fmt: skip
    assert same(saved(after), saved(once))
    for moments in saved(after)[-1]["optimizer_states"][0]["state"].values():
        assert float(moments["step"]) == 2
        assert torch.isfinite(moments["exp_avg"]).all()


def test_the_last_steps_of_a_run_end_it_too(runs):
    _, _, error = runs(True, "objective.nonfinite_limit=2", spoilt={6, 7})
    assert str(error).startswith("2 steps in a row, up to step 7,")


def test_a_run_that_is_stopped_has_all_its_rows_and_resumes_with_the_same_bits(runs, monkeypatch):
    whole, _ = runs(True, "name=whole", spoilt={4})
    start = FineTune.on_train_batch_start

    def stop(self: Any, batch: Any, batch_idx: int) -> None:
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        start(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(FineTune, "on_train_batch_start", stop)
        run, _, error = runs(True, "name=cut", spoilt={4})
    assert isinstance(error, Stopped)
    assert [row["step"] for row in rows(run) if row["kind"] == "step"] == [1, 2, 3, 4, 5]
    assert saved(run)[-1]["counters"]["skipped"] == 1
    resumed, _ = runs(True, "name=cut", "resume=auto", spoilt={4})
    assert rows(resumed) == rows(whole)
    assert same(saved(resumed)[-1], saved(whole)[-1])


def test_an_error_in_a_step_leaves_the_rows_before_it(runs, chats, monkeypatch):
    start = FineTune.on_train_batch_start

    def fail(self: Any, batch: Any, batch_idx: int) -> None:
        if self.step == 3:
            raise KeyError("a fault")
        start(self, batch, batch_idx)

    monkeypatch.setattr(FineTune, "on_train_batch_start", fail)
    with pytest.raises(KeyError):
        runs(True, "name=broken")
    actual = rows(chats.parent / "runs" / "broken")
    assert [row["step"] for row in actual if row["kind"] == "step"] == [1, 2, 3]


class Other(RoSAAdapter):
    """An adapter that acts on clipped gradients."""

    def after_clipping(self, model: Any, factor: Any) -> None:
        pass


def test_only_adapters_that_do_not_look_at_a_skip_are_read_late():
    def ignores(method: Any, **fields: Any) -> bool:
        adapter = method.__new__(method)
        adapter.__dict__ |= fields
        return adapter.ignores_skips()

    assert toys.lora().ignores_skips()
    assert ignores(RoSAAdapter)
    assert not ignores(Other)
    assert not ignores(SpIEL)  # clips moments
    assert ignores(Peft, kind="OFT")
    assert not ignores(Peft, kind="ADALORA")


@pytest.mark.parametrize(
    ("make", "able"),
    [
        (lambda p: torch.optim.AdamW(p, fused=True), True),
        (lambda p: torch.optim.Adam(p, fused=True, amsgrad=True), True),
        (lambda p: torch.optim.AdamW(p), False),
        (lambda p: torch.optim.SGD(p, momentum=0.9, fused=True), False),
    ],
)
def test_an_optimiser_that_can_skip_changes_nothing_where_a_step_is_not_finite(make, able):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = make([weight])
    assert late.skips_itself(optimizer) == able
    if not able:
        return
    # in the first step, whose moments do not exist yet, and in a later one
    for _ in range(2):
        before, weight.grad = weight.detach().clone(), torch.full_like(weight, math.nan)
        late.skip_if([optimizer], torch.isfinite(weight.grad).all())
        optimizer.step()
        assert torch.equal(weight, before)
        weight.grad = torch.ones_like(weight)
        late.skip_if([optimizer], torch.tensor(True))
        optimizer.step()
        assert not torch.equal(weight, before)
    assert float(optimizer.state[weight]["step"]) == 2
    assert torch.isfinite(optimizer.state[weight]["exp_avg"]).all()


def test_numbers_are_those_of_their_step_whatever_happens_to_the_tensors_later():
    loss = torch.tensor(1.5)
    copy = late.Copy({"loss": loss, "norms": {"A": torch.tensor(2.0)}, "tokens": 3})
    loss.add_(1)
    assert copy.read() == {"loss": 1.5, "norms": {"A": 2.0}, "tokens": 3}


@pytest.mark.gpu
def test_a_step_on_a_gpu_does_not_wait(tmp_path):
    adapter, model = adapted(toys.lora(dtype="float32"), toys.llama(torch.float32))
    module = Run(tmp_path, ["lightning=gpu", "lightning.devices=1"]).fit(adapter, model, steps=3)
    assert module.late
    module.settle()
    assert module.skipped == 0
