"""Sparse and low-rank deltas in stock PEFT's formats, so that PEFT alone can load, merge and train
them.

    Super-Tuning   values, int32 indices, and A and B if there is a low-rank part. One adapter, on
                   unquantised nn.Linear only
    SHiRA + LoRA   two adapters; SHiRA is loaded first. Also on 4-bit bases, and SHiRA alone on
                   8-bit bases

Super-Tuning has one density for all layers, and SHiRA one budget of r (in + out) entries. Layers
with a smaller support are padded with entries of value 0, which add nothing.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import experts, io
from adapters.delta import AdapterError


def save_supertuning(
    adapter: Any, model: nn.Module, folder: Path, base_name: str, task_type: str
) -> None:
    """Write one folder in Super-Tuning's layout."""
    from peft import SupertuningConfig

    sparsity = 1 - adapter.densest

    def parts(delta: Any) -> dict[str, Tensor]:
        k = int(delta.o * delta.i * (1 - sparsity))  # PEFT's expression
        tensors = {
            "supertuning_values": _padded(delta.values.detach().float(), k),
            "supertuning_indices": _padded_support(delta.indices, k),
        }
        if adapter.rank:
            tensors |= {"supertuning_lora_A.weight": delta.A, "supertuning_lora_B.weight": delta.B}
        return tensors

    low_rank: dict[str, Any] = {}
    if adapter.rank:  # PEFT always scales by alpha / r here
        alpha = io.deltas(model)[0][1].scale * adapter.rank
        low_rank = {"r": adapter.rank, "lora_alpha": alpha, "lora_dropout": adapter.dropout}
    config = functools.partial(SupertuningConfig, sparsity=sparsity, **low_rank)
    _write(model, folder, _tensors(model, parts), config, base_name, task_type)


def save_shira(
    adapter: Any, model: nn.Module, folder: Path, base_name: str, task_type: str
) -> None:
    """Write the sparse part alone, in SHiRA's layout.

    Raises:
        AdapterError: the support is too dense for SHiRA's budget of r (in + out) entries.
    """
    from peft import ShiraConfig

    budget = _budget(model)
    if (name := _beyond(model, budget)) is not None:
        raise AdapterError(
            f"SHiRA holds r (in + out) entries of each layer, and r={budget}, which this support"
            f" needs, is more than {name} has. Export it with to=merged"
        )

    def parts(delta: Any) -> dict[str, Tensor]:
        k = budget * (delta.o + delta.i)
        flat = _padded_support(delta.indices, k).long()
        return {
            "shira_weight": _padded(delta.values.detach().float(), k),
            "shira_indices": torch.stack([flat // delta.i, flat % delta.i]).int(),
        }

    # With a mask type that PEFT does not know, it takes the indices from the file.
    settings: dict[str, Any] = {"r": budget, "mask_type": "saved", "random_seed": 0}
    config = functools.partial(ShiraConfig, **settings)
    tensors = _tensors(model, parts)
    _write(model, folder, tensors, config, base_name, task_type, heads=not adapter.rank)


def save_low_rank(
    adapter: Any, model: nn.Module, folder: Path, base_name: str, task_type: str
) -> None:
    """Write the low-rank part alone, in LoRA's layout."""
    from peft import LoraConfig

    def parts(delta: Any) -> dict[str, Tensor]:
        return {"lora_A.weight": delta.A, "lora_B.weight": delta.B}

    _, names, transposed = io.delta_tensors(model, lambda _: {})
    config = functools.partial(
        LoraConfig,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.rslora,
        fan_in_fan_out=transposed,
    )
    further, of_experts = experts.stock_tensors(model, io.PREFIX)
    tensors = _tensors(model, parts) | further
    fields = io.lora_fields(model, names, adapter.dropout, of_experts)
    _write(model, folder, tensors, config, base_name, task_type, fields=fields)


def holds_pair(model: nn.Module) -> bool:
    """Return whether SHiRA and LoRA can hold the two parts of a model's deltas: the support is not
    too dense for SHiRA, and LoRA can name the layers that SHiRA wraps (see io.lora_fields)."""
    named = not any(io.is_rewritten(model, name) for name, _ in io.deltas(model))
    return named and _beyond(model, _budget(model)) is None


def _budget(model: nn.Module) -> int:
    """Return SHiRA's r: with r (in + out) entries each layer's support has room."""
    return max(math.ceil(len(d.indices) / (d.o + d.i)) for _, d in io.deltas(model))


def _beyond(model: nn.Module, budget: int) -> str | None:
    """Return the name of a layer that has fewer than r (in + out) entries, None if none has."""
    for name, delta in io.deltas(model):
        if budget * (delta.o + delta.i) > delta.o * delta.i:
            return f"{name} ({delta.o} x {delta.i})"
    return None


def load_pair(base: nn.Module, folder: Path) -> nn.Module:
    """Load a pair with stock PEFT: LoRA's layers wrap SHiRA's, which cannot wrap others. A
    PeftMixedModel does the same, but refuses models that transformers has loaded in 4 bits."""
    from peft import PeftModel

    # the default, set explicitly: otherwise torch warns about SHiRA
    torch.sparse.check_sparse_tensor_invariants.disable()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*modify a model with PEFT for a second time.*")
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute.*")
        inner = PeftModel.from_pretrained(
            base, folder / "shira", adapter_name="shira"
        ).get_base_model()  # type: ignore[arg-type]
        return PeftModel.from_pretrained(inner, folder / "lora")  # type: ignore[arg-type]


def _padded(values: Tensor, k: int) -> Tensor:
    return F.pad(values, (0, k - len(values)))


def _padded_support(indices: Tensor, k: int) -> Tensor:
    """Return the support and the first entries outside it, k in all. The indices are distinct, so
    that PEFT can train all of them."""
    first = torch.arange(k, dtype=indices.dtype, device=indices.device)
    return torch.cat([indices, first[~torch.isin(first, indices)][: k - len(indices)]])


def _tensors(model: nn.Module, parts: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
    return io.delta_tensors(model, parts)[0]


def _write(
    model: nn.Module,
    folder: Path,
    tensors: dict[str, Tensor],
    config_class: Any,
    base_name: str,
    task_type: str,
    heads: bool = True,
    fields: dict[str, Any] | None = None,
) -> None:
    names = [name for name, _ in io.deltas(model)]
    modules = io.trained_modules(model) if heads else []
    config = config_class(
        **(fields or {"target_modules": io.shortened(names, model)}),
        modules_to_save=modules or None,
        base_model_name_or_path=base_name,
        task_type=task_type if heads else None,  # PEFT expects a head in a SEQ_CLS folder
        inference_mode=True,
    )
    io.write(folder, config, tensors | io.module_tensors(model, modules))
