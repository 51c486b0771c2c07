"""Sparse adapters in several processes and under a loss scale, against plain float64 references;
what they refuse, by the program."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import load_file
from torch import Tensor, nn

from adapters import sparse
from adapters.delta import AdapterError, Start
from adapters.rosa import RoSAAdapter, Scores
from adapters.sparse import SparseDelta
from adapters.spiel import SpIEL
from tests.ranks import spawn
from tests.toys import adapters as toys
from tests.toys import finetuning
from tests.toys.sparse import make as make_rosa
from trainer.models.base import Base

LR, BETAS, EPS, DECAY = 0.05, (0.9, 0.99), 1e-8, 0.3
ADAMW = partial(torch.optim.AdamW, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)


def rosa(**changes: Any) -> RoSAAdapter:
    settings = {"rank": 2, "alpha": 2.0, "density": 0.2, "mask_steps": 2, "mask": "gradient"}
    return make_rosa(**settings | {"gradient": "gathered"} | changes)


def spiel(**changes: Any) -> SpIEL:
    settings: dict[str, Any] = {
        "variant": "AG",
        "density": 0.25,
        "density_pattern": {},
        "weight_decay": DECAY,
        "reselection_steps": 5,
        "accumulation_steps": 3,
        "initial_rate": 0.6,
        "policy": "linear",
        "clip_moments": True,
        "momentum": 0.0,
        "support_seed": 0,
        "target_modules": "all-linear",
        "exclude_modules": [],
        "gradient": "gathered",
        "sparse_dtype": "float32",
        "within": "all",
        "train_modules": [],
    }
    return SpIEL(**settings | changes)


def net() -> Any:
    """One layer in float64, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 7, dtype=torch.float64))


def rows(step: int, rank: int, micro: int) -> tuple[Tensor, Tensor]:
    """A micro-batch; one number of its target, far from what can be learnt, makes it differ from
    the others."""
    draw = torch.Generator().manual_seed(100 * step + 10 * rank + micro)
    x, t = (
        torch.randn(3, 8, generator=draw, dtype=torch.float64),
        torch.randn(3, 7, generator=draw, dtype=torch.float64),
    )
    return x, t + 4 * torch.randn(3, 7, generator=draw, dtype=torch.float64).tanh()


def half_loss(y: Tensor, t: Tensor) -> Tensor:
    """Of one of a step's two micro-batches."""
    return (y - t).square().mean() / 2


def gradient(w: Tensor, bias: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """dL/dW of a micro-batch, from the loss's definition."""
    y = x @ w.T + bias
    return (y - t).T @ x / y.numel()


def step(adapter: Any, model: Any, optimizer: Any, done: int, broken: bool = False) -> Any:
    """One step of two micro-batches in this process, gradients averaged over processes as DDP does;
    broken ones change nothing."""
    rank = torch.distributed.get_rank()
    optimizer.zero_grad()
    for micro in range(2):
        x, t = rows(done, rank, micro)
        (half_loss(model(x), t) * (math.nan if broken and rank == 0 else 1)).backward()
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)
            p.grad /= 2
    adapter.before_step(model, 1.0)
    if broken:
        optimizer.zero_grad()
    optimizer.step()
    return adapter.after_step(model, done)


# two processes


# the step in which the first process has nothing finite, which opens SpIEL's second window
BROKEN = 6


