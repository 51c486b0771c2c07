"""Modules of the base that PEFT's methods train whole, and rows of added tokens.

LoRA trains single rows (PEFT's trainable_token_indices). Other methods train the embedding and the
output layer whole (modules_to_save). PEFT gives each module a copy of its own; where the base ties
the two weights, the copies are tied here.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from adapters import trained_copies
from adapters.delta import cast_inputs
from adapters.errors import AdapterError
from adapters.linear import ends_with, output_layer
from adapters.peft_fields import NAME, classes

# PEFT's, of methods that have no ensure_weight_tying; the copies are tied in `train`
TIED = "(?s).*a tied layer is part of the adapter.*"


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Silence PEFT's warnings that users cannot act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*used with low_cpu_mem_usage=False.*")  # EVA
        # LoRA-GA, at the first layer
        warnings.filterwarnings("ignore", message="Full backward hook is firing.*")
        warnings.filterwarnings("ignore", message=TIED)
        # AdaLoRA's layers of rank 0
        warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape.*")
        yield


def fields(
    model: Any,
    values: dict[str, Any],
    names: list[str],
    tokens: tuple[int, ...],
    config_name: str,
) -> dict[str, Any]:
    """Return the fields of PEFT's config that train modules and tokens, on top of `values`.

    Raises:
        AdapterError: the method cannot train them, or a name matches nothing.
    """
    modules = trained_copies.chosen(model, names)
    if not tokens and not modules:
        return {}
    embedding, head = trained_copies.tied(model)
    if modules & {embedding, head} - {None}:
        modules |= {name for name in (embedding, head) if name}
    result: dict[str, Any] = {}
    if tokens:
        layers = [name for name in trained_copies.vocabulary_layers(model) if name not in modules]
        if config_name == "LoraConfig":
            rows = [name for name in layers if name != head]  # PEFT ties the output layer itself
            result["trainable_token_indices"] = {name: list(tokens) for name in rows}
        else:
            modules |= set(layers)
    if not modules:
        return result
    if "modules_to_save" not in classes()[config_name].fields:
        raise AdapterError(
            f"PEFT's {config_name} has no modules_to_save, so adapter.train_modules and"
            " base.add_tokens do not go with it: use adapter=lora"
        )
    if head in modules and "ensure_weight_tying" in classes()[config_name].fields:
        result["ensure_weight_tying"] = True
    return result | {"modules_to_save": sorted({*(values.get("modules_to_save") or []), *modules})}


def train(model: Any, names: list[str], tokens: tuple[int, ...]) -> None:
    """Train PEFT's copies in fp32 whatever the base's dtype, and tie those of a tied base."""
    if not names and not tokens:
        return
    live: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and (
            ends_with(name, *names) or _of_vocabulary(model, module)
        ):
            live[name] = module
            dtype = next(module.original_module.parameters()).dtype
            trained = module.modules_to_save[NAME].float()
            trained.register_forward_pre_hook(cast_inputs)
            trained.register_forward_hook(_Cast(dtype))
    embedding, head = (live.get(name) for name in _pair(model))
    if embedding is None or head is None:
        return
    if embedding.original_module.weight is head.original_module.weight:
        head.modules_to_save[NAME].weight = embedding.modules_to_save[NAME].weight


class _Cast:
    """A forward hook that casts an output to a dtype."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: Any, out: Any) -> Any:
        return out.to(self.dtype) if isinstance(out, Tensor) and out.is_floating_point() else out


def _of_vocabulary(model: Any, module: nn.Module) -> bool:
    return module is model.get_input_embeddings() or module is output_layer(model)


def _pair(model: Any) -> tuple[str, str]:
    """Return the names of the embedding and of the output layer."""
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(model.get_input_embeddings()), ""), names.get(id(output_layer(model)), "")
