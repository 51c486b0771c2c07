"""RoSA against plain loops in float64: whole weights that have a gradient for the mask, a dense S
whose gradient is masked after."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import sparse
from adapters.delta import AdaptedLinear, AdapterError, Start
from adapters.lora import LoRAAdapter
from adapters.rosa import RoSAAdapter
from tests.toys import adapters as toys
from tests.toys.sparse import make as rosa

DENSITY = 0.05
SCALE = 1.5
LR = 1e-2
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}


def make(**changes: Any) -> RoSAAdapter:
    settings = {"density": DENSITY, "warmup_steps": 1, "mask": "gradient", "sparse_lr_ratio": 0.3}
    return rosa(**settings | changes)


def llama() -> Any:
    return toys.llama(**SMALL)


def attached(
    start: Start | None = None, model: Any = None, **changes: Any
) -> tuple[RoSAAdapter, Any]:
    torch.manual_seed(3)
    adapter = make(**changes)
    return adapter, adapter.attach(model or llama(), start or Start(steps=9))


def data(steps: int, micro: int) -> list[list[Tensor]]:
    """Micro-batches of two rows for each step."""
    draw = torch.Generator().manual_seed(5)
    return [
        [torch.randint(0, toys.VOCABULARY, (2, 10), generator=draw) for _ in range(micro)]
        for _ in range(steps)
    ]


def train(
    adapter: Any,
    model: Any,
    steps: list[list[Tensor]],
    first: int = 0,
    optimizer: Any = None,
    broken: tuple[Any, ...] = (),
) -> torch.optim.Optimizer:
    """Steps as FineTune makes them; micro-batches (step, number) of `broken` have a loss that is
    NaN, and their steps change nothing."""
    optimizer = optimizer or toys.optimiser(adapter, model, LR)
    for step, micro in enumerate(steps, first):
        for number, ids in enumerate(micro):
            loss = toys.loss(model, ids) / len(micro)
            (loss * math.nan if (step, number) in broken else loss).backward()
        adapter.before_step(model, 1.0)
        if any(at == step for at, _ in broken):
            optimizer.zero_grad()
        optimizer.step()
        adapter.after_step(model, step + 1)
        optimizer.zero_grad()
    return optimizer


def parts(model: Any) -> dict[str, dict[str, Tensor]]:
    """A, B and a dense S of each adapted layer."""
    actual = {}
    for name, layer in sparse.layers(model):
        delta: Any = layer.delta
        s = torch.zeros(delta.o, delta.i, dtype=torch.float64)
        if delta.has_support:
            for entry, value in zip(delta.indices.tolist(), delta.values.tolist(), strict=True):
                s[entry // delta.i, entry % delta.i] = value
        actual[name] = {"S": s} | (
            {"A": delta.A.detach().clone(), "B": delta.B.detach().clone()}
            if delta.A is not None
            else {}
        )
    return actual


def masks(model: Any) -> dict[str, list[int]]:
    return {name: indices.tolist() for name, indices in sparse.supports(model).items()}


# the reference


class Dense(nn.Module):
    """W + S + s B A, all of them dense matrices with a gradient."""

    def __init__(self, layer: Any):
        super().__init__()
        low = layer.delta.A is not None
        self.W = nn.Parameter(layer.base.weight.detach().clone())
        self.S = nn.Parameter(torch.zeros_like(self.W))
        self.A = nn.Parameter(
            layer.delta.A.detach().clone()
            if low
            else torch.zeros(1, self.W.shape[1], dtype=torch.float64)
        )
        self.B = nn.Parameter(
            layer.delta.B.detach().clone()
            if low
            else torch.zeros(self.W.shape[0], 1, dtype=torch.float64)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W + self.S + SCALE * self.B @ self.A)


def dense(model: Any) -> tuple[Any, dict[str, Dense]]:
    """A plain model with Dense layers that start as the adapted model does."""
    plain = llama().requires_grad_(False)
    actual = {}
    for name, layer in sparse.layers(model):
        actual[name] = Dense(layer)
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, actual[name])
    return plain, actual


def largest(scores: Tensor, k: int) -> list[int]:
    """The k largest, by sorting all."""
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    return sorted(order[:k])


class Adam:
    """AdamW of one matrix, from its paper's formulas."""

    def __init__(self) -> None:
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.t = 0

    def step(self, parameter: Tensor, gradient: Tensor, lr: float, decay: float = 0.0) -> None:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        step = (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)
        parameter.data -= lr * decay * parameter.data + lr * step