def _rank(rank: int, folder: Path) -> None:
    actual: dict[str, Any] = {"masks": {}, "spiel": []}

    for score in ("squared", "mean"):
        torch.manual_seed(rank)  # nothing may depend on what a process draws for itself
        adapter = rosa(score=score)
        model: Any = adapter.attach(net(), Start(steps=9))
        optimizer = toys.optimiser(adapter, model, lr=0.0)
        step(adapter, model, optimizer, 1)
        torch.save(adapter.state(model), folder / f"{score}{rank}.pt")
        step(adapter, model, optimizer, 2)
        actual["masks"][score] = sparse.supports(model)["0"].tolist()
        torch.distributed.barrier()
        # the first process writes a run's checkpoints
        saved = torch.load(folder / f"{score}0.pt", weights_only=True)
        adapter = rosa(score=score)
        model = adapter.attach(net(), Start(steps=9, saved=saved))
        optimizer = toys.optimiser(adapter, model, lr=0.0)
        adapter.load_state(model, saved)
        step(adapter, model, optimizer, 2)
        actual["masks"][f"{score}, resumed"] = sparse.supports(model)["0"].tolist()

    for cut in (None, 1, 2, 8, 9):
        ag = spiel()
        model = ag.attach(net(), Start(steps=12))
        live = ag.optimizer(ag.parameter_groups(model), ADAMW)
        news = []
        for done in range(1, 10):
            news.append(step(ag, model, live, done, done == BROKEN))
            if done == cut:
                if rank == 0:
                    torch.save((ag.state(model), live.state_dict()), folder / "cut.pt")
                torch.distributed.barrier()
                saved, moments = torch.load(folder / "cut.pt", weights_only=True)
                ag = spiel()
                model = ag.attach(net(), Start(steps=12, saved=saved))
                live = ag.optimizer(ag.parameter_groups(model), ADAMW)
                ag.load_state(model, saved)
                live.load_state_dict(moments)
                torch.distributed.barrier()
        delta: Any = model[0].delta
        state = live.state[delta.values]
        numbers = {key: state[key].double() for key in ("exp_avg", "exp_avg_sq", "age")} | {
            "value": delta.values.detach().double()
        }
        actual["spiel"].append(
            (
                delta.indices.tolist(),
                {key: tensor.tolist() for key, tensor in numbers.items()},
                news,
            )
        )

    ag = spiel(accumulation_steps=1)
    model = ag.attach(net(), Start(steps=12))
    try:
        step(ag, model, ag.optimizer(ag.parameter_groups(model), ADAMW), 1)
    except AdapterError as error:
        actual["one step"] = str(error)
    torch.save(actual, folder / f"found{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes came to."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_rank, folder)
    return [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in (0, 1)]


def mask_of(score: str, processes: tuple[int, ...] = (0, 1)) -> list[int]:
    """The mask of two steps, two micro-batches and so many processes, while no weight moves."""
    layer = net()[0]
    actual = [
        gradient(layer.weight, layer.bias, *rows(done, rank, micro)).detach()
        for done in (1, 2)
        for rank in processes
        for micro in (0, 1)
    ]
    total = sum(g**2 for g in actual) if score == "squared" else sum(actual).abs()  # type: ignore[union-attr]
    order = sorted(range(56), key=lambda e: -total.flatten()[e])  # type: ignore[union-attr, return-value]
    return sorted(order[: int(0.2 * 56)])


@pytest.mark.parametrize("score", ["squared", "mean"])
def test_a_mask_is_of_all_processes_gradients(ranks, score):
    assert len({tuple(mask_of(score, of)) for of in ((0, 1), (0,), (1,))}) == 3
    assert ranks[0]["masks"][score] == ranks[1]["masks"][score] == mask_of(score)


@pytest.mark.parametrize("score", ["squared", "mean"])
def test_a_mask_that_was_cut_off_between_its_steps_is_of_all_processes_too(ranks, score):
    actual = [rank["masks"][f"{score}, resumed"] for rank in ranks]
    assert actual[0] == actual[1] == mask_of(score)


