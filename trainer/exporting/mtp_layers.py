"""A drafter as the MTP layer of its target's family, in the names and config keys of the family's
released files.

    layers   model.layers.{N}.{enorm,hnorm,eh_proj,shared_head.norm}.weight, with the block; N =
             num_hidden_layers
    mtp      mtp.{pre_fc_norm_embedding,pre_fc_norm_hidden,fc,norm}.weight, and the block as
             mtp.layers.0.

Both hold one module: a `shared` one, which servers run again for each further token, or the only
one. Several modules are refused, since transformers passes norm_k(h_k) to the next depth, where
ours passes h_k, and finds no second layer by these names.

Evidence: transformers 5.23 was run. It loads these names for all of FAMILIES and gives the
drafter's own logits. It decodes with them, generate(use_mtp=True), for glm4_moe, deepseek_v3 and
mellum, one token ahead; models with linear attention (qwen3_next, qwen3_5) cannot draft in it at
all. Of vLLM and SGLang only the loaders were read. vLLM's
{deepseek,glm4_moe,qwen3_next,qwen3_5}_mtp.py, with config/speculative.py for the config keys, and
SGLang's glm4_moe_nextn.py and qwen3_next_mtp.py, with the load_weights of their models, use these
names, this order in the projection, and states after the final norm. SGLang's files for deepseek_v3
and qwen3_5, and both servers' for mellum, were not read.

Servers differ from training here in ways that cost accepted tokens and never change the text: in a
repetition both keep one sequence of keys and values where we keep one for each depth; vLLM's files
for the names `mtp` and SGLang's pass on norm(h); vLLM's for the names `layers` zero the embedding
at the first position.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import MtpCache
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import MtpModel

from trainer.drafters import Drafter, DrafterError, Target, TargetOutput
from trainer.drafters.sequential import SequentialModules

# By model_type: the names, and the config's key for the number of layers, if servers read another
# key than transformers' num_mtp_layers.
FAMILIES: dict[str, tuple[str, str | None]] = {
    "deepseek_v3": ("layers", None),
    "glm4_moe": ("layers", None),
    "mellum": ("mtp", None),
    "qwen3_5_moe_text": ("mtp", "mtp_num_hidden_layers"),
    "qwen3_5_text": ("mtp", "mtp_num_hidden_layers"),
    "qwen3_next": ("mtp", "num_nextn_predict_layers"),
}
_NAMES = {
    "layers": {
        "enorm": "enorm",
        "hnorm": "hnorm",
        "eh_proj": "eh_proj",
        "post_norm": "shared_head.norm",
    },
    "mtp": {
        "enorm": "pre_fc_norm_embedding",
        "hnorm": "pre_fc_norm_hidden",
        "eh_proj": "fc",
        "post_norm": "norm",
    },
}
_INSTEAD = "Use to=drafter, and decode with graft speculate"
_INDEX = "model.safetensors.index.json"


def check(drafter: Drafter | None, model: Any) -> None:
    """Refuse a drafter that is no MTP layer of the model's family; both may be on the meta device.
    Set the model's config keys.

    Raises:
        DrafterError: there is no drafter, it is of another kind or has several modules, or
        transformers has no such layer for the model. The message says which.
    """
    if not isinstance(drafter, SequentialModules):
        kind = (
            "no drafter"
            if drafter is None
            else f"{type(drafter).__name__}, which is not decoder layers one after another"
        )
        raise DrafterError(
            f"to=mtp writes what drafter=mtp_sequential and mtp_shared train; this run has {kind}."
            f" {_INSTEAD}"
        )
    if len(drafter.depths) > 1:
        raise DrafterError(
            f"to=mtp writes one module, and this drafter has {len(drafter.depths)}: transformers'"
            " further layers read normed states, which these were not trained on. Train"
            f" drafter=mtp_shared or drafter.offsets=1. {_INSTEAD}"
        )
    config, name = model.config.get_text_config(), type(model).__name__
    if config.model_type not in FAMILIES:
        raise DrafterError(
            f"{name} ({config.model_type}) has no MTP layers in transformers; to=mtp supports the"
            f" families {', '.join(FAMILIES)}. {_INSTEAD}"
        )
    if getattr(config, "tie_last_hidden_states", True) is False:
        raise DrafterError(
            f"{name}'s config has tie_last_hidden_states=false, and MTP layers read other states"
            f" then. {_INSTEAD}"
        )
    configure(config)
    _check_names(model, config)
    _check_shapes(drafter, model)


def _check_names(model: Any, config: Any) -> None:
    """Refuse a model whose MTP weights transformers looks for under other names."""
    layout = FAMILIES[config.model_type][0]
    pattern = MtpModel.get_mtp_weights_regex
    try:
        match = pattern(model).search(
            f"model.layers.{config.num_hidden_layers}.x" if layout == "layers" else "mtp.x"
        )
    except ValueError:
        match = None
    if match is None:
        known = ", ".join(
            sorted(str(name) for name in model._keys_to_ignore_on_load_unexpected or [])
        )
        raise DrafterError(
            f"transformers looks for {type(model).__name__}'s MTP weights under {known} only, and"
            f" this model has {config.num_hidden_layers} layers. {_INSTEAD}"
        )


def _check_shapes(drafter: Drafter, model: Any) -> None:
    with torch.device("meta"):
        expected = {
            key: tensor.shape
            for key, tensor in MtpModel(model, 1).state_dict().items()
            if key.startswith("layers.")
        }
    if expected != {key: tensor.shape for key, tensor in drafter.state_dict().items()}:
        raise DrafterError(
            f"{type(model).__name__}'s last layer, which the drafter copies, has other tensors than"
            f" its MTP layers. {_INSTEAD}"
        )


def configure(config: Any) -> None:
    """Set the keys of a text config for one MTP layer, of the kind of the last layer."""
    config.num_mtp_layers = 1
    if other := FAMILIES[config.model_type][1]:
        setattr(config, other, 1)
    for kinds in ("layer_types", "mlp_layer_types"):
        if values := getattr(config, kinds, None):
            setattr(config, f"mtp_{kinds}", [values[-1]])


def tensors(drafter: SequentialModules, model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the drafter's tensors as the family's files name them, with one entry per expert.
    Parameters are in `dtype`; buffers keep theirs. For the names `layers`, embedding and head are
    included, as in DeepSeek-V3's and GLM-4.5's own files: some servers read them from nowhere
    else."""
    config = model.config.get_text_config()
    layout, number = FAMILIES[config.model_type][0], config.num_hidden_layers
    module: Any = drafter.depths[0]
    cast = {name for name, _ in module.named_parameters()}
    block, others = {}, {}
    for name, tensor in module.state_dict().items():
        part, _, rest = name.partition(".")
        tensor = tensor.detach().to("cpu", dtype if name in cast else tensor.dtype)
        if part == "mtp_block":
            block[f"model.layers.{number}.{rest}"] = tensor
        else:
            others[f"{_NAMES[layout][part]}.{rest}"] = tensor
    # Written as a further layer of the model, so that it is renamed and split like the model's own
    # layers.
    written = {
        (
            re.sub(rf"^.*?layers\.{number}\.", "mtp.layers.0.", name) if layout == "mtp" else name
        ): tensor
        for name, tensor in revert_weight_conversion(model, block).items()
    }
    prefix = "mtp." if layout == "mtp" else f"model.layers.{number}."
    if layout == "layers":
        others["embed_tokens.weight"] = (
            model.get_input_embeddings().weight.detach().to("cpu", dtype)
        )
        others["shared_head.head.weight"] = (
            model.get_output_embeddings().weight.detach().to("cpu", dtype)
        )
    return written | {prefix + name: tensor for name, tensor in others.items()}


