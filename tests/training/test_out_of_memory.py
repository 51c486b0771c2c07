"""Steps that do not fit into memory, repeated in smaller micro-batches."""

from __future__ import annotations

import logging
from typing import Any

import lightning
import pytest
import torch

from tests.toys.finetuning import Run, adapted, lora, table
from trainer.data.batches import Collate, Pick
from trainer.session import failures
from trainer.training.finetune import FineTune
from trainer.training.out_of_memory import TooLarge, out_of_memory, parts

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory:"
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(f"{CPU} you tried to allocate 536870912 bytes. Error code 12"),
    MemoryError(),
]


class Steps(lightning.Callback):
    """The gradients of each step, and how many rows each part had; saves checkpoints."""

    def __init__(self, folder: Any = None):
        self.folder, self.gradients, self.smaller = folder, [], []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients.append(
            [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
        )

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if module.step_done:
            self.smaller.append(module.smaller)
            if self.folder is not None:
                trainer.save_checkpoint(self.folder / f"step-{module.step:08d}.ckpt")


def limited(patch: Any, error: Exception, rows: int, where: str, since: int = 1) -> list[int]:
    """Raise an error, from a step on, where more rows than that are run at a time: before the
    forward pass, or with half of the gradients there. Returns the rows of each pass that ran."""
    seen: list[int] = []
    whole = FineTune.loss_of

    def loss_of(self: Any, batch: dict[str, Any], share: float = 1.0) -> Any:
        count = len(batch["input_ids"])
        large = self.step >= since and count > rows
        if large and where == "forward":
            raise error
        loss = whole(self, batch, share)
        if large:
            at = [p for p in self.parameters() if p.requires_grad]

            def fail(gradient: Any) -> None:
                raise error

            at[len(at) // 2].register_hook(fail)  # the hook stays; the parameter gets a new one
            hooks.append(at[len(at) // 2])
            return loss
        for parameter in hooks:
            parameter._backward_hooks.clear()
        hooks.clear()
        seen.append(count)
        return loss

    hooks: list[Any] = []
    patch.setattr(FineTune, "loss_of", loss_of)
    return seen


@pytest.mark.parametrize(
    ("accumulate", "where", "error"),
    list(zip([1, 3, 1], ["forward", "backward", "backward"], ERRORS, strict=True)),
    ids=["cuda", "cpu", "python"],
)
def test_a_step_in_parts_has_the_gradient_of_the_whole_step(
    tmp_path, monkeypatch, caplog, accumulate, where, error
):
    words = ["batch_size=4", f"accumulate={accumulate}", "max_epochs=4"]
    whole, split = Steps(), Steps()
    Run(tmp_path, words).fit(*adapted(), whole)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        seen = limited(patch, error, 2, where)
        module = Run(tmp_path, words).fit(*adapted(), split)
    assert module.rows_at_once == 2
    assert seen[:accumulate] == [4] * accumulate
    assert set(seen[accumulate:]) == {2}
    assert [bool(smaller) for smaller in split.smaller] == [False, True, False]
    assert split.smaller[1]["rows"] == 2
    assert split.smaller[1]["rows_before"] == 4
    assert "step 2 did not fit into memory" in caplog.text
    assert caplog.text.count("did not fit") == 1
    for mine, its in zip(split.gradients, whole.gradients, strict=True):
        for a, b in zip(mine, its, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)  # the toy computes in fp64


def test_a_penalty_of_the_adapter_counts_once(tmp_path, monkeypatch):
    """AdaLoRA has one: each part of a step adds its share of it."""
    words = ["batch_size=4", "max_epochs=4"]

    def with_penalty() -> Any:
        adapter, model = adapted()
        adapter.penalty = lambda model: sum(
            (p**2).sum() for p in model.parameters() if p.requires_grad
        )
        return adapter, model

    plain, whole, split = Steps(), Steps(), Steps()
    Run(tmp_path, words).fit(*adapted(), plain)
    Run(tmp_path, words).fit(*with_penalty(), whole)
    limited(monkeypatch, MemoryError(), 2, "forward")
    Run(tmp_path, words).fit(*with_penalty(), split)
    for mine, its in zip(split.gradients, whole.gradients, strict=True):
        for a, b in zip(mine, its, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(plain.gradients[-1][0], whole.gradients[-1][0])


def test_the_middle_of_a_window_is_repeated_from_its_first_micro_batch(tmp_path, monkeypatch):
    """Memory runs out in the second of three micro-batches: the first one's gradient must not
    count twice."""
    words = ["batch_size=4", "accumulate=3", "max_epochs=4"]
    whole, split = Steps(), Steps()
    Run(tmp_path, words).fit(*adapted(), whole)
    calls = []
    first = FineTune.loss_of

    def loss_of(self: Any, batch: dict[str, Any], share: float = 1.0) -> Any:
        calls.append(len(batch["input_ids"]))
        if len(calls) == 5:
            raise ERRORS[0]
        return first(self, batch, share)

    monkeypatch.setattr(FineTune, "loss_of", loss_of)
    Run(tmp_path, words).fit(*adapted(), split)
    assert calls[:10] == [4, 4, 4, 4, 4, 2, 2, 2, 2, 2]
    for mine, its in zip(split.gradients, whole.gradients, strict=True):
        for a, b in zip(mine, its, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_resumed_run_keeps_the_smaller_parts_and_its_bits(tmp_path, monkeypatch):
    words = ["batch_size=4", "max_epochs=4"]
    limited(monkeypatch, ERRORS[1], 1, "forward")
    whole, rest = Steps(tmp_path), Steps()
    Run(tmp_path, words).fit(*adapted(), whole, steps=4)
    module = Run(tmp_path, words).fit(
        *adapted(), rest, steps=4, resumed=str(tmp_path / "step-00000002.ckpt")
    )
    assert module.rows_at_once == 1
    assert rest.smaller == [None, None]  # nothing had to become smaller again
    for mine, its in zip(rest.gradients, whole.gradients[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def test_one_row_that_does_not_fit_ends_the_run_with_advice(tmp_path, monkeypatch):
    limited(monkeypatch, ERRORS[0], 0, "forward")
    run = Run(tmp_path, ["batch_size=4"])
    with pytest.raises(TooLarge, match="step 2 does not fit even with one row at a time") as raised:
        run.fit(*adapted())
    text, code = failures.explained(raised.value, run.config | {"max_length": 512})
    assert code == 1
    assert "batch_size" not in text
    for advice in ("objective.gradient_checkpointing=true", "max_length=256", "quantization=nf4"):
        assert advice in text


def test_a_step_that_would_not_be_the_same_is_not_repeated(tmp_path, monkeypatch, caplog):
    limited(monkeypatch, ERRORS[0], 2, "forward")
    whole = FineTune.on_train_start

    def refused(self: Any) -> None:
        self.parts_differ = "adapter.dropout=0.1 draws numbers"
        whole(self)

    monkeypatch.setattr(FineTune, "on_train_start", refused)
    with pytest.raises(torch.OutOfMemoryError), caplog.at_level(logging.WARNING):
        Run(tmp_path, ["batch_size=4"]).fit(*adapted(lora(dropout=0.1)))
    assert "not repeated in smaller micro-batches: adapter.dropout=0.1 draws numbers" in caplog.text


def test_it_can_be_switched_off(tmp_path, monkeypatch):
    limited(monkeypatch, ERRORS[0], 2, "forward")
    with pytest.raises(torch.OutOfMemoryError):
        Run(tmp_path, ["batch_size=4", "objective.repeat_smaller=false"]).fit(*adapted())


def test_other_errors_are_not_caught(tmp_path, monkeypatch):
    limited(monkeypatch, RuntimeError("shapes differ"), 2, "backward")
    with pytest.raises(RuntimeError, match="shapes differ"):
        Run(tmp_path, ["batch_size=4"]).fit(*adapted())
    assert not out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize("rows", [None, 1, 2, 3, 5, 8])
def test_parts_are_the_rows_in_their_order(rows):
    items = [(Pick(at, True, 7), [row]) for at, row in enumerate(table(5))]
    batch = Collate(0, False, False, weighted=True)(items)
    actual = list(parts(batch, rows))
    assert sum(share for _, share in actual) == pytest.approx(1)
    assert max(len(part["input_ids"]) for part, _ in actual) == min(rows or 5, 5)
    assert sum(part["tokens"] for part, _ in actual) == batch["tokens"]
    assert [at for part, _ in actual for at in part["sequences"]] == batch["sequences"]
    for key in ("input_ids", "labels", "lengths", "weights"):
        assert torch.equal(torch.cat([part[key] for part, _ in actual]), batch[key])
    assert all(part["window_tokens"] == 7 for part, _ in actual)
    for part, _ in actual if len(actual) > 1 else ():  # what is of the whole batch would be wrong
        assert not part.keys() & {"supervised", "host"}
