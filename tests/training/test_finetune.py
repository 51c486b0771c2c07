"""What a step is: the same whatever it is divided into, nothing where it is not finite, and at the
config's rate."""

from __future__ import annotations

import copy
import math
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapters.full import Full
from adapters.peft import Peft
from tests.toys import adapters as toys
from tests.toys.finetuning import Run, adapted, lora, table
from trainer.assembly import quiet
from trainer.assembly.build import instantiate
from trainer.data.batches import BatchOrder
from trainer.models.losses import NonFinite
from trainer.training.finetune import FineTune, reseed


@dataclass
class Seen(lightning.Callback):
    """What each step had: gradients before and after clipping, rates, and the weights after it."""

    gradients: list[list[Tensor]] = field(default_factory=list)
    clipped: list[list[Tensor | None]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)
    moments: list[dict[int, dict[str, Any]]] = field(default_factory=list)
    sums: list[dict[str, float]] = field(default_factory=list)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        trainer.optimizers[0].register_step_pre_hook(self.before_step)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients.append([p.grad.clone() for p in trained(module)])

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.step_done:
            self.clipped.append(
                [None if p.grad is None else p.grad.clone() for p in trained(module)]
            )
            self.norms.append(float(module.grad_norm))
            self.weights.append([p.detach().clone() for p in trained(module)])
            self.moments.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))
            self.sums.append(
                {k: float(module.sums[k]) for k in ("loss", "tokens", "right", "processed")}
            )


def trained(module: Any) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def naive(
    run: Run, model: Any, lr: float, steps: int
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Gradients and weights of AdamW's steps, row by row and in float64, from the definition of a
    step's loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    first, second = (
        [torch.zeros_like(p) for p in parameters],
        [torch.zeros_like(p) for p in parameters],
    )
    gradients, weights = [], []
    for step in range(steps):
        rows = [run.rows[sequence] for sequence, _ in run.plan().window(step)]
        tokens = sum(sum(row.trained[1:]) for row in rows)
        for row in rows:
            logits = (
                model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)
            )
            loss = -sum(logits[t - 1, row.ids[t]] for t in range(1, len(row.ids)) if row.trained[t])
            (loss / tokens).backward()
        gradients.append([p.grad.clone() for p in parameters])
        with torch.no_grad():
            for p, m, v in zip(parameters, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * p.grad)
                v.mul_(0.999).add_(0.001 * p.grad**2)
                p -= (
                    lr
                    * (m / (1 - 0.9 ** (step + 1)))
                    / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                )
                p.grad = None
        weights.append([p.detach().clone() for p in parameters])
    return gradients, weights


def same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    return all(
        (a - b).abs().max() <= tolerance * b.abs().max()
        for a, b in zip(actual, expected, strict=True)
    )


# steps


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_a_step_is_the_same_however_it_is_divided(tmp_path, batch_size, accumulate):
    run = Run(
        tmp_path,
        [f"batch_size={batch_size}", f"accumulate={accumulate}", "objective.max_grad_norm=null"],
    )
    counts = {run.plan().micro_batches(0)[i][0].window_tokens for i in range(accumulate)}
    assert len(counts) == 1
    shares = [
        sum(int(run.rows.trained[pick.sequence]) for pick in picks)
        for picks in run.plan().micro_batches(0)
    ]
    # so that a mean of means would be another number
    assert accumulate == 1 or max(shares) > 1.5 * min(shares)
    seen = Seen()
    run.fit(*adapted(), seen)
    gradients, weights = naive(run, adapted()[1], 1e-2, 3)
    # The loss and its gradient at the logits are in fp32, the rest in float64; Adam may enlarge an
    # error where a gradient is near 0.
    for step in range(3):
        assert same(seen.gradients[step], gradients[step], 1e-4)
        assert same(seen.weights[step], weights[step], 1e-3)
        moved = [
            (now - start).abs().max()
            for now, start in zip(weights[step], trained(adapted()[1]), strict=True)
        ]
        assert min(moved) > 5e-3
    assert [sums["tokens"] for sums in seen.sums] == [
        sum(int(run.rows.trained[sequence]) for sequence, _ in run.plan().window(step))
        for step in range(3)
    ]