def collected(plain: Any, layers: dict[str, Dense], micro: list[Tensor]) -> dict[str, list[Tensor]]:
    """dL/dW of each micro-batch of a step; gradients of all matrices stay in them, summed over the
    step."""
    plain.zero_grad()
    actual: dict[str, list[Tensor]] = {name: [] for name in layers}
    for ids in micro:
        before = {
            name: layer.W.grad.clone() if layer.W.grad is not None else 0.0
            for name, layer in layers.items()
        }
        (toys.loss(plain, ids) / len(micro)).backward()
        for name, layer in layers.items():
            actual[name].append(layer.W.grad - before[name])  # type: ignore[operator, arg-type]
    return actual


def chosen(gradients: list[Tensor], k: int, score: str, scores: str = "exact") -> list[int]:
    """The mask of one layer, from its gradients in all micro-batches."""
    sums = torch.zeros_like(gradients[0])
    for gradient in gradients:
        sums = sums + (gradient**2 if score == "squared" else gradient)
    sums = (sums / len(gradients)).abs()
    if scores == "first":
        return largest(gradients[0].abs(), k)
    if scores == "candidates":
        outside = torch.ones(sums.numel(), dtype=torch.bool)
        outside[largest(gradients[0].abs(), min(4 * k, sums.numel()))] = False
        sums = sums.flatten().masked_fill(outside, -1.0)
    return largest(sums, k)


def reference(
    model: Any,
    steps: list[list[Tensor]],
    warmup: int,
    mask_steps: int,
    ratio: float,
    decay: float,
    low: bool = True,
    fresh: Any = None,
    fixed: Any = None,
) -> dict[str, dict[str, Tensor]]:
    """The whole of RoSA's training from where `model` is. `fresh` gives A after the mask, `fixed` a
    mask that is there from the start."""
    plain, layers = dense(model)
    moments = {name: {key: Adam() for key in "SAB"} for name in layers}
    support: dict[str, Any] = dict(fixed or {})
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    for step, micro in enumerate(steps):
        gradients = collected(plain, layers, micro)
        for name, layer in layers.items():
            if low:
                moments[name]["A"].step(layer.A, layer.A.grad, LR)  # type: ignore[arg-type]
                moments[name]["B"].step(layer.B, layer.B.grad, LR)  # type: ignore[arg-type]
            if name in support:
                entries = torch.zeros(layer.W.numel(), dtype=torch.float64)
                entries[support[name]] = 1
                moments[name]["S"].step(
                    layer.S, layer.S.grad * entries.view(layer.S.shape), LR * ratio, decay
                )  # type: ignore[operator]
            elif warmup <= step:
                seen[name] += gradients[name]
            if fixed is None and step + 1 == warmup + mask_steps:
                support[name] = chosen(seen[name], int(DENSITY * layer.W.numel()), "squared")
                if fresh is not None:
                    layer.A.data, layer.B.data = fresh[name].clone(), torch.zeros_like(layer.B)
                    moments[name]["A"], moments[name]["B"] = Adam(), Adam()
    return {
        name: (
            {"S": layer.S.detach()}
            | ({"A": layer.A.detach(), "B": layer.B.detach()} if low else {})
        )
        for name, layer in layers.items()
    }


def same(actual: dict[str, dict[str, Tensor]], right: dict[str, dict[str, Tensor]]) -> None:
    """All parts are right to a part in 10⁸ of an Adam step, and all have moved."""
    assert actual.keys() == right.keys()
    for name, tensors in right.items():
        assert actual[name].keys() == tensors.keys()
        for key, expected in tensors.items():
            assert expected.abs().max() > 0.1 * LR, (name, key)
            assert (actual[name][key] - expected).abs().max() < 1e-8 * LR, (name, key)