def reference() -> tuple[dict[int, dict[str, float]], list[dict[str, float] | None]]:
    """Nine steps of SpIEL-AG in two processes, entry by entry, from the seeded first support."""
    adapted: Any = spiel().attach(net(), Start(steps=12))
    layer, first = net()[0], adapted[0].delta.indices.tolist()
    entries = {e: {"value": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0, "age": 0.0} for e in first}
    k = len(first)
    start: set[int] = set()
    sums: dict[int, list[float]] = {}
    news: list[dict[str, float] | None] = []
    for done in range(1, 10):
        w = layer.weight.detach().clone()
        for e, entry in entries.items():
            w[e // 8, e % 8] += entry["value"]
        seen = {
            (rank, micro): gradient(w, layer.bias, *rows(done, rank, micro)).flatten().tolist()
            for rank in (0, 1)
            for micro in (0, 1)
        }
        total = [sum(parts) / 2 for parts in zip(*seen.values(), strict=True)]
        # The first process's first finite micro-batch finds the candidates, and its step is not
        # counted.
        if done in (1, BROKEN + 1):
            largest = sorted(range(56), key=lambda e: -abs(seen[0, 0][e]))[:k]
            sums = {e: [] for e in largest}
        elif (done - 1) % 5 < 3 and done != BROKEN:
            for e in sums:
                sums[e].append(total[e])
        if done != BROKEN:
            for e, entry in entries.items():
                entry["age"] += 1
                entry["exp_avg"] = BETAS[0] * entry["exp_avg"] + (1 - BETAS[0]) * total[e]
                entry["exp_avg_sq"] = (
                    BETAS[1] * entry["exp_avg_sq"] + (1 - BETAS[1]) * total[e] ** 2
                )
                m, v = (
                    entry["exp_avg"] / (1 - BETAS[0] ** entry["age"]),
                    entry["exp_avg_sq"] / (1 - BETAS[1] ** entry["age"]),
                )
                entry["value"] -= LR * DECAY * entry["value"] + LR * m / (math.sqrt(v) + EPS)
        if done % 5 != 3:
            news.append(None)
            continue
        rate = 1.0 if done == 3 else 0.6 * (1 - done / 12)
        order = sorted(entries, key=lambda e: abs(entries[e]["value"]))
        n = int(k * rate)
        free = sorted((e for e in sums if e not in order[n:]), key=lambda e: -abs(sum(sums[e])))
        n = min(n, len(free))
        new = [e for e in free[:n] if e not in entries]
        for e in [e for e in order[:n] if e not in free[:n]]:
            del entries[e]
        for e in new:
            count = len(sums[e])
            mean, mean2 = sum(sums[e]) / count, sum(g**2 for g in sums[e]) / count
            entries[e] = {
                "value": 0.0,
                "exp_avg": mean * (1 - BETAS[0] ** count),
                "exp_avg_sq": mean2 * (1 - BETAS[1] ** count),
                "age": count,
            }
        start = start or set(entries)
        news.append(
            {
                "replaced": len(new),
                "replaced_share": len(new) / k,
                "rate": rate,
                "still_of_first": len(start & set(entries)) / k,
            }
        )
    return entries, news


@pytest.mark.parametrize(
    "number", range(5), ids=["whole", "cut after 1", "cut after 2", "cut after 8", "cut after 9"]
)
def test_a_support_moves_by_all_processes_gradients(ranks, number):
    entries, news = reference()
    assert news[2] is not None
    assert news[7] is not None
    assert 0 < news[7]["replaced"] < news[2]["replaced"]
    for rank in ranks:
        indices, numbers, logged = rank["spiel"][number]
        assert indices == sorted(entries)
        for key, actual in numbers.items():
            assert actual == pytest.approx(
                [entries[e][key] for e in indices], rel=1e-4, abs=1e-6
            ), key
        assert [row if row is None else pytest.approx(row) for row in news] == logged
    # bit for bit
    assert (
        ranks[0]["spiel"][number][:2] == ranks[1]["spiel"][number][:2] == ranks[0]["spiel"][0][:2]
    )


def test_a_window_of_one_step_is_refused_in_two_processes(ranks):
    assert all("set adapter.accumulation_steps=2" in rank["one step"] for rank in ranks)


# fp16


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """precision=16-mixed, which Lightning has for GPUs only, on the CPU."""
    whole = finetuning.make_trainer

    def trainer(*args: Any) -> Any:
        made = whole(*args)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_factor=8.0, growth_interval=1)
        made.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        return made

    monkeypatch.setattr(finetuning, "make_trainer", trainer)


def fitted(folder: Path, adapter: Any, *overrides: str, steps: int = 5) -> Any:
    model = adapter.attach(toys.llama(torch.float32), Start(steps=steps))
    run = finetuning.Run(
        folder, ["optimizer.fused=false", "batch_size=2", "accumulate=2", *overrides]
    )
    skipped = run.fit(adapter, model, steps=steps).skipped
    assert skipped == 0
    return model


@pytest.mark.parametrize("schedule", ["wl", "spa_only"])
def test_rosa_trains_in_16_mixed(tmp_path, half, schedule):
    model = fitted(
        tmp_path, rosa(schedule=schedule, density=0.05, dtype="float32", sparse_dtype="float32")
    )
    assert all(layer.delta.values.any() for _, layer in sparse.layers(model))


def test_steps_count_alike_in_a_mask_whatever_their_loss_scales(tmp_path, half, monkeypatch):
    """The second step's scale is 8 times that of the first; fp16 rounds gradients by a part in a
    thousand."""

    def chosen(folder: str) -> dict[str, Tensor]:
        adapter = rosa(density=0.05, dtype="float32", sparse_dtype="float32")
        return sparse.supports(fitted(tmp_path / folder, adapter, "optimizer.lr=1e-9", steps=2))

    actual = chosen("half")
    monkeypatch.undo()
    for name, expected in chosen("whole").items():
        assert torch.isin(actual[name], expected).float().mean() > 0.95


