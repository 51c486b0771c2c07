"""EAGLE-3, DSpark and DFlash heads as GGUF files for llama.cpp, read back.

    eagle3   one Llama layer over [embedding, three states of the target]; q and k in pairs of rows
    dflash   Qwen3 layers over a block, with or without a Markov head; rows in halves

Names, keys and computation are those of llama.cpp's src/models/eagle3.cpp and dflash.cpp, of its
converters (conversion/llama.py, conversion/qwen.py) and of src/llama-arch.cpp, as of build 11434:
the package gguf has neither architecture. Its layers are counted by their inputs, as transformers'
hidden_states are and as `Drafter.layers`. The first versions have other names for two keys, so both
are written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from trainer.drafters import Drafter, DrafterError
from trainer.drafters.block import Block
from trainer.drafters.eagle3 import Eagle3
from trainer.drafters.families import FAMILIES
from trainer.exporting import block_layouts, draft_head, eagle_layouts, gguf_model, gguf_vocabulary
from trainer.exporting.draft_head import DraftHead
from trainer.exporting.serving import Serving

FILE = "draft.gguf"
STATES = 3  # of EAGLE-3, as llama.cpp demands
TARGETS = ("llama", "mistral", "qwen3")  # whose layers' inputs llama.cpp gives to a draft
ROPES = ("default", "llama3")
OTHERWISE = "to=sglang or to=speculators is for other engines, and to=drafter for Graft"
MTP = "An MTP layer is part of the model: to=mtp, and llama.cpp's convert_hf_to_gguf.py on it"
_NAMES = {
    "fc.weight": "fc.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "embed_tokens.weight": "token_embd.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    block_layouts.W1: "markov_w1.weight",
    block_layouts.W2: "markov_w2.weight",
    block_layouts.CONFIDENCE: "conf_proj.weight",
    block_layouts.BIAS: "conf_proj.bias",
}
_OF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "hidden_norm": "attn_norm_2",
    "post_attention_layernorm": "ffn_norm",
}


def check(drafter: Drafter, model: Any) -> None:
    """Refuse a drafter that llama.cpp has no format for. It may have weights or only shapes.

    Raises:
        DrafterError: the message says why, and which format fits.
    """
    if not isinstance(drafter, Block | Eagle3):
        raise DrafterError(
            "to=gguf_draft is a format of EAGLE-3, DSpark and DFlash, and this drafter is"
            f" {type(drafter).__name__}: to=drafter, or another format of its own. {MTP}"
        )
    if (reason := _unlike(drafter, model)) is not None:
        raise DrafterError(f"to=gguf_draft: {reason}. {OTHERWISE}")
    draft_head.check(drafter, "speculators", model)


def _unlike(drafter: Block | Eagle3, model: Any) -> str | None:
    config = model.config.get_text_config()
    if config.model_type not in TARGETS:
        return (
            f"llama.cpp is known to give the states of {', '.join(TARGETS)} to a draft, and this"
            f" target is {config.model_type}"
        )
    if config.num_hidden_layers in drafter.layers:
        return (
            f"the head reads the states {', '.join(map(str, drafter.layers))}, and llama.cpp keeps"
            " those before a layer, so none after the last: train with other drafter.aux_layers"
        )
    family = getattr(drafter, "family", None)
    layer = config if family is None else family.config
    rope = (layer.rope_parameters or {}).get("rope_type", "default")
    if rope not in ROPES:
        return f"the rotary scaling {rope!r} of the draft layer is not written here"
    if isinstance(drafter, Block):
        if drafter.vocabulary is None:
            return None
        return "its blocks draft the whole vocabulary: train with drafter.draft_vocab_size=null"
    if len(drafter.layers) != STATES:
        return f"the head reads {len(drafter.layers)} states, and llama.cpp's EAGLE-3 {STATES}"
    if FAMILIES.get(layer.model_type) != "llama":
        return "its draft layer norms q and k as Qwen3 does: train with drafter.layer=llama"
    if drafter.norm_output or getattr(drafter, "fc_norm", None) is not None:
        return "llama.cpp has no place for drafter.fc_norm and drafter.norm_output"
    return None


def write(head: DraftHead, folder: Path, dtype: str, serving: Serving) -> None:
    """Write the head with the target's tokenizer.

    Raises:
        AdapterError: llama.cpp has no rule for the tokenizer.
    """
    layer, block = head.layer, head.method == "block"
    vocabulary = gguf_vocabulary.of(serving.base.load_tokenizer(), layer["vocab_size"])
    arch = "dflash" if block else "eagle3"
    writer = gguf.GGUFWriter(str(folder / FILE), arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("Graft")
    writer.add_file_type(gguf_model.TYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    config = _config(layer)
    gguf_model.add_sizes(writer, config)
    gguf_model.add_rope(writer, config)
    vocabulary.add(writer, serving.ends, None)
    writer.add_array(f"{arch}.target_layers", list(head.layers))
    writer.add_uint32(f"{arch}.target_hidden_size", _states(head) // len(head.layers))
    if block:
        writer.add_uint32(f"{arch}.block_size", head.drafts)
        writer.add_bool(f"{arch}.sample_from_anchor", True)
        # Otherwise --spec-draft-p-min would silently change nothing.
        trained = block_layouts.CONFIDENCE in head.own
        writer.add_bool(f"{arch}.has_confidence_head", trained)
        writer.add_uint32(f"{arch}.mask_token_id", head.mask_token)  # of older versions
        writer.add_mask_token_id(head.mask_token)
    else:
        writer.add_array(f"{arch}.extract_layers", list(head.layers))  # of older versions
        writer.add_bool(f"{arch}.norm_before_residual", False)
    for name, tensor in _laid_out(head).items():
        array, kind = gguf_model.encoded(tensor, dtype)
        writer.add_tensor(name, array, raw_dtype=kind)
    if "d2t" in head.tensors:
        offsets = head.tensors["d2t"].numpy().astype(np.int64)
        ids = offsets + np.arange(len(offsets))
        writer.add_tensor("d2t", ids, raw_dtype=gguf.GGMLQuantizationType.I64)
    for name, array in gguf_model.rope_tensors(config).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _states(head: DraftHead) -> int:
    return head.tensors["fc.weight"].shape[1]


def _config(layer: dict[str, Any]) -> Any:
    return AutoConfig.for_model(**{k: v for k, v in layer.items() if k != "dtype"})


def _laid_out(head: DraftHead) -> dict[str, Tensor]:
    """Return the head's tensors in llama.cpp's names and rows, without its maps of tokens."""
    tensors = head.tensors
    if head.method == "block":
        tensors = tensors | block_layouts.fillers(head, "sglang")
    else:
        # the target's own embedding is shared
        tensors = {name: t for name, t in tensors.items() if name != "embed_tokens.weight"}
    result = {}
    for name, tensor in tensors.items():
        if name in ("d2t", "t2d"):
            continue
        result[_name(name)] = _rows(name, tensor.float(), head, gguf_model.paired)
    return result


def _name(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    if name in _NAMES:
        return _NAMES[name]
    _, number, part = name.split(".", 2)
    return f"blk.{number}.{_OF_LAYER[part.removesuffix('.weight')]}.weight"


def _rows(name: str, tensor: Tensor, head: DraftHead, move: Any) -> Tensor:
    """Move the rows of an EAGLE-3 layer's q and k."""
    kind = next((k for k in ("q", "k") if name.endswith(f"self_attn.{k}_proj.weight")), None)
    if head.method == "block" or kind is None:
        return tensor
    key = "num_attention_heads" if kind == "q" else "num_key_value_heads"
    moved: Tensor = move(tensor, head.layer[key])
    return moved