# the mask


@pytest.mark.parametrize("score", ["squared", "mean"])
@pytest.mark.parametrize(
    ("scores", "density", "micro", "mask_steps"),
    [
        ("exact", 0.05, 1, 1),
        ("exact", 0.05, 3, 1),
        ("exact", 0.05, 1, 2),
        ("exact", 0.05, 3, 2),
        ("candidates", 0.05, 3, 1),
        ("candidates", 0.05, 1, 2),
        ("candidates", 0.3, 3, 2),
        ("first", 0.05, 3, 2),
    ],
)
def test_the_mask_is_of_the_largest_gradients(micro, mask_steps, score, scores, density):
    adapter, model = attached(mask_steps=mask_steps, score=score, scores=scores, density=density)
    steps = data(1 + mask_steps, micro)
    optimizer = train(adapter, model, steps[:1])
    seen: dict[str, list[Tensor]] = {}
    for number in range(mask_steps):
        assert masks(model) == {}
        plain, layers = dense(model)  # W, and A and B as they are before this step
        for name, gradients in collected(plain, layers, steps[1 + number]).items():
            seen.setdefault(name, []).extend(gradients)
        train(adapter, model, steps[1 + number : 2 + number], 1 + number, optimizer)
    assert all(layer.delta.B.any() for _, layer in sparse.layers(model))
    actual = masks(model)
    assert len(actual) == 14
    for name, gradients in seen.items():
        k = int(density * gradients[0].numel())
        assert actual[name] == chosen(gradients, k, score, scores)
        if scores == "candidates" and density >= 0.25:
            assert actual[name] == chosen(gradients, k, score)
    # the two differ, so that neither is tested by the other's right answer
    if scores == "exact" and micro * mask_steps > 1:
        other = "mean" if score == "squared" else "squared"
        assert any(
            actual[name] != chosen(gradients, len(actual[name]), other)
            for name, gradients in seen.items()
        )


@pytest.mark.long
@pytest.mark.parametrize("score", ["squared", "mean"])
def test_a_loss_scale_that_changes_from_step_to_step_changes_no_mask(score):
    """As 16-mixed has it: gradients of a step are larger by its scale."""
    steps, supports = data(3, 2), []
    for scales in ([1.0, 1.0, 1.0], [2.0**16, 2.0**13, 2.0**10]):
        adapter, model = attached(warmup_steps=0, mask_steps=3, score=score)
        for step, (micro, scale) in enumerate(zip(steps, scales, strict=True)):
            for ids in micro:
                (scale * toys.loss(model, ids)).backward()
            adapter.before_step(model, scale)
            adapter.after_step(model, step + 1)
            model.zero_grad()
        supports.append(masks(model))
    assert len(supports[0]) == 14
    assert supports[0] == supports[1]


def test_micro_batches_are_squared_one_by_one():
    """Six rows in one micro-batch and in three are the same step, and not the same mask."""
    steps = data(1, 3)
    _, apart = (adapted := attached(warmup_steps=0))
    train(*adapted, steps)
    _, together = (adapted := attached(warmup_steps=0))
    train(*adapted, [[torch.cat(steps[0])]])
    assert masks(apart) != masks(together)
    for ours, theirs in zip(parts(apart).values(), parts(together).values(), strict=True):
        torch.testing.assert_close(ours["B"], theirs["B"], rtol=0, atol=1e-8 * LR)


