"""Layers that are computed again in the backward pass: the same numbers from less memory, whichever
layers they are."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from adapters.delta import Start
from scripts.bench import profile
from tests.toys import adapters as toys
from trainer.assembly.build import instantiate
from trainer.config import compose, schema
from trainer.speed import fused
from trainer.training.finetune import FineTune

ADAPTERS = {
    "lora": ["adapter=lora"],
    "lora with dropout": ["adapter=lora", "adapter.dropout=0.3"],
    "peft": [
        "adapter=peft",
        "adapter.peft_type=LORA",
        "+adapter.r=4",
        "+adapter.lora_dropout=0.2",
        "+adapter.target_modules=[q_proj,down_proj]",
    ],
    "rosa": ["adapter=rosa", "adapter.mask=random", "adapter.density=0.05", "adapter.dropout=0.2"],
}


@functools.cache
def parts(name: str) -> dict[str, Any]:
    composed = compose.compose(["base=tiny", "task.path=rows", *ADAPTERS[name]])
    return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]


def trained(
    model: Any, name: str, checkpointing: bool | int, packed: bool
) -> tuple[list[torch.Tensor], int, int]:
    """(loss and gradients, bytes that wait for the backward pass, how often a layer was computed)
    of one micro-batch."""
    adapter, optimizer = (instantiate(parts(name)[part]) for part in ("adapter", "optimizer"))
    torch.manual_seed(1)
    model = adapter.attach(copy.deepcopy(model), Start(steps=8))
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("input_layernorm"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    module = FineTune(
        model=model,
        adapter=adapter,
        optimizer=optimizer,
        repeat_smaller=False,
        schedule=lambda *_, **__: 1.0,
        steps=1,
        labelled=False,
        accumulate=1,
        seed=0,
        max_grad_norm=None,
        logits_chunk=8,
        gradient_checkpointing=checkpointing,
        nonfinite_limit=3,
    ).train()
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(2))
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    if packed:
        batch["position_ids"] = torch.stack(
            [torch.cat([torch.arange(n), torch.arange(24 - n)]) for n in (10, 15)]
        )
    module.loss(batch)  # a mask that is looked up from now on
    calls.clear()
    torch.manual_seed(3)
    loss, _ = module.loss(batch)
    loss.backward()
    computed = len(calls)
    stored = sum(size for size, _, _ in profile.saved_tensors(module, batch))
    return (
        [loss.detach(), *(p.grad for p in module.parameters() if p.requires_grad)],
        stored,
        computed,
    )  # type: ignore[misc]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "packed", "fuse"),
    [
        ("lora", True, True),
        ("lora with dropout", False, True),
        ("peft", True, False),
        ("rosa", True, True),
    ],
)
def test_recomputed_layers_change_no_bit(name, packed, fuse):
    model = toys.llama(torch.float32, num_hidden_layers=5)
    if fuse:
        fused.fuse(model)
    expected, most, calls = trained(model, name, False, packed)
    assert all(gradient.abs().max() > 0 for gradient in expected[1:])
    assert calls == 5
    stored = {}
    for checkpointing, again in ((True, 5), (2, 3), (3, 2)):
        actual, stored[checkpointing], calls = trained(model, name, checkpointing, packed)
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours, theirs)
        assert calls == 5 + again
    # A layer that is not recomputed keeps what it did; one that is keeps its input, and the
    # generator's state where it may draw.
    layer = (most - stored[True]) / 5
    assert 5 * layer > 0.6 * most
    assert stored[2] == pytest.approx(most - 3 * layer, rel=0.05)
    assert stored[3] == pytest.approx(most - 2 * layer, rel=0.05)


def test_what_is_no_choice_of_layers_is_refused():
    choice = schema.load("objective/finetune").children["gradient_checkpointing"].type
    assert [
        value
        for value in (False, True, 2, 3, 1, 0, -2, 2.5, "selective", None)
        if schema.accepts(value, choice)
    ] == [
        False,
        True,
        2,
        3,
    ]
