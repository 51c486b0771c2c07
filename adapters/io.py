"""Adapter folders in stock PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.delta import AdaptedLinear, Delta, Pool
from adapters.experts import AdaptedExperts
from adapters.trained_copies import TokenRows, Trained

PREFIX = "base_model.model."  # PEFT's wrapper: PeftModel.base_model.model


def task_type(model: nn.Module, classifier: bool) -> str:
    """Return PEFT's name for what a model does, by which PEFT chooses its wrapper."""
    if classifier:
        return "SEQ_CLS"
    pairs = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if pairs else "CAUSAL_LM"


def deltas(model: nn.Module) -> list[tuple[str, Any]]:
    """Return every Delta, by its layer's name."""
    return [
        (name, module.delta)
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
    ]


def delta_tensors(
    model: nn.Module, parts: Callable[[Any], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], list[str], bool]:
    """Return each Delta's parts under PEFT's keys, the adapted layers' names, and whether the
    layers are GPT-2's transposed Conv1D."""
    tensors: dict[str, Tensor] = {}
    names: list[str] = []
    transposed = False
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            names.append(name)
            transposed |= isinstance(module.base, Conv1D)
            tensors |= {
                f"{PREFIX}{name}.{key}": tensor for key, tensor in parts(module.delta).items()
            }
    return tensors, names, transposed


def shortened(names: list[str], model: nn.Module) -> list[str]:
    """Return the names' endings (q_proj, ...) if they match only these layers, else the names. PEFT
    matches modules of any class: of Gemma 3n's projections 0, 1 and 2 its decoder layers too."""
    endings = {name.rpartition(".")[2] for name in names}
    matching = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings} - {
        f"{name}.{part}" for name in names for part in ("base", "delta")
    }
    return sorted(endings) if matching == set(names) else sorted(names)


def lora_fields(
    model: nn.Module, names: list[str], dropout: float, of_experts: list[str] | None = None
) -> dict[str, Any]:
    """Return the fields of PEFT's LoraConfig that name the adapted layers, and the tensors
    `of_experts`.

    On mixtures of experts PEFT takes some names in target_modules for the experts' matrices of
    transformers 4 and rewrites them, although a dense MLP or a shared expert has layers of these
    names too: it would load the adapter onto other weights (peft #3711). Such layers are named by
    their weights in target_parameters, which PEFT leaves alone. It allows no dropout there; a saved
    adapter has no use for it.
    """
    rewritten = [name for name in names if is_rewritten(model, name)]
    if not rewritten and not of_experts:
        return {"target_modules": shortened(names, model), "lora_dropout": dropout}
    others = [name for name in names if name not in set(rewritten)]
    return {
        "target_modules": shortened(others, model),
        "target_parameters": [*(f"{name}.weight" for name in rewritten), *(of_experts or [])],
        "lora_dropout": 0.0,
    }


def is_rewritten(model: nn.Module, name: str) -> bool:
    """Return whether PEFT takes the name of a layer of this model for its experts' matrices."""
    return name.rpartition(".")[2] in _rewritten_names(_model_type(model))


def rewrites(model: nn.Module) -> bool:
    """Return whether PEFT rewrites target_modules for this model; it adds experts to
    `all-linear`."""
    return bool(_rewritten_names(_model_type(model)))


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


@functools.cache
def _rewritten_names(model_type: str) -> frozenset[str]:
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {}))


def trained_modules(model: nn.Module, rows: bool = True) -> list[str]:
    """Return the outermost modules that are trained as a whole, such as a classification head;
    without `rows` none of which single rows are trained. PEFT puts a wrapper around each, so none
    may be inside another."""
    attached = Delta | Pool | Trained | AdaptedExperts
    inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, attached))
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Trained) and (rows or not isinstance(module, TokenRows)):
            names.append(name)
        if not name or f"{name}.".startswith((*inside, *(f"{outer}." for outer in names))):
            continue
        parameters = list(module.parameters())
        if parameters and all(p.requires_grad for p in parameters):
            names.append(name)
    return sorted(names)


def token_rows(model: nn.Module) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Return the trained tokens of each embedding and output layer, as PEFT's
    trainable_token_indices, and their rows under PEFT's keys. PEFT ties them itself where the base
    is tied."""
    indices: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, TokenRows) and id(module.rows) not in seen:
            seen.add(id(module.rows))
            indices[name] = module.tokens
            tensors[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = module.rows
    return indices, tensors


def module_tensors(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Return all tensors of modules under PEFT's keys."""
    return {
        f"{PREFIX}{name}.{key}": tensor
        for name in names
        for key, tensor in _tensors(model.get_submodule(name)).items()
    }


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return module.shown() if isinstance(module, Trained) else module.state_dict()


def write(folder: Path, config: Any, tensors: dict[str, Tensor]) -> None:
    """Write a PEFT config and its tensors. The config is written last: a folder without it is
    incomplete."""
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share memory
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    file = unlinked(folder / "adapter_config.json")
    save_tensors(copies, folder / "adapter_model.safetensors", {"format": "pt"})
    fields = config.to_dict()
    for key, value in fields.items():
        if isinstance(value, set):
            fields[key] = sorted(value)  # sets have no order, and the file should be reproducible
    temporary = unlinked(folder / "adapter_config.json.tmp")
    temporary.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    temporary.replace(file)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file with the mode that the umask gives. The library's own is 0600."""
    unlinked(path).touch(exist_ok=False)
    mode = path.stat().st_mode & 0o777
    save_file(tensors, path, metadata)
    path.chmod(mode)


def unlinked(path: Path) -> Path:
    """Remove a file, and return its path to write it again: a link that has this name is not
    written through."""
    path.unlink(missing_ok=True)
    return path