@pytest.mark.parametrize(
    ("schedule", "changes"),
    [
        ("wl", {}),
        ("wl", {"score": "mean"}),
        ("wl", {"scores": "candidates"}),
        ("wl", {"scores": "first"}),
        ("spa_only", {}),
    ],
)
def test_micro_batches_that_are_not_finite_do_not_count(changes, schedule):
    steps = data(2, 3)
    adapter, model = attached(warmup_steps=0, mask_steps=2, schedule=schedule, **changes)
    plain, layers = dense(model)
    gradients = {name: actual[1:] for name, actual in collected(plain, layers, steps[0]).items()}
    optimizer = train(adapter, model, steps[:1], broken=((0, 0),))
    assert not any(tensors["B"].any() for tensors in parts(model).values() if "B" in tensors)
    for name, actual in collected(plain, layers, steps[1]).items():
        gradients[name] += actual[:2]
    train(adapter, model, steps[1:], 1, optimizer, broken=((1, 2),))
    actual = masks(model)
    assert len(actual) == 14
    for name, finite in gradients.items():
        expected = chosen(
            finite,
            len(actual[name]),
            changes.get("score", "squared"),
            changes.get("scores", "exact"),
        )
        assert actual[name] == expected


@pytest.mark.parametrize("scores", ["exact", "candidates", "first"])
def test_no_finite_micro_batch_is_an_error(scores):
    adapter, model = attached(warmup_steps=0, scores=scores)
    with pytest.raises(
        AdapterError,
        match=r"no micro-batch .* finite gradient at model\.layers\.0\.self_attn\.q_proj: lower",
    ):
        train(adapter, model, data(1, 2), broken=((0, 0), (0, 1)))


def test_densities_by_pattern():
    adapter, model = attached(
        density_pattern={"down_proj": 0.25, "layers.1.self_attn.q_proj": 0.01}, warmup_steps=0
    )
    steps = data(1, 2)
    plain, layers = dense(model)
    gradients = collected(plain, layers, steps[0])
    train(adapter, model, steps)
    actual = masks(model)
    assert len(actual["model.layers.0.mlp.down_proj"]) == 32 * 48 // 4
    assert len(actual["model.layers.1.self_attn.q_proj"]) == 10
    assert len(actual["model.layers.0.self_attn.q_proj"]) == 51
    for name, of_layer in gradients.items():
        assert actual[name] == chosen(of_layer, len(actual[name]), "squared")


