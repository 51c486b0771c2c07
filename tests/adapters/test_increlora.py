"""Growing updates against lists of pieces, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import io
from adapters.delta import AdapterError, Start
from adapters.increlora import IncreLoRAAdapter
from tests.toys import adapters as toys

ALPHA, LR, ORTHOGONALITY = 3.0, 0.5, 0.01
START, EACH, LIMIT = 1, 2, 6


def make(**changes: Any) -> IncreLoRAAdapter:
    settings = {
        "start_rank": START,
        "target_rank": 4,
        "max_rank": LIMIT,
        "grow_by": EACH,
        "warmup_steps": 1,
        "interval": 2,
        "top": 1,
        "orthogonality": ORTHOGONALITY,
        "alpha": ALPHA,
        "dropout": 0.0,
        "target_modules": ["q_proj"],
        "exclude_modules": [],
        "dtype": "float64",
        "train_modules": [],
    }
    return IncreLoRAAdapter(**settings | changes)


def test_the_layer_says_whether_the_next_backward_pass_is_read():
    linear = nn.Linear(4, 4)
    model = make(dtype="float32").attach(nn.ModuleDict({"q_proj": linear}), Start(steps=9))
    assert model.q_proj.reads_gradients  # the output layer's logits then come in one piece
    model.q_proj.delta.watched = False
    assert not model.q_proj.reads_gradients


@dataclass
class Layer:
    """One layer as lists: pieces are (a, b, E)."""

    weight: Tensor
    live: list[list[Tensor]]
    ahead: list[list[Tensor]]
    rest: list[list[Tensor]]
    m: float = 0.0
    u: float = 0.0
    dense: Tensor = field(default_factory=lambda: torch.zeros(0))

    def corrected(self) -> Tensor:
        """W + the update, piece by piece."""
        update = torch.zeros_like(self.weight)
        for pieces in (self.live, self.ahead):
            for a, b, e in pieces:
                update = update + ALPHA / len(self.live) * e * torch.outer(b, a)
        self.update = update.detach()
        self.dense = self.weight + update
        self.dense.retain_grad()
        return self.dense

    def leaves(self) -> list[Tensor]:
        """All that trains."""
        return [t for p in self.live for t in p] + [t for p in self.ahead for t in p[:2]]

    def score(self) -> None:
        """Add the step's importance to the means."""
        total = 0.0
        for d, g in zip(self.update.flatten().tolist(), self.dense.grad.flatten().tolist(),
                        strict=True):  # fmt: skip
            total += abs(d * g)
        total /= self.weight.numel() ** 0.5
        self.m = 0.85 * self.m + 0.15 * total
        self.u = 0.85 * self.u + 0.15 * abs(total - self.m)

    def grow(self) -> None:
        """The reserve becomes live, E grows with the number of pieces, and a new reserve starts."""
        before = len(self.live)
        self.live += self.ahead
        with torch.no_grad():
            for _, _, e in self.live:
                e *= len(self.live) / before
                e.requires_grad_(True)
        self.ahead, self.rest = self.rest[:EACH], self.rest[EACH:]
        for piece in self.ahead:
            piece[2].fill_(1e-5)


class Dense(nn.Module):
    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layer.corrected().T


def reference(model: Any) -> list[Layer]:
    layers = []
    for name, delta in io.deltas(model):
        pieces = [
            [delta.A[j].detach().clone(), delta.B[:, j].detach().clone(), delta.E[j].detach()]
            for j in range(LIMIT)
        ]
        for a, b, _ in pieces:
            a.requires_grad_(True)
            b.requires_grad_(True)
        live, ahead = pieces[:START], pieces[START : START + EACH]
        for piece in live:
            piece[2] = piece[2].clone().requires_grad_(True)
        for piece in pieces[START:]:
            piece[2] = piece[2].clone()
        weight = model.get_submodule(name).base.weight.detach()
        layers.append(Layer(weight, live, ahead, pieces[START + EACH :]))
    return layers


def penalty(layers: list[Layer]) -> Tensor:
    total: Any = 0.0
    for layer in layers:
        for part in (0, 1):
            rows = torch.stack([piece[part] for piece in layer.live + layer.ahead])
            gram = torch.zeros(len(rows), len(rows), dtype=rows.dtype)
            for j, one in enumerate(rows):
                gram[j] = torch.stack([one @ other for other in rows])
            total = total + (gram - torch.eye(len(rows))).square().sum().sqrt()
    return ORTHOGONALITY * total / (2 * len(layers))


