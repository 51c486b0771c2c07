"""A training step asks the device for nothing. torch's meta device stands in for a GPU: its tensors
have no values, so that whatever reads one on the host fails."""

from __future__ import annotations

import contextlib

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapters.delta import Start
from tests.adapters import test_laws as laws
from tests.toys import adapters as toys
from tests.toys.finetuning import adapted
from trainer.assembly.build import instantiate
from trainer.config import compose
from trainer.data.batches import Collate, Pick
from trainer.data.render import Tokens
from trainer.drafters import Target
from trainer.models.losses import CausalLoss
from trainer.training import late
from trainer.training.optimizer import clip_gradients

META = torch.device("meta")
WAITING = {"nonzero", "masked_select", "_local_scalar_dense", "is_nonzero", "equal", "unique_dim"}
ROWS = [(12, 3), (5, 1), (17, 9), (24, 1)]  # tokens, the first trained one
PACKS = {"padded": [ROWS[:1], ROWS[1:2], ROWS[2:3], ROWS[3:]], "packed": [ROWS[:3], ROWS[3:]]}


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """torch refuses to look up whether the meta device has autocast on."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr(torch, "autocast", lambda *device, **options: contextlib.nullcontext())


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result the host has to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, leaves = func._schema.name.removeprefix("aten::"), tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            masks = [t for t in tree_leaves(args[1:2]) if getattr(t, "dtype", None) == torch.bool]
            if name in WAITING or (name in ("index", "index_put", "index_put_") and masks):
                raise AssertionError(f"{name} waits for the device")
        result = func(*args, **(kwargs or {}))
        crosses = name == "_to_copy" and result.is_meta != args[0].is_meta
        if crosses and not (kwargs or {}).get("non_blocking"):
            raise AssertionError("a copy that waits for the device")
        return result


def batch_of(way, weighted=False):
    draw = torch.Generator().manual_seed(0)
    items = [
        (
            Pick(i, True, 40),
            [
                Tokens(
                    torch.randint(1, 64, (length,), generator=draw).tolist(),
                    [at >= first for at in range(length)],
                    weight=1.0 + i,
                )
                for length, first in pack
            ],
        )
        for i, pack in enumerate(PACKS[way])
    ]
    return Collate(0, way == "packed", False, weighted=weighted)(items)


def on_device(batch):
    moved = move_data_to_device(batch, META)
    assert moved["host"] is batch["host"]
    return moved


def drafter_of(words, model):
    composed = compose.compose(["base=tiny", "task.path=rows", *words.split()])
    drafter = instantiate(OmegaConf.to_container(composed, resolve=True)["drafter"])(model=model)
    drafter.calibrate(lambda: torch.arange(len(model.get_input_embeddings().weight)))
    return drafter


def step(batch, words=""):
    """Run a step of a LoRA and of a drafter, or of a drafter alone, up to the optimiser's own."""
    model = toys.llama(torch.float32).requires_grad_(False)
    drafter = drafter_of(words, model) if words else None
    if "adapter=none" not in words:
        adapted(toys.lora(), model)
    loss = CausalLoss(model, 16, drafter, None if drafter is None else Target(model))
    trained = [module for module in (model, drafter) if module is not None]
    for module in trained:
        module.to(META).train()
    if (family := getattr(drafter, "family", None)) is not None:
        family.decoder.rotary_emb.to(META)
    parameters = [p for module in trained for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    with NoWaiting():
        summed, sums = loss(batch)
        (summed / batch.get("window_tokens", 1)).backward()
        norm, _ = clip_gradients(parameters, drafter, 1.0)
        late.skip_if([optimizer], torch.isfinite(norm) & torch.isfinite(sums["loss"]))
    assert all(p.grad is not None for p in parameters)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("way", PACKS)
def test_a_step_of_a_lora_does_not_wait(way, weighted):
    step(on_device(batch_of(way, weighted)))


@pytest.mark.parametrize("way", PACKS)
@pytest.mark.parametrize("missing", ["supervised", "host"])
def test_without_what_the_host_knows_it_waits(way, missing):
    batch = on_device(batch_of(way))
    del batch[missing]
    with pytest.raises(AssertionError, match="waits for the device"):
        step(batch)


@pytest.mark.parametrize(
    "name",
    [
        "medusa", "hydra_plus", "mtp_shared", "eagle", "eagle3 drafter.draft_vocab_size=50",
        "clover", "dspark", "peagle", "ppd adapter=none", "uno adapter=none", "kangaroo",
        "registers",
    ],
    ids=lambda words: words.partition(" ")[0],
)  # fmt: skip
def test_a_step_of_a_drafter_does_not_wait(name):
    step(on_device(batch_of("packed")), f"drafter={name}")


# Presets whose step does wait, and for what.
WAITS = {
    "adalora": "PEFT ranks the singular values of all layers after each step",
    "increlora": "one sum over all layers decides which of them grow",
    "loftq": "its base is quantised, which the meta device cannot be",
    "prefix_tuning": "PEFT copies the numbers of its virtual tokens to the device",
    "prompt_tuning": "PEFT copies the numbers of its virtual tokens to the device",
    "shira": "PEFT copies its indices to the device",
    "spiel": "its window of dense gradients leaves out those that are not finite",
    "spiel_ma": "the step chooses entries again",
    "sr_ste": "it counts the weights that changed sides",
}


def sampled_addmm(support, *products, **options):
    """Stand in for torch's, which the meta device lacks."""
    empty = torch.empty_like(support.values())
    return torch.sparse_csr_tensor(
        support.crow_indices(), support.col_indices(), empty, support.shape, check_invariants=False
    )


@pytest.mark.parametrize("name", [name for name in laws.PRESETS if name not in ("none", *WAITS)])
def test_a_step_of_an_adapter_does_not_wait(name, monkeypatch):
    torch.manual_seed(1)
    adapter = laws.make(name)
    model = adapter.attach(toys.llama(torch.float32), Start(steps=6, data=toys.batches))
    toys.train(adapter, model, range(2)).train()  # masks are chosen
    loss = CausalLoss(model, 16)
    model.to(META)
    monkeypatch.setattr(torch.sparse, "sampled_addmm", sampled_addmm)
    parameters = [p for group in adapter.parameter_groups(model) for p in group["params"]]
    batch = on_device(batch_of("packed"))
    with NoWaiting():
        summed, sums = loss(batch)
        penalty = adapter.penalty(model)
        (summed / batch["window_tokens"] if penalty is None else summed + penalty).backward()
        adapter.before_step(model, 1.0)
        norm, _ = clip_gradients(parameters, None, 1.0)
        late.skip_if([], torch.isfinite(norm) & torch.isfinite(sums["loss"]))
        adapter.after_step(model, 3)
    assert all(p.grad is not None for p in parameters)