def test_what_the_mask_is_like_is_told(tmp_path):
    adapter, model = attached(Start(steps=2, folder=tmp_path), mask_steps=1)
    optimizer = train(adapter, model, data(1, 1))
    assert adapter.after_step(model, 1) is None
    for ids in data(1, 1)[0]:
        toys.loss(model, ids).backward()
    news = adapter.after_step(model, 2)
    assert optimizer is adapter.live_optimizer
    rows, columns, among = [], [], []
    for name, entries in masks(model).items():
        weight = llama().get_submodule(name).weight.detach()
        o, i = weight.shape
        rows.append(len({entry // i for entry in entries}) / o)
        columns.append(len({entry % i for entry in entries}) / i)
        among.append(len(set(entries) & set(largest(weight.abs(), len(entries)))) / len(entries))
    expected = {"mask_rows": rows, "mask_columns": columns, "mask_among_largest": among}
    assert news == pytest.approx({key: sum(values) / 14 for key, values in expected.items()})
    assert 0 < news["mask_among_largest"] < news["mask_rows"] <= 1


# training


@pytest.mark.parametrize(
    ("micro", "warmup", "mask_steps", "gradient"),
    [(1, 0, 1, "sampled"), (3, 2, 1, "gathered"), (2, 1, 2, "sampled")],
)
@pytest.mark.parametrize("restart", [False, True])
def test_training_is_that_of_a_dense_s_with_a_masked_gradient(
    micro, warmup, mask_steps, restart, gradient
):
    changes = {
        "warmup_steps": warmup,
        "mask_steps": mask_steps,
        "restart_after_mask": restart,
        "gradient": gradient,
    }
    adapter, model = attached(sparse_weight_decay=0.5, **changes)
    _, untouched = attached(**changes)
    start = parts(model)
    until = warmup + mask_steps
    steps = data(until + 3, micro)
    optimizer = train(adapter, model, steps[:until])
    values = [layer.delta.values for _, layer in sparse.layers(model)]
    assert all(value not in optimizer.state and not value.any() for value in values)
    fresh = {name: tensors["A"] for name, tensors in parts(model).items()} if restart else None
    for name, layer in sparse.layers(model):
        a, b = layer.delta.A, layer.delta.B
        assert b.any() != restart
        assert (a in optimizer.state) != restart
        if restart:
            # Kaiming-uniform with a = sqrt 5 is uniform between ± 1 / sqrt i
            limit, a = a.shape[1] ** -0.5, a.detach()
            assert (a - start[name]["A"]).abs().mean() > 0.4 * limit
            assert 0.9 * limit < a.abs().max() <= limit
            assert abs(float(a.std()) - limit / 3**0.5) < 0.15 * limit
    train(adapter, model, steps[until:], until, optimizer)
    assert all(int(optimizer.state[value]["step"]) == 3 for value in values)
    assert all(
        int(optimizer.state[layer.delta.A]["step"]) == 3 + (0 if restart else until)
        for _, layer in sparse.layers(model)
    )
    same(parts(model), reference(untouched, steps, warmup, mask_steps, 0.3, 0.5, fresh=fresh))


@pytest.mark.parametrize("mask_steps", [1, 2])
def test_s_alone(mask_steps):
    adapter, model = attached(
        schedule="spa_only",
        warmup_steps=64,
        restart_after_mask=True,
        mask_steps=mask_steps,
        sparse_lr_ratio=1.0,
    )
    _, untouched = attached(schedule="spa_only")
    assert adapter.restart == 0
    assert all(
        name.endswith("delta.values") for name, p in model.named_parameters() if p.requires_grad
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = data(mask_steps + 3, 2)
    optimizer = train(adapter, model, steps[:mask_steps])
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor)
        for name, tensor in before.items()
        if not name.endswith("indices")
    )
    assert not optimizer.state
    assert torch.equal(toys.logits(model), toys.logits(llama()))
    assert len(masks(model)) == 14
    train(adapter, model, steps[mask_steps:], mask_steps, optimizer)
    same(parts(model), reference(untouched, steps, 0, mask_steps, 1.0, 0.0, low=False))


def test_the_mask_waits_for_the_warm_up():
    adapter, model = attached(warmup_steps=2, mask_steps=2)
    optimizer = train(adapter, model, data(2, 1)[:1])
    watched = [[layer.delta.watch is not None for _, layer in sparse.layers(model)]]
    for step in (1, 2, 3):
        train(adapter, model, data(1, 1), step, optimizer)
        watched.append([layer.delta.watch is not None for _, layer in sparse.layers(model)])
    assert watched == [[False] * 14, [True] * 14, [True] * 14, [False] * 14]
    assert not adapter.scores


@pytest.mark.parametrize(
    "changes", [{}, {"rslora": True, "alpha": 3.0}, {"target_modules": ["q_proj", "down_proj"]}]
)
def test_lora_only_is_lora(tmp_path, changes):
    names = ("rank", "alpha", "rslora", "dropout", "target_modules", "exclude_modules", "dtype")
    settings = {
        "rank": 4,
        "alpha": 6.0,
        "rslora": False,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "exclude_modules": [],
    }
    assert set(names) == {*settings, "dtype"}
    torch.manual_seed(3)
    lora = LoRAAdapter(
        **settings | changes,
        target_parameters=[],
        train_modules=[],
        lr_ratio=1.0,
        dtype="float64",
        fused=True,
    )
    its = lora.attach(llama(), Start(steps=3))
    rosa, model = attached(
        schedule="lora_only", restart_after_mask=True, warmup_steps=64, **changes
    )
    assert rosa.restart == 0
    deltas = [module.delta for module in its.modules() if isinstance(module, AdaptedLinear)]
    ours = [layer.delta for _, layer in sparse.layers(model)]
    assert all(torch.equal(a.A, b.A) for a, b in zip(ours, deltas, strict=True))
    for adapter, trained in ((lora, its), (rosa, model)):
        train(adapter, trained, data(3, 2))
        adapter.save(trained, tmp_path / type(adapter).__name__, "base", "CAUSAL_LM")
    torch.testing.assert_close(toys.logits(model), toys.logits(its), rtol=0, atol=1e-9)
    one, other = (tmp_path / name for name in ("RoSAAdapter", "LoRAAdapter"))
    assert sorted(path.name for path in one.iterdir()) == sorted(
        path.name for path in other.iterdir()
    )
    config, expected = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (one, other)
    )
    assert config == expected
    tensors, right = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert tensors.keys() == right.keys()
    for name, tensor in right.items():
        assert tensor.any()
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-8 * LR)