def left_out(folder: Path, layers: int, export: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, config keys) of the MTP layers in a model's folder that an export of it
    lacks: tensors after layer `layers - 1` or under mtp, unchanged, and the keys of the text config
    about them. Both are empty if the folder has none, or no safetensors."""
    exported = _files(export)
    names = {
        name: file
        for name, file in _files(folder).items()
        if is_mtp(name, layers) and name not in exported
    }
    extra: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        with safe_open(folder / file, "pt") as stream:
            extra |= {
                name: stream.get_tensor(name) for name, source in names.items() if source == file
            }
    config = json.loads((folder / "config.json").read_text("utf-8")) if extra else {}
    config = config.get("text_config") or config
    return extra, {key: value for key, value in config.items() if re.search("mtp|nextn", key)}


def append(folder: Path, extra: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Add tensors, in another shard, and config keys to a folder that transformers has saved."""
    index, single = folder / _INDEX, folder / "model.safetensors"
    shard = "model-mtp.safetensors"
    if index.exists():
        content = json.loads(index.read_text("utf-8"))
    else:
        # transformers would read a file of the plain name instead of the index.
        first, shard = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
        with single.open("rb") as stream:
            header = 8 + int.from_bytes(stream.read(8), "little")
        content = {
            "metadata": {"total_size": single.stat().st_size - header},
            "weight_map": dict.fromkeys(_files(folder), first),
        }
        single.rename(folder / first)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in extra.items()},
        folder / shard,
        {"format": "pt"},
    )
    content["weight_map"] |= dict.fromkeys(extra, shard)
    content["metadata"]["total_size"] += sum(tensor.nbytes for tensor in extra.values())
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    file = folder / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text("utf-8")) | settings, indent=2, sort_keys=True) + "\n",
        "utf-8",
    )


@torch.no_grad()
def transformers_logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits (B, T - 1, V) of x_{t+2} at each t, from the MTP layer of a model that was
    loaded from its folder, as transformers runs it."""
    layer = MtpModel.from_pretrained(model)
    states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
    positions = torch.arange(1, ids.shape[1], device=ids.device).expand(len(ids), -1)
    cache = MtpCache(config=model.config.get_mtp_config())
    read = layer.eval().forward_layer(0, states[:, :-1], positions, cache, input_ids=ids[:, 1:])
    return layer._project_to_logits(read)


@torch.no_grad()
def own_logits(drafter: Drafter, model: Any, ids: Tensor) -> Tensor:
    """Return the logits (B, T - 1, V) of `transformers_logits`, from the drafter on its target."""
    target = Target(model)
    hidden = target.decoder(input_ids=ids, use_cache=False).last_hidden_state
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    output = TargetOutput(hidden, ids, ids, positions, hidden[:, :0])
    read = next(iter(drafter.states(output, target)))[:, :-1]
    return target.head(read.flatten(0, 1)).unflatten(0, read.shape[:2])


def is_mtp(name: str, layers: int) -> bool:
    numbered = re.match(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.", name)
    return (
        int(numbered.group(1)) >= layers
        if numbered
        else bool(re.search(r"(^|\.)mtp(_\w+)?\.", name))
    )


def _files(folder: Path) -> dict[str, str]:
    """Return the safetensors file of each tensor of a folder."""
    if (folder / _INDEX).exists():
        return json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"]
    if not (folder / "model.safetensors").exists():
        return {}
    with safe_open(folder / "model.safetensors", "pt") as stream:
        return dict.fromkeys(stream.keys(), "model.safetensors")