def test_the_last_step_may_be_smaller(tmp_path):
    # 8 rows, then 5
    run = Run(tmp_path, ["batch_size=2", "accumulate=4", "objective.max_grad_norm=null"], table(13))
    seen = Seen()
    run.fit(*adapted(), seen, steps=2)
    gradients, _ = naive(run, adapted()[1], 1e-2, 2)
    assert same(seen.gradients[1], gradients[1], 1e-4)
    assert seen.sums[1]["tokens"] == sum(
        int(run.rows.trained[sequence]) for sequence, _ in run.plan().window(1)
    )


def test_two_processes_take_the_step_of_one(tmp_path):
    """4 rows of each of two processes are 8 of one, also in the last, smaller step, of which one
    process has less."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    seen = Seen()
    Run(tmp_path / "one", ["objective.max_grad_norm=0.5"], table(13)).fit(*adapted(), seen, steps=2)
    for step in range(2):
        assert same(first["gradients"][step], seen.gradients[step], 1e-5)
        assert same(first["weights"][step], seen.weights[step], 1e-4)
        assert all(
            torch.equal(a, b)
            for a, b in zip(first["weights"][step], second["weights"][step], strict=True)
        )
        for rank in (first, second):
            assert rank["norms"][step] == pytest.approx(seen.norms[step], rel=1e-5)
            for key in ("loss", "tokens", "right"):
                assert rank["sums"][step][key] == pytest.approx(seen.sums[step][key], rel=1e-5)
    # One process alone had an infinite loss in the third step: both have passed over it.
    assert first["skipped"] == second["skipped"] == 1
    assert all(
        torch.equal(a, b) for a, b in zip(first["weights"][2], first["weights"][1], strict=True)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(second["weights"][2], first["weights"][1], strict=True)
    )


def _rank(rank: int, port: int, folder: Path) -> None:
    # As torchrun sets it up.
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    quiet.quiet()
    run = Run(
        folder / str(rank),
        [
            "batch_size=4",
            "lightning.devices=2",
            "lightning.strategy=ddp",
            "objective.max_grad_norm=0.5",
            "max_epochs=2",
        ],
        table(13),
    )
    # One epoch of the other run is 13 rows, so that its two steps have 8 and 5.
    plan = run.plan
    seen = Seen()
    run.config["max_epochs"] = 1
    short = plan(2)
    run.plan = lambda ranks=1: Long(short)  # type: ignore[method-assign]
    spoil = Spoil({2} if rank == 1 else set(), "loss", math.inf)
    module = run.fit(*adapted(), seen, spoil, steps=3)
    torch.save(
        {
            "gradients": seen.gradients,
            "weights": seen.weights,
            "norms": seen.norms,
            "sums": seen.sums,
            "skipped": module.skipped,
        },
        folder / f"rank{rank}.pt",
    )


class Long:
    """An order of batches that starts again after its last step."""

    def __init__(self, plan: BatchOrder):
        self.plan, self.accumulate = plan, plan.accumulate

    def micro_batches(self, step: int, rank: int = 0) -> Any:
        return self.plan.micro_batches(step % 2, rank)


# steps that are not finite


@dataclass
class Spoil(lightning.Callback):
    """Makes some steps' loss, or one of their gradients, something else."""

    steps: set[int]
    what: str
    value: float

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        of = module.loss

        def loss(batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
            summed, sums = of(batch)
            if module.step in self.steps and self.what == "loss":  # the gradient stays as it is
                sums["loss"] = sums["loss"] * 0 + self.value
            if module.step in self.steps and self.what == "both":
                summed = summed * self.value
                sums["loss"] = summed.detach()
            return summed, sums

        module.loss = loss
        if self.what == "gradient":
            middle = trained(module)[3]
            middle.register_hook(
                lambda g: torch.full_like(g, self.value) if module.step in self.steps else None
            )


@pytest.mark.parametrize("what", ["loss", "gradient", "both"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", ["1.0", "null"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, what, value, max_grad_norm):
    run = Run(
        tmp_path, ["batch_size=2", "accumulate=2", f"objective.max_grad_norm={max_grad_norm}"]
    )
    seen = Seen()
    module = run.fit(*adapted(), seen, Spoil({2}, what, value), steps=5)
    assert module.skipped == 1
    assert module.skipped_in_a_row == 0
    unchanged = [
        all(torch.equal(a, b) for a, b in zip(seen.weights[i], seen.weights[i - 1], strict=True))
        for i in range(1, 5)
    ]
    assert unchanged == [False, True, False, False]
    for index, state in seen.moments[2].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, seen.moments[1][index][key])
            if key == "step":
                assert float(seen.moments[4][index][key]) == 4
    assert all(torch.isfinite(p).all() for p in trained(module))


def test_too_many_such_steps_in_a_row_end_the_run(tmp_path):
    run = Run(tmp_path, ["batch_size=2", "objective.nonfinite_limit=3"])
    with pytest.raises(NonFinite) as error:
        run.fit(*adapted(), Spoil({1, 2, 4, 5, 6}, "both", math.nan), steps=8)
    message = str(error.value)
    assert message.startswith(
        "3 steps in a row, up to step 7, had a loss or gradient that is not finite (loss nan,"
        " gradient norm nan)."
    )
    rows = [pick.sequence for picks in run.plan().micro_batches(6) for pick in picks]
    assert f"the rows of the last one: {rows}" in message


def test_as_many_such_steps_apart_do_not(tmp_path):
    module = Run(tmp_path, ["batch_size=2", "objective.nonfinite_limit=3"]).fit(
        *adapted(), Spoil({0, 1, 3, 4, 6, 7}, "both", math.nan), steps=8
    )
    assert (module.skipped, module.skipped_in_a_row) == (6, 2)


# gradients, rates and groups


@pytest.mark.parametrize("limit", [0.05, 1e6, None])
def test_gradients_are_clipped_by_their_common_norm(tmp_path, limit):
    run = Run(tmp_path, [f"objective.max_grad_norm={'null' if limit is None else limit}"])
    seen = Seen()
    run.fit(*adapted(), seen, steps=2)
    for gradients, clipped, norm in zip(seen.gradients, seen.clipped, seen.norms, strict=True):
        total = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        assert norm == pytest.approx(total, rel=1e-6)
        assert total > 0.05
        factor = min(1.0, (limit or math.inf) / (total + 1e-6))
        for before, after in zip(gradients, clipped, strict=True):
            torch.testing.assert_close(after, factor * before, rtol=1e-6, atol=0)
        others = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
        for other, gradient in zip(others, gradients, strict=True):
            other.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(others, limit or math.inf)
        assert all(
            torch.equal(other.grad, after) for other, after in zip(others, clipped, strict=True)
        )


def test_each_step_has_its_schedules_rate_and_groups_keep_their_ratio(tmp_path):
    run = Run(
        tmp_path,
        [
            "batch_size=2",
            "accumulate=2",
            "schedule=cosine",
            "schedule.warmup=2",
            "schedule.final=0.1",
        ],
    )
    seen = Seen()
    run.fit(*adapted(lora(lr_ratio=16.0)), seen, steps=6)
    expected = [0.5, 1.0] + [0.1 + 0.9 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert [rates[0] for rates in seen.rates] == pytest.approx(
        [1e-2 * factor for factor in expected]
    )
    assert [rates[1] for rates in seen.rates] == pytest.approx(
        [16e-2 * factor for factor in expected]
    )


@pytest.mark.parametrize("adapter", [Full(), Peft("LN_TUNING", 1), lora()])
# LN tuning, of any norm but LayerNorm
@pytest.mark.filterwarnings("ignore:Unsupported layer type.*RMSNorm:UserWarning")
def test_vectors_do_not_decay(tmp_path, adapter):
    run = Run(tmp_path, ["optimizer.weight_decay=0.1"])
    adapter, model = adapted(adapter, toys.llama(attention_bias=True))
    module = FineTune(
        model,
        adapter,
        instantiate(run.config["optimizer"]),
        lambda step: 1.0,
        1,
        False,
        1,
        0,
        None,
        8,
        False,
        3,
        repeat_smaller=False,
    )
    optimizer = module.configure_optimizers()
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert set(decays) == {id(p) for p in trained(module)}
    for p in trained(module):
        assert decays[id(p)] == (0.1 if p.ndim > 1 else 0.0)
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in trained(module)]
    optimizer.step()
    for p, old in zip(trained(module), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 1e-2 * 0.1) if p.ndim > 1 else old)


def test_a_run_that_goes_on_has_its_configs_rates(tmp_path):
    class Saved(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"step-{module.step:08d}.ckpt")

    first = Seen()
    Run(tmp_path, ["optimizer.lr=1e-2"]).fit(*adapted(), first, Saved(), steps=2)
    second = Seen()
    module = Run(tmp_path, ["optimizer.lr=3e-3"]).fit(
        *adapted(), second, steps=3, resumed=str(tmp_path / "step-00000002.ckpt")
    )
    assert first.rates == [[1e-2]] * 2
    assert second.rates == [[3e-3]]
    assert {float(state["step"]) for state in second.moments[0].values()} == {3.0}
    assert module.tokens == sum(len(row.ids) for row in table(24))


@pytest.mark.parametrize(
    "adapter", [lora(dropout=0.2), Peft("LOHA", 1, r=4, target_modules=["q_proj", "up_proj"])]
)
def test_gradient_checkpointing_changes_no_gradient(tmp_path, adapter):
    def fitted(checkpointing: bool) -> tuple[Seen, int]:
        seen, calls = Seen(), []
        run = Run(
            tmp_path,
            [f"objective.gradient_checkpointing={checkpointing}", "batch_size=4", "accumulate=2"],
        )
        torch.manual_seed(1)
        own, model = adapted(copy.deepcopy(adapter))
        layer = next(
            module for name, module in model.named_modules() if name.endswith("layers.0.mlp.act_fn")
        )
        layer.register_forward_hook(lambda *_: calls.append(1))
        run.fit(own, model, seen, steps=2)
        return seen, len(calls)

    plain, recomputed = fitted(False), fitted(True)
    for a, b in zip(plain[0].gradients, recomputed[0].gradients, strict=True):
        assert same(b, a, 1e-12)
    assert all(g.abs().max() > 0 for g in plain[0].gradients[1])
    assert recomputed[1] - plain[1] == 4  # in each of four backward passes


# precisions and optimisers


def test_mixed_precision_keeps_trained_weights_and_gradients_in_fp32(tmp_path):
    run = Run(tmp_path, ["precision=bf16-mixed"])
    seen, exact = Seen(), Seen()
    run.fit(*adapted(lora(dtype="float32"), toys.llama(torch.bfloat16)), seen)
    Run(tmp_path, []).fit(*adapted(lora(dtype="float32"), toys.llama(torch.float32)), exact)
    assert (
        {g.dtype for g in seen.gradients[0]}
        == {w.dtype for w in seen.weights[0]}
        == {torch.float32}
    )
    # The base's weights and each activation have 8 bits, through two layers and back.
    for got, expected in zip(seen.gradients[0], exact.gradients[0], strict=True):
        assert 0 < (got - expected).norm() < 0.1 * expected.norm()
    assert seen.sums[2]["loss"] == pytest.approx(exact.sums[2]["loss"], rel=0.02)
    assert seen.sums[2]["loss"] / seen.sums[2]["tokens"] < 10


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings(
    "ignore:Paged optimizers are not supported on CPU:UserWarning"
)  # bitsandbytes warns, and continues
def test_every_optimiser_trains(tmp_path, name):
    # More than 4096 entries: smaller tensors keep moments of 32 bits.
    adapter, model = adapted(lora(rank=64, dtype="float32"), toys.llama(torch.float32))
    before = [p.detach().clone() for p in trained(model)]
    seen = Seen()
    run = Run(tmp_path, [f"optimizer={name}", "optimizer.lr=3e-3", "max_epochs=4"], table(8))
    module = run.fit(adapter, model, seen, Spoil({2}, "both", math.nan), steps=4)
    assert seen.sums[3]["loss"] < seen.sums[0]["loss"]
    assert module.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(seen.weights[2], seen.weights[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen.weights[3], before, strict=True))
    assert ("torch.uint8" in str(seen.moments[0])) == ("8bit" in name)


def test_adalora_is_penalised_once_a_step_and_told_of_each(tmp_path, monkeypatch):
    def fitted(accumulate: int) -> tuple[Seen, list[int]]:
        adapter = Peft(
            "ADALORA", 1, init_r=4, target_r=2, target_modules=["q_proj"], orth_reg_weight=0.5
        )
        adapter, model = adapted(adapter)
        reported: list[int] = []
        allocate = model.base_model.update_and_allocate
        monkeypatch.setattr(
            model.base_model,
            "update_and_allocate",
            lambda step: (reported.append(step), allocate(step)),
        )
        seen = Seen()
        overrides = [
            f"batch_size={8 // accumulate}",
            f"accumulate={accumulate}",
            "objective.max_grad_norm=null",
        ]
        Run(tmp_path, overrides).fit(adapter, model, seen)
        return seen, reported

    (whole, reported), (divided, _) = fitted(1), fitted(4)
    assert reported == [1, 2, 3]
    for step in range(3):
        for a, b in zip(divided.gradients[step], whole.gradients[step], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    adapter, model = adapted(
        Peft("ADALORA", 1, init_r=4, target_r=2, target_modules=["q_proj"], orth_reg_weight=0.5)
    )
    plain, _ = naive(Run(tmp_path), copy.deepcopy(model), 1e-2, 1)
    adapter.penalty(model).backward()
    for got, of_loss, p in zip(whole.gradients[0], plain[0], trained(model), strict=True):
        own = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(got, of_loss + own, rtol=1e-4, atol=1e-6)
    assert sum(float(p.grad.abs().max()) for p in trained(model) if p.grad is not None) > 0.01


# randomness


def test_each_micro_batch_has_its_own_randomness_and_always_the_same():
    drawn = {}
    for place in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]:
        reseed(*place)
        drawn[place] = (float(torch.rand(())), float(np.random.rand()))
    assert (
        len({torch_ for torch_, _ in drawn.values()})
        == len({numpy for _, numpy in drawn.values()})
        == 5
    )
    reseed(0, 0, 1, 0)
    assert float(torch.rand(())) == drawn[(0, 0, 1, 0)][0]


def test_dropout_does_not_depend_on_where_a_run_started(tmp_path):
    class Saved(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if module.step_done:
                trainer.save_checkpoint(tmp_path / f"step-{module.step:08d}.ckpt")

    overrides = ["batch_size=2", "accumulate=2"]
    through, after = Seen(), Seen()
    Run(tmp_path, overrides).fit(*adapted(lora(dropout=0.3)), through, Saved(), steps=4)
    torch.manual_seed(77)
    Run(tmp_path, overrides).fit(
        *adapted(lora(dropout=0.3)), after, steps=4, resumed=str(tmp_path / "step-00000002.ckpt")
    )
    for a, b in zip(through.weights[2:], after.weights, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    without = Seen()
    Run(tmp_path, overrides).fit(*adapted(), without, steps=1)
    assert not torch.equal(without.weights[0][0], through.weights[0][0])