def test_each_step_is_that_of_lists_of_pieces():
    torch.manual_seed(3)
    adapter = make()
    model = adapter.attach(toys.llama(), Start(steps=9))
    for _, delta in io.deltas(model):
        with torch.no_grad():
            delta.E[:START] = 0.7  # not nothing, so that the first steps have scores
    layers = reference(model)
    plain = toys.llama().requires_grad_(False)
    for layer, decoder in zip(layers, plain.model.layers, strict=True):
        decoder.self_attn.q_proj = Dense(layer)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    grown = []
    for step in range(1, 9):
        optimizer = toys_step(adapter, model, optimizer, step)
        total = toys.loss(plain) + penalty(layers)
        for leaf in [leaf for layer in layers for leaf in layer.leaves()]:
            leaf.grad = None
        total.backward()
        for layer in layers:
            layer.score()
            with torch.no_grad():
                for leaf in layer.leaves():
                    leaf -= LR * leaf.grad
        live = sum(len(layer.live) for layer in layers)
        if step > 1 and step % 2 and live < 8:
            best = max(layers, key=lambda layer: layer.m * layer.u)
            if len(best.ahead) <= 8 - live:
                best.grow()
                grown.append(step)
        if not any(0 < len(layer.ahead) <= 8 - sum(len(o.live) for o in layers)
                   for layer in layers):  # fmt: skip
            for layer in layers:
                layer.ahead = []
        for (name, delta), layer in zip(io.deltas(model), layers, strict=True):
            assert delta.pieces == len(layer.live)
            assert delta.reserve == len(layer.ahead)
            expected = layer.corrected().detach()
            torch.testing.assert_close(delta.weight(layer.weight), expected)
            if delta.reserve:
                assert adapter.means[name] == pytest.approx((layer.m, layer.u), rel=1e-6)
    assert grown == [3, 5, 7]
    assert not any(delta.watched for _, delta in io.deltas(model))


def toys_step(adapter: Any, model: Any, optimizer: Any, step: int) -> Any:
    model.train()
    total = toys.loss(model) + adapter.penalty(model)
    optimizer.zero_grad()
    total.backward()
    adapter.before_step(model, 1.0)
    optimizer.step()
    adapter.after_step(model, step)
    return optimizer


def test_growing_leaves_the_outputs():
    torch.manual_seed(3)
    model = make().attach(toys.llama(), Start(steps=9)).eval()
    for _, delta in io.deltas(model):
        nn.init.normal_(delta.E[: delta.used].data)
    before = toys.logits(model)
    for _, delta in io.deltas(model):
        delta.grow()
        assert (delta.pieces, delta.reserve) == (START + EACH, EACH)
    torch.testing.assert_close(toys.logits(model), before, rtol=0, atol=1e-12)
    for _, delta in io.deltas(model):
        delta.grow()
        assert (delta.pieces, delta.reserve, delta.watched) == (5, 1, True)
        delta.grow()
        assert (delta.pieces, delta.reserve, delta.watched) == (LIMIT, 0, False)


def test_micro_batches_and_their_loss_scale_count_once():
    torch.manual_seed(3)
    adapter = make()
    model = adapter.attach(toys.llama(), Start(steps=9)).train()
    for _, delta in io.deltas(model):
        nn.init.constant_(delta.E[:START].data, 0.7)
    toys.loss(model, toys.IDS).backward()
    adapter.before_step(model, 1.0)
    once = dict(adapter.waiting)
    for _ in range(2):
        (4.0 * toys.loss(model, toys.IDS) / 2).backward()
    adapter.before_step(model, 4.0)
    assert adapter.waiting == pytest.approx(once)
    adapter.before_step(model, 4.0)  # without a backward pass in between
    assert adapter.waiting == pytest.approx(once)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_rank": 8}, r"start_rank=1, adapter.target_rank=8, adapter.max_rank=6"),
        ({"interval": 5}, r"grows 3 times, until step 16, and the run has 9: set adapter.top=auto"),
    ],
)
def test_settings_that_cannot_be_reached_are_refused(changes, message):
    with pytest.raises(AdapterError, match=message):
        make(**changes).attach(toys.llama(), Start(steps=9))


def test_auto_reaches_the_target_by_seven_tenths_of_the_run():
    adapter = make(warmup_steps=0.1, interval=0.02, top="auto", target_modules="all-linear")
    adapter.attach(toys.llama(), Start(steps=400))
    assert (adapter.warmup, adapter.interval) == (40, 8)
    growths = -(-3 * 14 // (EACH * adapter.top))
    assert 40 + 8 * growths <= 280