# masks that are there from the start


def decomposed(weight: torch.Tensor, k: int, rank: int) -> list[int]:
    """The support of S in ten rounds of W ≈ L + S, with whole singular value decompositions."""
    low, entries = torch.zeros_like(weight), []
    kept: dict[int, float] = {}
    for _ in range(10):
        rest = weight.clone()
        for entry, value in kept.items():
            rest.view(-1)[entry] -= value
        u, s, v = torch.linalg.svd(rest, full_matrices=False)
        low = sum(s[n] * torch.outer(u[:, n], v[n]) for n in range(rank))
        entries = largest((weight - low).abs(), k)
        kept = {entry: float((weight - low).view(-1)[entry]) for entry in entries}
    return entries


@pytest.mark.parametrize(
    ("mask", "schedule"),
    [
        ("magnitude", "wl"),
        ("random", "wl"),
        ("decompose", "wl"),
        ("decompose", "spa_only"),
        ("file", "wl"),
        ("file", "spa_only"),
    ],
)
def test_other_masks_are_live_from_the_first_step(tmp_path, mask, schedule):
    file = tmp_path / "given.safetensors"
    if mask == "file":
        draw = torch.Generator().manual_seed(9)
        chosen = {}
        for name, layer in sparse.layers(attached()[1]):
            k = int(DENSITY * layer.base.weight.numel())
            # not in order
            chosen[name] = torch.randperm(layer.base.weight.numel(), generator=draw)[:k].int()
        save_file(
            chosen,
            file,
            {
                "shapes": json.dumps(
                    {name: list(llama().get_submodule(name).weight.shape) for name in chosen}
                )
            },
        )
    changes = {
        "schedule": schedule,
        "mask": str(file) if mask == "file" else mask,
        "warmup_steps": 64,
        "restart_after_mask": True,
    }
    adapter, model = attached(Start(steps=3, folder=tmp_path), **changes)
    _, untouched = attached(**changes)
    assert adapter.restart == 0
    assert torch.equal(toys.logits(model), toys.logits(llama()))
    actual = masks(model)
    assert len(actual) == 14
    spread: list[float] = []
    for name, entries in actual.items():
        weight = llama().get_submodule(name).weight.detach()
        assert len(set(entries)) == len(entries) == int(DENSITY * weight.numel())
        if mask == "magnitude":
            assert entries == largest(weight.abs(), len(entries))
        elif mask == "decompose":
            assert entries == decomposed(weight, len(entries), adapter.fitted_rank)
        elif mask == "file":
            assert entries == sorted(chosen[name].tolist())
        else:
            spread += [entry / weight.numel() for entry in entries]
    if mask == "random":
        assert torch.histc(torch.tensor(spread), 4, 0, 1).min() > 0.2 * len(spread)
    saved = load_file(tmp_path / "masks.safetensors")
    assert {name: tensor.tolist() for name, tensor in saved.items()} == actual
    assert {tensor.dtype for tensor in saved.values()} == {torch.int32}
    steps = data(3, 2)
    train(adapter, model, steps)
    assert masks(model) == actual
    same(
        parts(model),
        reference(untouched, steps, 0, 0, 0.3, 0.0, low=schedule == "wl", fixed=actual),
    )


