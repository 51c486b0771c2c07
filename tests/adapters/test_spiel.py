"""SpIEL against plain loops in float64: its optimisers, what it drops and grows, and when."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import sparse
from adapters.delta import AdapterError, Start
from adapters.sparse import SparseDelta
from adapters.sparse_adapter import SparseAdapter
from adapters.spiel import Candidates, SpIEL
from adapters.spiel_optimizers import SM3, SpielAdamW
from trainer.config.errors import ConfigError
from trainer.training.optimizer import clip_gradients

LR, BETAS, EPS = 0.05, (0.9, 0.99), 1e-8
ADAM = {"lr": LR, "betas": BETAS, "eps": EPS}
ADAMW = partial(torch.optim.AdamW, **ADAM, weight_decay=0.0)


class Net(nn.Module):
    """Two linear layers of float64, whose gradients depend on all of both."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = (
                nn.Linear(6, 7, dtype=torch.float64),
                nn.Linear(7, 5, dtype=torch.float64),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


def make(**changes: Any) -> SpIEL:
    settings: dict[str, Any] = {
        "variant": "AG",
        "density": 0.3,
        "density_pattern": {},
        "weight_decay": 0.3,
        "reselection_steps": 4,
        "accumulation_steps": 2,
        "initial_rate": 0.6,
        "policy": "linear",
        "momentum": 0.0,
        "support_seed": 0,
        "clip_moments": True,
        "target_modules": "all-linear",
        "exclude_modules": [],
        "gradient": "gathered",
        "sparse_dtype": "float32",
        "within": "all",
        "train_modules": [],
    }
    return SpIEL(**settings | changes)


def attached(steps: int = 10, **changes: Any) -> tuple[SpIEL, Any, Any]:
    """(adapter, model, optimiser)."""
    adapter = make(**changes)
    model = adapter.attach(Net(), Start(steps=steps))
    return adapter, model, adapter.optimizer(adapter.parameter_groups(model), ADAMW)