def read(head: DraftHead, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config, tensors) of the file, in the names of the other layouts. What the file does
    not have, as the target's name, is the head's.

    Raises:
        KeyError, ValueError: a key or a tensor is missing, or the file has one too many.
    """
    reader = gguf.GGUFReader(str(folder / FILE))
    stored = {tensor.name: _plain(tensor) for tensor in reader.tensors}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arch = fields["general.architecture"]
    names = {_name(name): name for name in _expected(head)}
    rope = gguf_model.rope_tensors(_config(head.layer))
    if missing := {*names, *rope} ^ {*stored}.difference({"d2t"}):
        raise ValueError(f"{FILE} lacks, or has one too many: {', '.join(sorted(missing))}")
    for name, array in rope.items():
        if not np.array_equal(stored.pop(name).numpy(), array):
            raise ValueError(f"{FILE}: {name} is not the draft layer's")
    tensors = {
        own: _rows(own, stored[name], head, gguf_model.unpaired) for name, own in names.items()
    }
    if "d2t" in head.tensors:
        tensors["d2t"] = stored["d2t"].long() - torch.arange(len(stored["d2t"]))
    layer = head.layer | {
        "hidden_size": fields[f"{arch}.embedding_length"],
        "intermediate_size": fields[f"{arch}.feed_forward_length"],
        "num_hidden_layers": fields[f"{arch}.block_count"],
        "num_attention_heads": fields[f"{arch}.attention.head_count"],
        "num_key_value_heads": fields[f"{arch}.attention.head_count_kv"],
        "head_dim": fields[f"{arch}.attention.key_length"],
        "rms_norm_eps": fields[f"{arch}.attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": fields[f"{arch}.context_length"],
        "vocab_size": fields[f"{arch}.vocab_size"],
    }
    layer["rope_parameters"] = head.layer["rope_parameters"] | {
        "rope_theta": fields[f"{arch}.rope.freq_base"]
    }
    layers = [int(i) for i in fields[f"{arch}.target_layers"]]
    if arch == "dflash":
        more = {
            "block_size": fields["dflash.block_size"],
            "mask_token_id": fields["tokenizer.ggml.mask_token_id"],
            "target_layer_ids": layers,
        }
    else:
        more = {
            "eagle_aux_hidden_state_layer_ids": layers,
            "fc_norm": False,
            "norm_output": False,
        }
    return layer | more, tensors


def _expected(head: DraftHead) -> list[str]:
    names = [name for name in head.tensors if name not in ("d2t", "t2d", "embed_tokens.weight")]
    return names + ([*block_layouts.fillers(head, "sglang")] if head.method == "block" else [])


def _plain(tensor: Any) -> Tensor:
    if tensor.tensor_type == gguf.GGMLQuantizationType.I64:
        return torch.from_numpy(tensor.data.copy())
    plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(plain)).float()


def logits(
    head: DraftHead, folder: Path, model: Any, states: Tensor, ids: Tensor, drafted: Tensor
) -> Tensor:
    """Compute from the file, in fp32, the logits after `ids` and after each drafted token. EAGLE-3
    takes the embedding of the target, as llama.cpp does."""
    config, tensors = read(head, folder)
    if head.method == "block":
        return block_layouts.logits(config, tensors, model, states, ids, drafted)
    return eagle_layouts.logits(config, tensors, model, states, ids, drafted)