def test_random_masks_are_their_seeds():
    draws = [masks(attached(mask="random", mask_seed=seed)[1]) for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert all(draws[0][name] != draws[2][name] for name in draws[0])
    assert draws[0]["model.layers.0.mlp.up_proj"] != draws[0]["model.layers.1.mlp.up_proj"]


def test_a_generated_mask_serves_a_second_run(tmp_path):
    adapter, model = attached(Start(steps=1, folder=tmp_path), warmup_steps=0)
    train(adapter, model, data(1, 2))
    _, second = attached(mask=str(tmp_path / "masks.safetensors"))
    assert masks(second) == masks(model)
    assert not any(tensors["S"].any() or tensors["B"].any() for tensors in parts(second).values())
    adapter.save(model, tmp_path / "adapter", "base", "CAUSAL_LM")
    assert masks(attached(mask=str(tmp_path / "adapter"))[1]) == masks(model)


def meta(**changes: Any) -> Any:
    with torch.device("meta"):
        return toys.LlamaForCausalLM(toys.llama(torch.float32, **SMALL | changes).config)


@pytest.mark.long
@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (
            lambda actual: None,
            {"density": 0.06},
            r"51 entries for .*q_proj \(density 0\.0498\d+\) where .* ask for 61",
        ),
        (
            lambda actual: None,
            {"target_modules": ["q_proj"]},
            "0 layers are missing .*, 12 are not adapted here",
        ),
        (lambda actual: actual.popitem(), {}, "1 layers are missing"),
        (
            lambda actual: next(iter(actual.values())).fill_(1),
            {},
            "leave the weight's .* entries, or repeat",
        ),
        (
            lambda actual: next(iter(actual.values())).add_(1 << 20),
            {},
            "leave the weight's .* entries, or repeat",
        ),
        (
            lambda actual: next(iter(actual.values())).neg_(),
            {},
            "leave the weight's .* entries, or repeat",
        ),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_before_there_are_weights(
    tmp_path, spoil, changes, message
):
    attached(Start(steps=1, folder=tmp_path), mask="random")
    file = tmp_path / "masks.safetensors"
    make(mask=str(file)).attach(meta(), Start(steps=1))
    actual = load_file(file)
    shapes = {name: list(llama().get_submodule(name).weight.shape) for name in actual}
    spoil(actual)
    save_file(actual, file, {"shapes": json.dumps({name: shapes[name] for name in actual})})
    with pytest.raises(AdapterError, match=message) as refusal:
        make(mask=str(file), **changes).attach(meta(), Start(steps=1))
    assert f"adapter.mask={file}" in str(refusal.value)


def test_a_mask_of_another_model_is_refused(tmp_path):
    attached(Start(steps=1, folder=tmp_path), mask="random")
    file = tmp_path / "masks.safetensors"
    with pytest.raises(
        AdapterError,
        match=(
            r"another model: model\.layers\.0\.mlp\.gate_proj is \(48, 32\) there and \(64, 32\)"
            r" here"
        ),
    ):
        make(mask=str(file)).attach(meta(intermediate_size=64), Start(steps=1))
    with pytest.raises(AdapterError, match="7 layers are missing"):
        make(mask=str(file)).attach(meta(num_hidden_layers=3), Start(steps=1))


def test_what_is_no_mask_is_refused(tmp_path):
    (tmp_path / "garbage").write_bytes(b"no safetensors at all")
    (tmp_path / "folder").mkdir()
    save_file({"other": torch.zeros(3)}, tmp_path / "other")
    for name, message in (
        ("nothere", "no such file"),
        ("folder", "no such file"),
        ("garbage", "cannot be read"),
        ("other", "holds no masks"),
    ):
        with pytest.raises(AdapterError, match=message):
            make(mask=str(tmp_path / name)).attach(meta(), Start(steps=1))


# bad settings, states


@pytest.mark.parametrize("model", [llama, meta])
def test_a_warm_up_longer_than_the_run_is_refused(model):
    message = r"made after 66 steps .* the run has 65: lower adapter\.warmup_steps"
    with pytest.raises(AdapterError, match=message):
        make(warmup_steps=64, mask_steps=2).attach(model(), Start(steps=65))
    make(warmup_steps=64, mask_steps=2).attach(model(), Start(steps=66))
    make(warmup_steps=64, mask_steps=2, mask="random").attach(llama(), Start(steps=1))
    make(warmup_steps=64, mask_steps=2, schedule="spa_only").attach(model(), Start(steps=2))
    make(warmup_steps=64, mask_steps=2, schedule="lora_only").attach(model(), Start(steps=1))


@pytest.mark.parametrize(
    ("scores", "restart"), [("exact", True), ("candidates", False), ("first", False)]
)
def test_a_state_of_each_phase_goes_on(tmp_path, restart, scores):
    """Adapter and optimiser through files after each step, into a newly attached model."""
    changes = {"warmup_steps": 1, "mask_steps": 2, "restart_after_mask": restart, "scores": scores}
    steps = data(5, 2)
    whole, model = attached(**changes)
    optimizer = train(whole, model, steps[:1])
    for done in range(1, 5):
        torch.save((whole.state(model), optimizer.state_dict()), tmp_path / f"{done}.pt")
        train(whole, model, steps[done : done + 1], done, optimizer)
    for done in range(1, 5):
        saved, moments = torch.load(tmp_path / f"{done}.pt", weights_only=True)
        torch.manual_seed(8)
        again = make(**changes)
        other = again.attach(llama(), Start(steps=5, saved=saved))
        fresh = toys.optimiser(again, other, LR)
        again.load_state(other, saved)
        fresh.load_state_dict(moments)
        train(again, other, steps[done:], done, fresh)
        assert masks(other) == masks(model)
        for ours, theirs in zip(parts(other).values(), parts(model).values(), strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# the steps of a run


@pytest.mark.parametrize(
    ("changes", "steps", "rows", "expected"),
    [  # (steps before the run's own, warm-up, step of the mask, restart)
        ({}, 160, 8, (68, 64, 68, 68)),
        ({}, 160, 1, (96, 64, 96, 96)),
        ({}, 160, 64, (65, 64, 65, 65)),
        ({}, 160, 5, (71, 64, 71, 71)),  # seven steps of five rows: at least 32 gradients
        ({"mask_steps": 1}, 160, 8, (65, 64, 65, 65)),
        ({"warmup_steps": 0.1, "mask_steps": 0.05}, 160, 8, (24, 16, 24, 24)),
        ({"warmup_steps": 0.1, "mask_steps": 0.05}, 2, 8, (1, 0, 1, 1)),
        ({"count_mask_steps": True}, 160, 8, (0, 64, 68, 68)),
        ({"restart_after_mask": False}, 160, 8, (0, 64, 68, 0)),
        ({"schedule": "spa_only"}, 160, 8, (4, 0, 4, 4)),
        ({"schedule": "spa_only", "count_mask_steps": True}, 160, 8, (0, 0, 4, 0)),
        ({"schedule": "lora_only"}, 160, 8, (0, 0, 0, 0)),
        ({"mask": "random"}, 160, 8, (0, 0, 0, 0)),
    ],
)
def test_the_steps_before_the_result_come_first(changes, steps, rows, expected):
    defaults = {
        "warmup_steps": 64,
        "mask_steps": "auto",
        "restart_after_mask": True,
        "count_mask_steps": False,
    }
    adapter = make(**defaults | changes)
    before = adapter.plan(steps, rows)
    assert (before, adapter.warmup_steps, adapter.mask_step, adapter.restart) == expected
    again = make(**defaults | changes | adapter.planned_settings())
    assert again.plan(3 * steps, 2 * rows) == before  # recorded numbers stay


def test_what_the_steps_are_for_is_reported():
    adapter = make(warmup_steps=64, mask_steps="auto", restart_after_mask=True)
    assert adapter.plan(164, 8) == 0
    assert adapter.plan_text(164) == "68 steps choose the mask, 96 train the result"
    (warning,) = adapter.plan_warnings(164, 8)
    assert "68 of 164 steps (41%) choose the mask, more than a quarter" in warning
    assert not adapter.plan_warnings(300, 8)
    few = make(warmup_steps=4, mask_steps=1)
    assert few.plan(160, 4) == 0
    (warning,) = few.plan_warnings(160, 4)
    assert "from the gradients of 4 rows (adapter.mask_steps=1), and fewer than 32" in warning
    assert few.plan_text(160).endswith("; the first 5 of B A alone train it too")
    assert few.plan_text(5) == "all 5 steps choose the mask, and none train with it"
    assert make(mask="random").plan_text(9) is None