def rows(count: int, features: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches; inputs beyond the first `features` are 0."""
    draw = torch.Generator().manual_seed(3)
    actual = []
    for _ in range(count):
        x, t = (
            torch.randn(4, 6, generator=draw, dtype=torch.float64),
            torch.randn(4, 5, generator=draw, dtype=torch.float64),
        )
        x[:, features:] = 0
        actual.append((x, t))
    return actual


def half_loss(y: Tensor, t: Tensor) -> Tensor:
    """Of one of a step's two micro-batches."""
    return (y - t).square().mean() / 2


def one_step(
    adapter: SpIEL,
    model: Any,
    optimizer: Any,
    step: int,
    micro: list[tuple[Tensor, Tensor]],
    scale: float = 1.0,
    limit: float | None = None,
) -> Any:
    """One step of two micro-batches, as FineTune makes it with a loss scale and clipping."""
    optimizer.zero_grad()
    for x, t in micro:
        (half_loss(model(x), t) * scale).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= scale
    adapter.before_step(model, scale)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    adapter.after_clipping(model, clip_gradients(trained, None, limit)[1])
    optimizer.step()
    return adapter.after_step(model, step)


# the reference


class Naive:
    """SpIEL in plain Python: for each layer a dict from an entry to its value and what its
    optimiser keeps of it."""

    def __init__(
        self,
        adapter: SpIEL,
        model: Any,
        steps: int,
        momentum: float = 0.0,
        limit: float | None = None,
    ):
        plain = Net()
        self.limit = limit
        self.factors: list[float] = []
        self.layers = {name: plain.get_submodule(name) for name in ("first", "last")}
        self.variant, self.policy, self.decay, self.steps = (
            adapter.variant,
            adapter.policy,
            adapter.weight_decay,
            steps,
        )
        self.momentum = momentum
        self.entries = {
            name: {
                e: {"value": 0.0, "m": 0.0, "v": 0.0, "age": 0.0, "momentum": 0.0}
                for e in layer.delta.indices.tolist()
            }
            for name, layer in sparse.layers(model)
        }
        self.r = {name: [0.0] * layer.out_features for name, layer in self.layers.items()}
        self.c = {name: [0.0] * layer.in_features for name, layer in self.layers.items()}
        self.first: dict[str, set[int]] = {}
        # entries that were dropped and grown at once, while others were replaced
        self.as_they_were = 0
        self.open: dict[str, dict[str, Any]] = {}

    def gradients(self, x: Tensor, t: Tensor) -> dict[str, list[float]]:
        """Of the dense weights W + S, row by row."""
        weights = {}
        for name, layer in self.layers.items():
            w = layer.weight.detach().clone()
            for e, entry in self.entries[name].items():
                w[e // layer.in_features, e % layer.in_features] += entry["value"]
            weights[name] = w.requires_grad_()
        h = (x @ weights["first"].T + self.layers["first"].bias.detach()).tanh()
        half_loss(h @ weights["last"].T + self.layers["last"].bias.detach(), t).backward()
        return {name: w.grad.flatten().tolist() for name, w in weights.items()}  # type: ignore[union-attr]

    def step(self, done: int, micro: list[tuple[Tensor, Tensor]]) -> dict[str, float] | None:
        """One step; `done` includes it."""
        seen = [self.gradients(x, t) for x, t in micro]
        totals = {
            name: [sum(parts) for parts in zip(*(actual[name] for actual in seen), strict=True)]
            for name in self.layers
        }
        squares = sum(totals[name][e] ** 2 for name in self.layers for e in self.entries[name])
        norm = math.sqrt(squares) + 1e-6
        self.factors.append(1.0 if self.limit is None else min(1.0, self.limit / norm))
        for name in self.layers:
            total = totals[name]
            if (done - 1) % 4 == 0:
                start = seen[0][name]
                largest = sorted(range(len(start)), key=lambda e: -abs(start[e]))[
                    : len(self.entries[name])
                ]
                self.open[name] = {
                    "g": dict.fromkeys(largest, 0.0),
                    "g2": dict.fromkeys(largest, 0.0),
                }
            if (done - 1) % 4 < 2:
                for e in self.open[name]["g"]:
                    self.open[name]["g"][e] += total[e]
                    self.open[name]["g2"][e] += total[e] ** 2
            clipped = [g * self.factors[-1] for g in total]
            (self.adam if self.variant == "AG" else self.sm3)(name, clipped)
        return self.reselect(done) if done % 4 == 2 and done < self.steps else None

    def adam(self, name: str, g: list[float]) -> None:
        for e, entry in self.entries[name].items():
            if entry.pop("grown", False):  # its moments are of gradients that nothing has clipped
                entry["m"] *= self.factors[-1]
                entry["v"] *= self.factors[-1] ** 2
            entry["age"] += 1
            entry["m"] = BETAS[0] * entry["m"] + (1 - BETAS[0]) * g[e]
            entry["v"] = BETAS[1] * entry["v"] + (1 - BETAS[1]) * g[e] ** 2
            m, v = (
                entry["m"] / (1 - BETAS[0] ** entry["age"]),
                entry["v"] / (1 - BETAS[1] ** entry["age"]),
            )
            entry["value"] -= LR * self.decay * entry["value"] + LR * m / (math.sqrt(v) + EPS)

    def sm3(self, name: str, g: list[float]) -> None:
        width, r, c = len(self.c[name]), list(self.r[name]), list(self.c[name])
        for e, entry in self.entries[name].items():
            row, column = e // width, e % width
            nu = min(self.r[name][row], self.c[name][column]) + g[e] ** 2
            r[row], c[column] = max(r[row], nu), max(c[column], nu)
            update = g[e] / math.sqrt(nu + EPS)
            entry["momentum"] = self.momentum * entry["momentum"] + (1 - self.momentum) * update
            entry["value"] -= LR * self.decay * entry["value"] + LR * entry["momentum"]
        self.r[name], self.c[name] = r, c

    def rate(self, done: int) -> float:
        if self.policy == "cosine":
            return 0.6 * (1 + math.cos(math.pi * done / self.steps)) / 2
        return 1.0 if done == 2 else 0.6 * (1 - done / self.steps)

    def reselect(self, done: int) -> dict[str, float]:
        replaced = total = stayed = 0
        for name, entries in self.entries.items():
            n = int(len(entries) * self.rate(done))
            order = sorted(entries, key=lambda e: (abs(entries[e]["value"]), e))
            dropped, active = order[:n], order[n:]
            grown = self.best(name, active, n)
            new = [e for e in grown if e not in dropped]
            leaving = [e for e in dropped if e not in grown][: len(new)]
            self.as_they_were += (n < len(entries)) * len(set(dropped) & set(grown))
            for e in leaving:
                del entries[e]
            for e in new:
                entries[e] = {"value": 0.0, "m": 0.0, "v": 0.0, "age": 0.0, "momentum": 0.0}
                if self.variant == "AG":
                    mean, mean2 = self.open[name]["g"][e] / 2, self.open[name]["g2"][e] / 2
                    entries[e] |= {
                        "m": mean * (1 - BETAS[0] ** 2),
                        "v": mean2 * (1 - BETAS[1] ** 2),
                        "age": 2.0,
                        "grown": True,
                    }
            replaced, total = replaced + len(new), total + len(entries)
            stayed += len(self.first.setdefault(name, set(entries)) & set(entries))
        return {
            "replaced": replaced,
            "replaced_share": replaced / total,
            "rate": self.rate(done),
            "still_of_first": stayed / total,
        }

    def best(self, name: str, active: list[int], n: int) -> list[int]:
        if self.variant == "AG":
            scores = {e: abs(g) for e, g in self.open[name]["g"].items()}
        else:
            width = len(self.c[name])
            scores = {
                i * width + j: ri * cj
                for i, ri in enumerate(self.r[name])
                for j, cj in enumerate(self.c[name])
            }
            scores = {e: score for e, score in scores.items() if score > 0}
        return sorted((e for e in scores if e not in active), key=lambda e: -scores[e])[:n]


def agree(adapter: SpIEL, model: Any, optimizer: Any, naive: Naive) -> None:
    """The supports are the same and sorted, with the same numbers, and the base's weights hold W
    and W + S."""
    plain = Net()
    for name, layer in sparse.layers(model):
        delta: Any = layer.delta
        expected = [naive.entries[name][e] for e in sorted(naive.entries[name])]
        assert delta.indices.tolist() == sorted(naive.entries[name])

        def same(actual: Tensor, key: str, expected: Any = expected) -> None:
            right = torch.tensor([entry[key] for entry in expected])
            torch.testing.assert_close(actual.detach(), right, rtol=2e-4, atol=1e-6)

        same(delta.values, "value")
        state = optimizer.state[delta.values]
        if adapter.variant == "AG":
            same(state["exp_avg"], "m")
            same(state["exp_avg_sq"], "v")
            assert state["age"].tolist() == [entry["age"] for entry in expected]
        else:
            torch.testing.assert_close(
                state["rows"], torch.tensor(naive.r[name]), rtol=2e-4, atol=1e-6
            )
            torch.testing.assert_close(
                state["columns"], torch.tensor(naive.c[name]), rtol=2e-4, atol=1e-6
            )
            if naive.momentum:
                same(state["momentum"], "momentum")
        w = plain.get_submodule(name).weight.detach().flatten()
        elsewhere = torch.ones_like(w, dtype=torch.bool)
        elsewhere[delta.indices.long()] = False
        assert torch.equal(layer.base.weight.flatten()[elsewhere], w[elsewhere])
        assert torch.equal(
            layer.base.weight.flatten()[~elsewhere], w[~elsewhere] + delta.values.detach()
        )


def follow(
    steps: int,
    features: int = 6,
    momentum: float = 0.0,
    limit: float | None = None,
    **changes: Any,
) -> tuple[Naive, list[dict[str, float]]]:
    """Both side by side; returns the reference after the run and what was reported."""
    adapter, model, optimizer = attached(steps, momentum=momentum, **changes)
    naive = Naive(adapter, model, steps, momentum, limit)
    data, news = rows(2 * steps, features), []
    for done in range(1, steps + 1):
        micro = data[2 * done - 2 : 2 * done]
        expected = naive.step(done, micro)
        actual = one_step(adapter, model, optimizer, done, micro, limit=limit)
        assert (actual is None) == (expected is None), done
        if expected is not None:
            assert actual == pytest.approx(expected)
            news.append(actual)
        agree(adapter, model, optimizer, naive)
    return naive, news


# dropping and growing


@pytest.mark.long
@pytest.mark.parametrize("policy", ["linear", "cosine"])
@pytest.mark.parametrize(("variant", "momentum"), [("AG", 0.0), ("MA", 0.0), ("MA", 0.7)])
def test_a_run_is_that_of_plain_loops(variant, momentum, policy):
    naive, news = follow(18, momentum=momentum, variant=variant, policy=policy)
    # after 2, 6, 10 and 14 steps, and no more at the end of the run, where nothing could be learnt
    assert len(news) == 4
    assert naive.as_they_were > 0
    assert all(row["replaced"] > 0 for row in news[:2])
    assert (news[0]["rate"] == 1) == (policy == "linear")
    assert [row["rate"] for row in news] == sorted((row["rate"] for row in news), reverse=True)
    assert news[0]["still_of_first"] == 1 > news[-1]["still_of_first"]


@pytest.mark.long
@pytest.mark.parametrize("limit", [0.02, 0.2])
@pytest.mark.parametrize("variant", ["AG", "MA"])
def test_clipped_gradients_meet_clipped_moments(variant, limit):
    naive, news = follow(18, variant=variant, limit=limit)
    assert len(news) == 4
    assert min(naive.factors) < 0.6
    # the steps after a replacement, which 0.02 clips all and 0.2 some
    assert (limit == 0.02) == all(naive.factors[done] < 0.5 for done in (2, 6, 10, 14))


def test_old_runs_keep_moments_that_are_not_clipped():
    adapter, model, optimizer = attached(20, clip_moments=False)
    clipped, other, its_optimizer = attached(20)
    data = rows(6)
    for done in (1, 2, 3):
        micro = data[2 * done - 2 : 2 * done]
        one_step(adapter, model, optimizer, done, micro, limit=0.02)
        one_step(clipped, other, its_optimizer, done, micro, limit=0.02)
        if done == 2:
            first = optimizer.state[next(sparse.layers(model))[1].delta.values][
                "exp_avg_sq"
            ].clone()
    values = [next(sparse.layers(m))[1].delta.values for m in (model, other)]
    moments = [
        o.state[v]["exp_avg_sq"] for o, v in zip((optimizer, its_optimizer), values, strict=True)
    ]
    assert (moments[0] >= 0.98 * first).all()
    assert moments[1].sum() < 0.1 * moments[0].sum()


@pytest.mark.long
@pytest.mark.parametrize("features", [0, 1, 2, 3])
def test_no_more_grow_than_have_a_score(features):
    follow(10, features=features, variant="MA", density=0.5)


def test_the_rates_are_the_papers():
    linear, cosine = make(initial_rate=0.2), make(initial_rate=0.2, policy="cosine")
    linear.steps = cosine.steps = 100
    assert [linear.rate(step) for step in (2, 22, 42, 100)] == pytest.approx([1, 0.156, 0.116, 0])
    assert [cosine.rate(step) for step in (0, 50, 100)] == pytest.approx([0.2, 0.1, 0])
    assert cosine.rate(2) < 0.2


def test_the_first_support_is_of_its_seed():
    def of(seed):
        return torch.cat(
            [layer.delta.indices for _, layer in sparse.layers(attached(support_seed=seed)[1])]
        )

    torch.manual_seed(5)
    one = of(1)
    torch.manual_seed(6)
    assert torch.equal(of(1), one)
    assert not torch.equal(of(2), one)


def test_values_and_moments_stay_with_their_entries_bit_by_bit():
    adapter, model, optimizer = attached(20, weight_decay=0.0)
    data, survived = rows(40), 0
    plain = Net()
    for done in range(1, 11):
        taken: dict[str, Any] = {}

        def seen(*_: Any, taken: Any = taken) -> None:
            for name, layer in sparse.layers(model):
                keys = ("exp_avg", "exp_avg_sq", "age")
                state = {key: optimizer.state[layer.delta.values][key] for key in keys} | {
                    "values": layer.delta.values
                }
                taken[name] = (
                    layer.delta.indices.tolist(),
                    {key: tensor.tolist() for key, tensor in state.items()},
                )

        handle = optimizer.register_step_post_hook(seen)
        news = one_step(adapter, model, optimizer, done, data[2 * done - 2 : 2 * done])
        handle.remove()
        if news is None:
            continue
        for name, layer in sparse.layers(model):
            before, numbers = taken[name]
            now = layer.delta.indices.tolist()
            assert len(set(now)) == len(now) == len(before)
            for place, e in enumerate(now):
                state = optimizer.state[layer.delta.values] | {"values": layer.delta.values}
                if e in before:
                    survived += 1
                    assert all(
                        state[key][place].item() == numbers[key][before.index(e)] for key in numbers
                    )
                else:
                    assert state["values"][place].item() == 0
                    assert state["age"][place].item() == 2
            for e in set(before) - set(now):
                assert (
                    layer.base.weight.flatten()[e].item()
                    == plain.get_submodule(name).weight.flatten()[e].item()
                )
    assert survived > 10


def test_a_bf16_base_comes_back_bit_by_bit():
    adapter, plain = make(density=0.5), Net().to(torch.bfloat16)
    model: Any = adapter.attach(copy.deepcopy(plain), Start(steps=20))
    optimizer = adapter.optimizer(adapter.parameter_groups(model), ADAMW)
    for done, (x, t) in enumerate(rows(8), 1):
        one_step(adapter, model, optimizer, done, [(x.bfloat16(), t.bfloat16())])
    for name, layer in sparse.layers(model):
        w = plain.get_submodule(name).weight.detach()
        apart = (layer.base.weight != w).flatten()
        assert apart.any()
        assert not apart[
            [e for e in range(w.numel()) if e not in layer.delta.indices.tolist()]
        ].any()
        layer.delta.take_out(layer.base)
        assert torch.equal(layer.base.weight, w)


# what the candidates see


def test_a_grown_entrys_corrected_moments_are_its_means():
    adapter, model, optimizer = attached(20)
    data = rows(4)
    starts = {name: set(layer.delta.indices.tolist()) for name, layer in sparse.layers(model)}
    seen: dict[str, list[Tensor]] = {"first": [], "last": []}
    for done in (1, 2):
        plain = copy.deepcopy(model)  # whose dense gradient is taken from what W + S does
        for name, layer in sparse.layers(plain):
            layer.delta.watch = None
            weight = layer.base.weight.detach().clone().requires_grad_()
            dense = nn.Linear(*reversed(weight.shape), dtype=torch.float64)
            dense.weight, dense.bias = nn.Parameter(weight), layer.base.bias
            setattr(plain, name, dense)
        for x, t in data[2 * done - 2 : 2 * done]:
            half_loss(plain(x), t).backward()
        for name, actual in seen.items():
            actual.append(plain.get_submodule(name).weight.grad.flatten())
        one_step(adapter, model, optimizer, done, data[2 * done - 2 : 2 * done])
    for name, layer in sparse.layers(model):
        state = optimizer.state[layer.delta.values]
        g = torch.stack(seen[name])[:, layer.delta.indices.long()].float()
        grown = torch.tensor([e not in starts[name] for e in layer.delta.indices.tolist()])
        assert grown.any()
        m, v = (
            state["exp_avg"] / (1 - BETAS[0] ** state["age"]),
            state["exp_avg_sq"] / (1 - BETAS[1] ** state["age"]),
        )
        torch.testing.assert_close(m[grown], g.mean(0)[grown], rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(v[grown], g.square().mean(0)[grown], rtol=1e-4, atol=1e-10)


def test_a_loss_scale_is_taken_out():
    sums = []
    for scale in (1.0, 1024.0):
        adapter, model, optimizer = attached()
        one_step(adapter, model, optimizer, 1, rows(2), scale)
        sums.append(
            {
                name: (actual.flat, actual.g, actual.g2)
                for name, actual in adapter.candidates.items()
            }
        )
    for name, (flat, g, g2) in sums[0].items():
        assert torch.equal(sums[1][name][0], flat)
        torch.testing.assert_close(sums[1][name][1], g)
        torch.testing.assert_close(sums[1][name][2], g2)
        assert (g != 0).all()


def test_a_micro_batch_that_is_not_finite_counts_for_nothing():
    draw = torch.Generator().manual_seed(2)
    dy, x = torch.randn(3, 5, generator=draw), torch.randn(3, 6, generator=draw)

    def bad():
        for value in (float("nan"), float("inf")):
            for spoilt in (dy, x):
                broken = spoilt.clone()
                broken[1, 2] = value
                yield (broken, x) if spoilt is dy else (dy, broken)
        # finite, and its product is not, as that of a loss scale which is too large
        yield dy * 1e30, x * 1e30

    actual = Candidates(4, "layer")
    for broken in bad():
        actual(*broken)
        assert actual.flat is None
        assert actual.step_sum is None
    actual.end_step(1.0, dy.device)
    assert actual.steps == 0
    actual(dy, x)
    for broken in bad():
        actual(*broken)
    actual(dy, x)
    actual.end_step(2.0, dy.device)
    dense = (dy.double().T @ x.double()).flatten()
    assert actual.flat is not None
    assert actual.flat.tolist() == sorted(dense.abs().topk(4).indices.tolist())
    torch.testing.assert_close(actual.g, dense[actual.flat.long()].float())
    torch.testing.assert_close(actual.g2, dense[actual.flat.long()].square().float())
    assert actual.steps == 1


def test_without_a_finite_gradient_nothing_moves():
    adapter, model, optimizer = attached()
    start = {name: layer.delta.indices.clone() for name, layer in sparse.layers(model)}
    weights = copy.deepcopy(model.state_dict())
    for done, (x, t) in enumerate(rows(2), 1):
        half_loss(model(x * float("nan")), t).backward()
        adapter.before_step(model, 1.0)
        optimizer.zero_grad()
        optimizer.step()
        news = adapter.after_step(model, done)
    assert news["replaced"] == 0
    assert all(
        torch.equal(layer.delta.indices, start[name]) for name, layer in sparse.layers(model)
    )
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    data = rows(8)
    for done in range(3, 7):
        news = one_step(adapter, model, optimizer, done, data[2 * done - 6 : 2 * done - 4])
    assert news["replaced"] > 0  # the next window finds candidates again


def test_a_state_brings_its_planned_steps_along():
    adapter, model, optimizer = attached(8)
    for done in range(1, 6):
        one_step(adapter, model, optimizer, done, rows(2))
    longer, other, _ = attached(80, support_seed=1)
    longer.load_state(other, copy.deepcopy(adapter.state(model)))
    assert (longer.step, longer.rate(6)) == (5, adapter.rate(6))
    for name, actual in adapter.candidates.items():
        assert torch.equal(longer.candidates[name].flat, actual.flat)
        assert torch.equal(longer.candidates[name].g, actual.g)
        assert torch.equal(longer.first[name], adapter.first[name])


def test_nothing_is_collected_between_windows():
    adapter, model, optimizer = attached(20)
    watched = []
    for done in range(1, 9):
        watched.append(all(layer.delta.watch is not None for _, layer in sparse.layers(model)))
        one_step(adapter, model, optimizer, done, rows(2))
    assert watched == [True, True, False, False] * 2
    _, model, _ = attached(variant="MA")
    assert not any(layer.delta.watch for _, layer in sparse.layers(model))


# the optimisers


def gradients(shapes: list[tuple[int, ...]], seed: int = 1) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def test_with_equal_ages_it_is_adamw():
    shapes: list[tuple[int, ...]] = [(40,), (3, 5), (7,)]
    made = []
    for kind in (torch.optim.AdamW, SpielAdamW):
        params = [nn.Parameter(start.clone()) for start in gradients(shapes)]
        groups = [{"params": params[:2], "weight_decay": 0.4}, {"params": params[2:], "lr": 0.3}]
        made.append((params, kind(groups, **ADAM, weight_decay=0.1)))
    for step in range(20):
        for params, optimizer in made:
            for number, (p, g) in enumerate(zip(params, gradients(shapes, 2 + step), strict=True)):
                p.grad = None if (number, step % 5) == (2, 3) else g * 10.0 ** (number - 3)
            optimizer.step()
        for p, expected in zip(made[1][0], made[0][0], strict=True):
            torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
    assert all(
        (p - start).abs().min() > 1e-3
        for p, start in zip(made[1][0], gradients(shapes), strict=True)
    )


def test_moments_are_corrected_by_each_entrys_age():
    p = nn.Parameter(torch.zeros(3))
    optimizer = SpielAdamW([p], **ADAM, weight_decay=0.0)
    values, m, v, age = [0.0] * 3, [0.0, 0.02, -0.3], [0.0, 0.001, 0.2], [0.0, 3.0, 1000.0]
    optimizer.state[p] |= {
        "exp_avg": torch.tensor(m),
        "exp_avg_sq": torch.tensor(v),
        "age": torch.tensor(age),
    }
    for (g,) in (gradients([(3,)], seed) for seed in range(4)):
        p.grad = g
        optimizer.step()
        for j in range(3):
            age[j] += 1
            m[j] = BETAS[0] * m[j] + (1 - BETAS[0]) * g[j].item()
            v[j] = BETAS[1] * v[j] + (1 - BETAS[1]) * g[j].item() ** 2
            right = math.sqrt(v[j] / (1 - BETAS[1] ** age[j])) + EPS
            values[j] -= LR * m[j] / (1 - BETAS[0] ** age[j]) / right
        torch.testing.assert_close(p.detach(), torch.tensor(values), rtol=1e-5, atol=1e-7)
    assert optimizer.state[p]["age"].tolist() == age


def kinds(p: nn.Parameter, weight_decay: float = 0.0) -> list[torch.optim.Optimizer]:
    return [
        SpielAdamW([p], **ADAM, weight_decay=weight_decay),
        SM3([p], lr=LR, momentum=0.9, eps=EPS, weight_decay=weight_decay, supports={}),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_the_state_of_bf16_values_is_fp32_and_stays_it(which):
    p = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    optimizer = kinds(p)[which]
    for _ in range(300):
        p.grad = torch.full_like(p, 0.1)
        optimizer.step()
    if which == 0:
        assert optimizer.state[p]["age"].tolist() == [300.0] * 5
    assert p.detach().abs().min() > 0.1
    again = nn.Parameter(p.detach().clone())
    other = kinds(again)[which]
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, tensor in optimizer.state[p].items():
        assert tensor.dtype == other.state[again][key].dtype == torch.float32
        assert torch.equal(other.state[again][key], tensor)
    for q, o in ((p, optimizer), (again, other)):
        q.grad = torch.full_like(q, 0.1)
        o.step()
    assert torch.equal(p, again)


@pytest.mark.long
@pytest.mark.parametrize("which", [0, 1])
def test_weight_decay_pulls_to_the_base(which):
    adapter, model, _ = attached(20, weight_decay=2.0, variant=("AG", "MA")[which])
    optimizer = adapter.optimizer(adapter.parameter_groups(model), ADAMW)
    plain = Net()
    for _, layer in sparse.layers(model):
        nn.init.normal_(layer.delta.values, std=3.0)
        layer.delta.values.grad = torch.zeros_like(layer.delta.values)
    starts = {name: layer.delta.values.detach().double() for name, layer in sparse.layers(model)}
    for done in range(1, 201):
        optimizer.step()
        SparseAdapter.after_step(adapter, model, done)
        for name, layer in sparse.layers(model):
            expected = starts[name] * (1 - LR * 2.0) ** done
            torch.testing.assert_close(
                layer.delta.values.detach().double(), expected, rtol=1e-4, atol=1e-9
            )
            w = plain.get_submodule(name).weight.detach().flatten()[layer.delta.indices.long()]
            held = layer.base.weight.detach().flatten()[layer.delta.indices.long()]
            torch.testing.assert_close(held, w + expected, rtol=0, atol=1e-3)
    assert all((layer.delta.values.abs() < 1e-7).all() for _, layer in sparse.layers(model))


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sm3_is_that_of_plain_loops(momentum):
    draw = torch.Generator().manual_seed(7)
    delta = SparseDelta(nn.Linear(6, 4), 9, torch.float32)
    assert delta.indices is not None
    assert delta.values is not None
    delta.indices.copy_(torch.randperm(24, generator=draw)[:9].sort().values)
    params = [
        delta.values,
        nn.Parameter(torch.randn(3, 5, generator=draw)),
        nn.Parameter(torch.randn(4, generator=draw)),
    ]
    groups = [{"params": params[:1], "weight_decay": 0.4}, {"params": params[1:], "lr": 0.3}]
    optimizer = SM3(
        groups, lr=LR, momentum=momentum, eps=1e-3, weight_decay=0.1, supports={delta.values: delta}
    )
    # a vector is a matrix of one column, whose accumulator would only repeat the largest row's
    width = [6, 5, 1]
    places = [delta.indices.tolist(), list(range(15)), list(range(4))]
    values = [p.detach().flatten().double().tolist() for p in params]
    r, c, m = (
        [[0.0] * 4, [0.0] * 3, [0.0] * 4],
        [[0.0] * 6, [0.0] * 5, [math.inf]],
        [[0.0] * 9, [0.0] * 15, [0.0] * 4],
    )
    for step in range(6):
        for n, (p, g) in enumerate(zip(params, gradients([(9,), (3, 5), (4,)], step), strict=True)):
            p.grad = g
            lr, decay = (LR, 0.4) if n == 0 else (0.3, 0.1)
            rows, columns = list(r[n]), list(c[n])
            for j, (place, slope) in enumerate(zip(places[n], g.flatten().tolist(), strict=True)):
                row, column = place // width[n], place % width[n]
                nu = min(r[n][row], c[n][column]) + slope**2
                rows[row], columns[column] = max(rows[row], nu), max(columns[column], nu)
                m[n][j] = momentum * m[n][j] + (1 - momentum) * slope / math.sqrt(nu + 1e-3)
                values[n][j] = (1 - lr * decay) * values[n][j] - lr * m[n][j]
            r[n], c[n] = rows, columns
        optimizer.step()
        for n, p in enumerate(params):
            torch.testing.assert_close(
                p.detach().flatten(), torch.tensor(values[n]), rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(
                optimizer.state[p]["rows"], torch.tensor(r[n]), rtol=1e-5, atol=1e-6
            )
            if n < 2:
                torch.testing.assert_close(
                    optimizer.state[p]["columns"], torch.tensor(c[n]), rtol=1e-5, atol=1e-6
                )
    assert [optimizer.state[params[0]][key].numel() for key in ("rows", "columns")] == [4, 6]
    assert ("momentum" in optimizer.state[params[0]]) == bool(momentum)


# bad input


def test_a_window_that_does_not_end_is_refused():
    for window in (4, 5):
        with pytest.raises(
            AdapterError,
            match=f"accumulation_steps={window} must be less than adapter.reselection_steps=4",
        ):
            make(accumulation_steps=window)
    make(accumulation_steps=3)


def test_adam_takes_no_momentum():
    with pytest.raises(
        AdapterError, match=r"adapter.momentum=0.9 is of variant=MA; AG has optimizer.betas"
    ):
        make(momentum=0.9)
    assert make(momentum=0.9, variant="MA").momentum == 0.9


@pytest.mark.parametrize("variant", ["AG", "MA"])
@pytest.mark.parametrize(
    "other",
    [partial(torch.optim.SGD, lr=0.1), torch.optim.AdamW, partial(torch.optim.Adam, lr=0.1)],
)
def test_an_optimiser_without_ages_is_refused(variant, other):
    adapter = make(variant=variant)
    model = adapter.attach(Net(), Start(steps=10))
    with pytest.raises(
        AdapterError, match=r"adapter=spiel keeps an age for each entry, .*: set optimizer=adamw"
    ):
        adapter.optimizer(adapter.parameter_groups(model), other)


@pytest.mark.long
@pytest.mark.parametrize("name", ["spiel", "spiel_ma"])
def test_the_config_asks_for_adamw(compose, name):
    assert (
        compose("+experiment=smoke", "task.path=rows.jsonl", f"adapter={name}").adapter._target_
        == "adapters.spiel.SpIEL"
    )
    for other in ("adamw_8bit", "paged_adamw_8bit"):
        with pytest.raises(
            ConfigError, match=r"adapter=spiel keeps an age .*: set optimizer=adamw"
        ):
            compose(
                "+experiment=smoke", "task.path=rows.jsonl", f"adapter={name}", f"optimizer={other}"
            )
