"""Trained draft heads in the layouts that serving engines load.

A head is first one dictionary of tensors (trainer.exporting.draft_head), and each layout is a
renaming of it (trainer.exporting.block_layouts, eagle_layouts, medusa_layout). `faults` reads a
written folder and lists its faults; `logits` computes from its files alone, in plain torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.exporting import block_layouts, eagle_layouts, medusa_layout
from trainer.exporting.draft_head import DraftHead, output_weight

Content = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and config


def _speculators(head: DraftHead, verifier: str) -> Content:
    layouts = block_layouts if head.method == "block" else eagle_layouts
    return layouts.speculators(head, verifier)


def _sglang(head: DraftHead, verifier: str) -> Content:
    layouts = block_layouts if head.method == "block" else eagle_layouts
    return layouts.sglang(head, verifier)


_WRITERS: dict[str, Callable[[DraftHead, str], Content]] = {
    "speculators": _speculators,
    "sglang": _sglang,
    "medusa": medusa_layout.content,
}
LAYOUTS = tuple(_WRITERS)


def write(head: DraftHead, to: str, folder: Path, dtype: torch.dtype, verifier: str) -> None:
    """Write a layout's config.json and safetensors file; `verifier` is the target's name in the
    config."""
    tensors, config = _WRITERS[to](head, verifier)
    if to != "medusa":
        config["dtype"] = str(dtype).removeprefix("torch.")
    cast = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    # safetensors refuses tensors that share memory.
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in cast.items()},
        folder / _file(to),
        {"format": "pt"},
    )
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8"
    )


def faults(folder: Path, to: str, head: DraftHead, dtype: torch.dtype, model: Any) -> list[str]:
    """List what is wrong with a folder: names, shapes and types of tensors that do not fit its
    config, values that are not finite, a map of the draft vocabulary that contradicts itself, and
    tensors that are not the head's own and differ from the target's."""
    config, tensors = _read(folder, to)
    size = tuple(model.get_input_embeddings().weight.shape)
    if to == "medusa":
        full = f"0.{head.blocks}.weight" in head.tensors
        expected = medusa_layout.expected_shapes(config, size, full)
    else:
        expected = _layouts(config).expected_shapes(to, config, size)
    problems = _misfits(tensors, expected, dtype)
    if problems:
        return problems
    draft_ids = torch.arange(size[0])
    if "d2t" in tensors:
        draft_ids = torch.arange(len(tensors["d2t"])) + tensors["d2t"]
        if not bool((draft_ids.diff() > 0).all()):
            problems.append("the tokens that d2t points at are not ascending, or not unique")
        if not torch.equal(draft_ids, tensors["t2d"].nonzero()[:, 0]):
            problems.append("d2t and t2d name different tokens")
        if problems:
            return problems
    if head.method == "block":
        known = block_layouts.fillers(head, to)
        known["lm_head.weight"] = output_weight(model)[draft_ids]
        return [
            f"{name} is not what the format needs in place of a trained one"
            for name in sorted(tensors.keys() - head.own)
            if not torch.equal(tensors[name], known[name].to(dtype))
        ]
    return _not_the_targets(tensors, head, dtype, model, draft_ids)


def _misfits(
    tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> list[str]:
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [
        f"{name} belongs to no module" for name in sorted(tensors.keys() - expected.keys())
    ]
    for name in sorted(expected.keys() & tensors.keys()):
        tensor, kind = tensors[name], {"d2t": torch.int64, "t2d": torch.bool}.get(name, dtype)
        if tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} is of the shape {tuple(tensor.shape)}, not {expected[name]}")
        if tensor.dtype != kind:
            problems.append(f"{name} is {tensor.dtype}, not {kind}")
        if not torch.isfinite(tensor).all():
            problems.append(f"{name} holds NaN or infinite values")
    return problems


def _not_the_targets(
    tensors: dict[str, Tensor],
    head: DraftHead,
    dtype: torch.dtype,
    model: Any,
    draft_ids: Int[Tensor, " v"],
) -> list[str]:
    """List copied tensors that differ from the target's; `draft_ids` are the draft vocabulary's
    ids."""
    embedding = model.get_input_embeddings().weight.detach().cpu().to(dtype)
    output = output_weight(model).to(dtype)
    different = []
    for name, tensor in tensors.items():
        if name.replace("midlayer.", "layers.0.") in head.own:
            continue
        expected = embedding if name == "embed_tokens.weight" else output
        if name == "lm_head.weight":
            expected = output[draft_ids]
        if name == "fc.bias":
            expected = torch.zeros(embedding.shape[1], dtype=dtype)
        if not torch.equal(tensor, expected):
            different.append(f"{name} is not the target's")
    return different


@torch.no_grad()
def logits(
    folder: Path,
    to: str,
    model: Any,
    states: Float[Tensor, "n f"],
    ids: Int[Tensor, " n"],
    drafted: Int[Tensor, " m"],
) -> Float[Tensor, "k v"]:
    """Compute from a folder's files alone, in fp32, the logits after `ids` and after each drafted
    token. `states` are those that the drafter reads of the target, `ids` the tokens that follow
    each of them. Medusa's heads give one row each, and read no token."""
    config, stored = _read(folder, to)
    tensors = {
        name.replace("midlayer.", "layers.0."): t.float() if t.is_floating_point() else t
        for name, t in stored.items()
    }
    if to == "medusa":
        return medusa_layout.logits(config, tensors, states[-1], output_weight(model))
    return _layouts(config).logits(config, tensors, model, states, ids, drafted)


def _layouts(config: dict[str, Any]) -> Any:
    return block_layouts if "block_size" in config else eagle_layouts


def _file(to: str) -> str:
    return medusa_layout.FILE if to == "medusa" else eagle_layouts.FILE


def _read(folder: Path, to: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text("utf-8")), load_file(folder / _file(to))
