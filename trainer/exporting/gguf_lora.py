"""A LoRA as a GGUF file that llama.cpp applies to the base's own GGUF file (`--lora`)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters.delta import AdapterError
from adapters.io import PREFIX
from trainer.assembly.trained import Trained
from trainer.exporting.adapter import FILE as WEIGHTS
from trainer.exporting.adapter import save_adapter
from trainer.exporting.compare import Mismatch
from trainer.exporting.gguf_model import Family, family_of, laid_out, write_modelfile
from trainer.exporting.serving import Serving

FILE = "adapter.gguf"
LARGEST_ERROR = 1e-4  # of an update, relative to its own size: sums in another order


def check(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Refuse an adapter that llama.cpp cannot apply.

    Raises:
        AdapterError: names what it cannot hold.
    """
    merge = "use to=gguf, which writes the merged model"
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"to=gguf_lora is for LoRA, and this is {config.get('peft_type')}: {merge}"
        )
    if config.get("use_dora"):
        raise AdapterError(f"to=gguf_lora: llama.cpp has no DoRA: {merge}")
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        raise AdapterError(
            f"to=gguf_lora: llama.cpp has no place for {others[0].removeprefix(PREFIX)}: {merge}"
        )


def refuse_tied(layers: list[str], skeleton: Any) -> None:
    """Refuse an update of a layer that shares the embedding's weight.

    Raises:
        AdapterError: there is such a layer; the base's GGUF file has no weight for it.
    """
    own = {name for name, _ in skeleton.named_parameters()}  # a tied weight has one name
    for layer in layers:
        if f"{layer}.weight" not in own:
            raise AdapterError(
                f"to=gguf_lora: {layer} has the embedding's weight, and llama.cpp finds no layer of"
                " that name in the base's file: use to=gguf, the merged model"
            )


@torch.no_grad()
def write_gguf_lora(run: Trained, folder: Path) -> float:
    """Write the adapter, read the file back, and compare each layer's update with that of the
    merged model. Return the largest difference, relative to the update.

    Raises:
        AdapterError: llama.cpp cannot apply this adapter.
        Mismatch: an update differs.
    """
    model: Any = run.model
    family = family_of(model.config)
    with tempfile.TemporaryDirectory() as temporary:
        save_adapter(run.adapter, model, run.base, run.task, Path(temporary))
        stored = Path(temporary) / WEIGHTS
        if not stored.exists():
            raise AdapterError("to=gguf_lora is for one LoRA: use to=gguf, the merged model")
        config = json.loads((Path(temporary) / "adapter_config.json").read_text("utf-8"))
        tensors = load_file(stored)
    check(config, tensors)
    pairs = _pairs(tensors, config)
    refuse_tied(list(pairs), run.base.skeleton())
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / FILE, model.config, family, config, pairs)
    merged: Any = run.adapter.merge(run.model)
    base = run.base.load(torch.float32)
    difference = _compare(folder / FILE, (base, merged), family, list(pairs))
    serving = Serving.of(run)
    write_modelfile(folder, "FROM base.gguf\nADAPTER ./adapter.gguf", serving)
    return difference


def _pairs(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (A, B) by the layer's name. A scale of a layer that is not the file's is in its B."""
    scale = scale_of(config, config["r"], config["lora_alpha"])
    pairs = {}
    for key in sorted(tensors):
        if not key.endswith(".lora_A.weight"):
            continue
        layer = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        a, b = tensors[key].float(), tensors[key.replace("lora_A", "lora_B")].float()
        alpha = _pattern(config.get("alpha_pattern"), layer, config["lora_alpha"])
        own = scale_of(config, a.shape[0], alpha)
        # llama.cpp divides the file's alpha by the rows of A
        applied = scale * config["r"] / a.shape[0]
        pairs[layer] = (a, b * (own / applied))
    return pairs


def scale_of(config: dict[str, Any], rank: int, alpha: float) -> float:
    """The factor of B A in PEFT."""
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _pattern(patterns: dict[str, Any] | None, layer: str, default: float) -> float:
    for name, value in (patterns or {}).items():
        if layer == name or layer.endswith(f".{name}"):
            return float(value)
    return default


def _write(
    file: Path, config: Any, family: Family, peft: dict[str, Any], pairs: dict[str, Any]
) -> None:
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[family.architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = scale_of(peft, peft["r"], peft["lora_alpha"]) * peft["r"]
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for layer, (a, b) in pairs.items():
        name = _name(layer, config, family)
        rows = laid_out(f"{layer}.weight", b, config, family)
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a.cpu().numpy()))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(rows.cpu().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(layer: str, config: Any, family: Family) -> str:
    names = gguf.get_tensor_name_map(family.architecture, config.num_hidden_layers)
    name = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
    if name is None:
        raise AdapterError(f"to=gguf_lora has no name for the layer {layer}")
    return str(name)


def _compare(file: Path, models: tuple[Any, Any], family: Family, layers: list[str]) -> float:
    reader = gguf.GGUFReader(str(file))
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].parts[-1][0])
    base, merged = (dict(model.named_parameters()) for model in models)
    config, largest = models[1].config, 0.0
    for layer in layers:
        name = _name(layer, config, family)
        a, b = stored[f"{name}.lora_a"], stored[f"{name}.lora_b"]
        update = alpha / a.shape[0] * b @ a
        key = f"{layer}.weight"
        before, after = (laid_out(key, w[key].detach().float(), config, family)
                         for w in (base, merged))  # fmt: skip
        # the merged weight is rounded where the update is added
        size = float(after.abs().max()) * 1e-3 + float(update.norm())
        error = float((before + update - after).norm()) / max(size, 1e-12)
        if not error <= LARGEST_ERROR:
            raise Mismatch(f"{file.name}: the update of {layer} differs by {error:.3g} of its size")
        largest = max(largest, error)
    return largest