@pytest.mark.parametrize("variant", ["AG", "MA"])
def test_spiel_trains_in_16_mixed_as_without(tmp_path, half, monkeypatch, variant):
    """The same entries grow, and seeded moments are of gradients without the loss scale."""

    def trained(folder: str) -> Any:
        adapter = spiel(
            variant=variant,
            density=0.05,
            reselection_steps=4,
            accumulation_steps=3,
            sparse_dtype="float32",
        )
        model = fitted(tmp_path / folder, adapter)
        return [
            (layer.delta, adapter.live_optimizer.state[layer.delta.values])
            for _, layer in sparse.layers(model)
        ]

    actual = trained("half")
    monkeypatch.undo()
    for (delta, state), (expected, right) in zip(actual, trained("whole"), strict=True):
        both = (
            torch.isin(delta.indices, expected.indices),
            torch.isin(expected.indices, delta.indices),
        )
        assert both[0].float().mean() > 0.9
        for key in right.keys() & {"exp_avg", "exp_avg_sq"}:
            a, b = state[key][both[0]], right[key][both[1]]
            assert (a - b).norm() < 0.1 * b.norm()
        for key in right.keys() & {"rows", "columns"}:
            assert (state[key] - right[key]).norm() < 0.2 * right[key].norm()


@pytest.mark.parametrize("kind", ["exact", "candidates", "first"])
@pytest.mark.parametrize("squared", [False, True])
def test_a_gradient_may_be_beyond_fp16(kind, squared):
    """fp16's largest number is 65504, and products of its numbers are larger."""
    draw = torch.Generator().manual_seed(1)
    dy, x = torch.randn(6, 4, generator=draw).half(), torch.randn(6, 5, generator=draw).half()
    loud = dy.clone(), x.clone()
    loud[0][:, 1], loud[1][:, 2] = 3e3, 3e3
    micro = [loud, (-loud[0], loud[1]), (dy, x)]
    scores = Scores(SparseDelta(nn.Linear(5, 4).half(), 3, torch.float32), kind, squared, "layer")
    for one in micro:
        scores(*one)
    products = [(dy.double().T @ x.double()).flatten() for dy, x in micro]
    total = sum(product**2 if squared else product for product in products)
    allowed = (
        products[0].abs().topk({"exact": 20, "candidates": 12, "first": 3}[kind]).indices.tolist()
    )
    expected = sorted(allowed, key=lambda e: -abs(total[e]))[:3]  # type: ignore[index, arg-type]
    assert scores.support(dy.device).tolist() == sorted(expected)


# through the real program


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            (
                "adapter=rosa adapter.warmup_steps=0 adapter.density=0.1"
                " adapter.density_pattern={up_porj:0.1}"
            ),
            "has 'up_porj', which is the end of no",
        ),
        (
            "adapter=sparse adapter.density=0.1 adapter.density_pattern={up_proj:2}",
            r"density of model\.layers\.0\.mlp\.up_proj is 2: expected",
        ),
        ("adapter=spiel adapter.density_pattern={mlp:0.1}", "density_pattern has 'mlp'"),
        (
            "adapter=spiel adapter.density=1e-4",
            "density 0.0001 of model.* is less than one of its 256 entries: raise it",
        ),
        (
            "adapter=spiel_ma adapter.accumulation_steps=20",
            "accumulation_steps=20 must be less than adapter.reselection_steps=20",
        ),
        ("adapter=spiel adapter.momentum=0.5", "adapter.momentum=0.5 is of variant=MA"),
    ],
)
def test_what_cannot_be_is_told_before_the_base_is_loaded(
    train, chats, monkeypatch, settings, message
):
    monkeypatch.setattr(Base, "load", None)
    with pytest.raises(AdapterError, match=message):
        train(f"task.path={chats}", *settings.split())


def test_lora_only_through_the_program_is_lora(train, chats):
    """The same weights from the same seed, but for what a sum in another order rounds."""
    settings = (
        f"task.path={chats}",
        "max_steps=4",
        "batch_size=2",
        "callbacks.evaluation.every=null",
        "adapter.rank=2",
        "adapter.alpha=4",
    )
    both = [
        train(*settings, *adapter)
        for adapter in (
            ("adapter=lora",),
            ("adapter=rosa", "adapter.density=0.1", "adapter.schedule=lora_only"),
        )
    ]
    expected, actual = (load_file(run / "adapter" / "adapter_model.safetensors") for run in both)
    assert actual.keys() == expected.keys()
    assert not (both[1] / "masks.safetensors").exists()
    for name, tensor in expected.items():
        assert tensor.any()
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-4)
