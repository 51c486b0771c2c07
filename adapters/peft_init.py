"""PEFT's LoRA initialisations that need more than the model: data (EVA, CorDA, LoRA-GA), or the
weights before quantisation (LoftQ).

PEFT leaves it to its caller to feed these with data, before or after it wraps the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.loftq_utils import _low_rank_decomposition, _SafetensorLoader
from torch import Tensor, nn

from adapters.delta import AdapterError, Start
from adapters.linear import float_weight
from adapters.peft_fields import NAME
from adapters.targets import targets


def before_wrapping(init: str, model: nn.Module, config: Any, start: Start, batches: int) -> None:
    """Prepare CorDA and LoRA-GA, which read `batches` micro-batches with the plain model."""
    if init not in ("corda", "lora_ga"):
        return
    if config.target_modules == "all-linear":  # their preparation takes only names
        config.target_modules = {name for name, _ in targets(model, "all-linear")}
    if init == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        def run_model() -> None:
            _forward(model, _single_rows(_data(init, model, start, batches)))

        preprocess_corda(model, config, run_model=run_model)
    else:
        from peft.tuners.lora.loraga import preprocess_loraga

        def train_step() -> None:
            _forward(model, _data(init, model, start, batches), backward=True)

        preprocess_loraga(model, config, train_step=train_step)


def after_wrapping(init: str, wrapped: Any, start: Start, batches: int) -> None:
    """Compute EVA's factors from `batches` micro-batches, or LoftQ's from the rounding errors."""
    if init == "eva":
        data = list(_data(init, wrapped, start, batches))
        peft.initialize_lora_eva_weights(wrapped, data, show_progress_bar=False)
    elif init == "loftq":
        _fit_rounding(wrapped)


def lora_layers(wrapped: Any) -> Iterator[tuple[str, Any]]:
    """Yield PEFT's LoRA layers, by their names in the base."""
    for name, module in wrapped.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            yield name, module


def _fit_rounding(wrapped: Any) -> None:
    """Initialise by LoftQ (Li et al. 2023, arXiv 2310.08659) in one iteration. PEFT's version needs
    a GPU and a scale of 1."""
    folder = Path(wrapped.config._name_or_path)
    try:
        stored = _SafetensorLoader(wrapped, str(folder) if folder.is_dir() else None)
    except (ValueError, OSError) as error:
        raise AdapterError(
            f"LoftQ reads the base's weights before rounding, which are not there: {error}"
        ) from error
    for name, module in lora_layers(wrapped):
        rounded = float_weight(module.get_base_layer())
        lost = stored.get_tensor(f"{name}.weight").to(rounded) - rounded
        factors = _low_rank_decomposition(lost / module.scaling[NAME], module.r[NAME])
        module.lora_A[NAME].weight.data.copy_(factors["R"])
        module.lora_B[NAME].weight.data.copy_(factors["L"])


def _data(init: str, model: nn.Module, start: Start, batches: int) -> Iterator[dict[str, Tensor]]:
    if start.data is None:
        raise AdapterError(
            f"adapter.init_lora_weights={init} is computed from training data, and there is none"
        )
    device = next(model.parameters()).device
    for batch in itertools.islice(start.data(), batches):
        yield {key: value.to(device) for key, value in batch.items()}


def _single_rows(batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield one row at a time, without padding, as CorDA's covariance requires."""
    for batch in batches:
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            yield {
                key: value[i : i + 1, :length] for key, value in batch.items() if key != "labels"
            }


def _forward(
    model: nn.Module, batches: Iterator[dict[str, Tensor]], backward: bool = False
) -> None:
    with torch.set_grad_enabled(backward):
        for batch in batches:
            output = model(**batch, use_cache=False)
            if backward:
                output.loss.backward()
