"""Merged models as one GGUF file for llama.cpp and Ollama, loaded back by transformers.

Names are those of the package gguf. llama.cpp stores some tensors differently: rows of q and k of
the architecture llama are in pairs and not in halves, and Gemma's norms are stored plus one.
Tensors of one dimension stay in F32, as in its own converter.
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from adapters.delta import AdapterError
from trainer.assembly.trained import Trained
from trainer.exporting import gguf_vocabulary
from trainer.exporting.compare import Mismatch, distance, outputs
from trainer.exporting.merged import cast_parameters
from trainer.exporting.serving import Serving
from trainer.models.base import PROBE
from trainer.models.gguf import without_bar
from trainer.storage import atomic

log = logging.getLogger("trainer")

FILE = "model.gguf"
EXACT = 1e-5  # of the logits' spread: the file holds the rounded weights, whose sums are the same
TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
TEXTS = (PROBE, "Größe, 日本 🙂 don't\n\tx  y")
BLOCK = 32  # numbers that share a scale in Q8_0


@dataclass(frozen=True)
class Family:
    """The form in which llama.cpp keeps the models of one type of transformers."""

    architecture: gguf.MODEL_ARCH
    paired: bool = False  # rows of q and k in pairs
    offset: bool = False  # norms plus one


FAMILIES = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, paired=True),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, paired=True),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3),
    "gemma2": Family(gguf.MODEL_ARCH.GEMMA2, offset=True),
    "gemma3_text": Family(gguf.MODEL_ARCH.GEMMA3, offset=True),
    "phi3": Family(gguf.MODEL_ARCH.PHI3),
}
# every which layer looks at all tokens, and the layers of the largest size, whose scale is another
# one (llama.cpp, load_arch_hparams)
GEMMA = {"gemma2": (2, 46), "gemma3_text": (6, 62)}


def family_of(config: Any) -> Family:
    """Return how a model is written.

    Raises:
        AdapterError: llama.cpp's format of this model is not known here.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise AdapterError(
            f"to=gguf does not know models of the type {config.model_type}, only"
            f" {', '.join(FAMILIES)}. Use to=merged, and llama.cpp's convert_hf_to_gguf.py on its"
            " folder"
        )
    if (fault := _unlike(config)) is not None:
        raise AdapterError(f"to=gguf: {fault}. Use to=merged and convert_hf_to_gguf.py")
    return family


def _unlike(config: Any) -> str | None:
    """Return what llama.cpp computes differently for this config, None if nothing."""
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", "llama3", "linear", "longrope"):
        return f"the rotary scaling {kind!r} is not written here"
    if kind == "llama3" and config.model_type not in ("llama", "mistral"):
        return f"llama.cpp has no rotary scaling {kind!r} for {config.model_type}"
    if config.model_type in GEMMA:
        return _unlike_gemma(config)
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        return f"llama.cpp ignores sliding_window={window} of {config.model_type}"
    return None


def _unlike_gemma(config: Any) -> str | None:
    """Return the same for a Gemma, whose layers and scale llama.cpp derives from type and size."""
    every, largest = GEMMA[config.model_type]
    pattern = [kind == "full_attention" for kind in config.layer_types]
    if pattern != [(at + 1) % every == 0 for at in range(len(pattern))]:
        return f"llama.cpp has every layer {every} of this model look at all tokens, and no other"
    local = (config.rope_parameters or {}).get("sliding_attention", {})
    if local.get("rope_theta", 10000.0) != 10000.0:
        return f"llama.cpp has 10000 as the rotary base of short layers, not {local['rope_theta']}"
    scale = config.head_dim
    if config.num_hidden_layers == largest:
        scale = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != scale:
        return (
            f"llama.cpp divides attention by the root of {scale}, and query_pre_attn_scalar="
            f"{config.query_pre_attn_scalar}"
        )
    return None


def readable(config: Any) -> Any:
    """Return the config with which transformers reads the file: a Mistral is a Llama there."""
    if config.model_type != "mistral":
        return copy.deepcopy(config)
    values = config.to_dict()
    for name in ("model_type", "architectures", "sliding_window", "layer_types"):
        values.pop(name, None)
    return LlamaConfig(**values)


def _rope(config: Any) -> dict[str, Any]:
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention", parameters)


@torch.no_grad()
def write_gguf(run: Trained, folder: Path, dtype: str) -> float:
    """Write the merged model with its tokenizer and chat template, load it back by transformers,
    and compare. Return the distance of the logits from those of the run's own model.

    Raises:
        AdapterError: the model or its tokenizer has no format here.
        Mismatch: the loaded model differs from the merged one with rounded weights.
    """
    if run.task.kind == "label":
        raise AdapterError("to=gguf is for models that write text: use to=merged")
    config: Any = run.model.config
    family = family_of(config)
    vocabulary = gguf_vocabulary.of(run.base.load_tokenizer(), config.vocab_size)
    expected = outputs(run.model, run)[-1]
    merged: Any = run.adapter.merge(run.model)
    cast_parameters(merged, torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    _write(file, merged, family, dtype, vocabulary, Serving.of(run))
    rounded = round_weights(merged, dtype)
    reference = outputs(rounded, run)[-1]
    without_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32, config=readable(run.model.config)
    ).eval()
    difference = distance(reference, outputs(loaded, run)[-1])
    if not difference <= EXACT:
        raise Mismatch(
            f"{FILE}, loaded back by transformers, differs from the merged model with the same"
            f" rounding by {difference:.3g} of the logits' spread (at most {EXACT:g})"
        )
    if vocabulary.merges:  # without them transformers builds no sentencepiece tokenizer
        _compare_tokens(run, folder)
    if dtype != "float32":
        agreement = float((expected.argmax(-1) == reference.argmax(-1)).float().mean())
        log.warning(
            "rounded to %s, the most likely token stays the same at %.1f %% of positions",
            dtype,
            100 * agreement,
        )
    write_modelfile(folder, f"FROM ./{FILE}", Serving.of(run))
    return distance(expected, reference)


def _compare_tokens(run: Trained, folder: Path) -> None:
    """Read the tokenizer of the file by transformers, and compare ids.

    Raises:
        Mismatch: a text has other ids.
    """
    own = run.base.load_tokenizer()
    loaded: Any = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    for text in TEXTS:
        expected, ids = (t(text, add_special_tokens=False)["input_ids"] for t in (own, loaded))
        if expected != ids:
            raise Mismatch(
                f"{FILE}: the tokenizer, loaded back, reads {text!r} as {ids}, the run's"
                f" as {expected}"
            )


def write_modelfile(folder: Path, first: str, serving: Serving) -> None:
    """Write an Ollama Modelfile. The template is in the GGUF file; what ends an answer is here."""
    tokenizer = serving.base.tokenizer
    stops = [tokenizer.convert_ids_to_tokens(token) for token in serving.ends]
    lines = [first, *(f"PARAMETER stop {quoted(stop)}" for stop in stops)]
    atomic.write_text(folder / "Modelfile", "\n".join(lines) + "\n")


def quoted(text: str) -> str:
    """A text as a Modelfile takes it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _write(
    file: Path, model: Any, family: Family, dtype: str, vocabulary: Any, serving: Serving
) -> None:
    config = model.config
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[family.architecture])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("Graft")  # a name with "mistral" in it changes how transformers reads it
    writer.add_file_type(TYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, config)
    add_rope(writer, config)
    template: Any = None
    if serving.renderer.kind == "conversation":
        template = serving.chat_template(serving.base.load_tokenizer())
        if isinstance(template, dict):
            template = template.get("default")
    vocabulary.add(writer, serving.ends, template)
    for name, tensor in tensors(model, family):
        array, kind = encoded(tensor, dtype)
        writer.add_tensor(name, array, raw_dtype=kind)
    for name, array in rope_tensors(config).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """Add the sizes of a model to its file."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    partial = _rope(config).get("partial_rotary_factor") or 1.0
    writer.add_rope_dimension_count(int(width * partial))
    window = getattr(config, "sliding_window", None)
    if window and config.model_type in GEMMA:
        writer.add_sliding_window(window)
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        writer.add_attn_logit_softcapping(cap)
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(cap)


def add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    """Add the rotary base and scaling to a model's file."""
    rope = _rope(config)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "longrope":
        original = rope["original_max_position_embeddings"]
        scale = config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(factor)


def rope_tensors(config: Any) -> dict[str, np.ndarray]:
    """Return the divisors of rotary frequencies that llama.cpp reads as tensors: of Llama 3's
    scaling, as transformers' `_compute_llama3_parameters`, and of Phi's long and short contexts."""
    rope = _rope(config)
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32)
            for name in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float64) / width)
    lengths = 2 * math.pi / plain
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((original / lengths - low) / (high - low), 0.0, 1.0)
    divisors = 1.0 / ((1 - share) / rope["factor"] + share)
    return {"rope_freqs.weight": divisors.astype(np.float32)}


def tensors(model: Any, family: Family) -> list[tuple[str, Tensor]]:
    """Return the parameters of a model in llama.cpp's names, rows and offsets. A tied output layer
    is left out: its absence says that it is tied."""
    config = model.config
    names = gguf.get_tensor_name_map(family.architecture, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    renamed = []
    for name, parameter in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise AdapterError(f"to=gguf has no name for {name} of {type(model).__name__}")
        renamed.append((new, laid_out(name, parameter.detach(), config, family)))
    return renamed


def laid_out(name: str, tensor: Tensor, config: Any, family: Family) -> Tensor:
    """Return a parameter as llama.cpp keeps it."""
    if family.offset and name.endswith("norm.weight"):
        return tensor + 1
    if family.paired and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        return paired(tensor, heads)
    return tensor


def paired(tensor: Tensor, heads: int) -> Tensor:
    """Move the rows of each head from two halves to pairs."""
    rows = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def unpaired(tensor: Tensor, heads: int) -> Tensor:
    """Move the rows of each head from pairs to two halves."""
    rows = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def _kind(shape: torch.Size, dtype: str) -> gguf.GGMLQuantizationType:
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    if dtype == "q8_0" and shape[-1] % BLOCK:
        return gguf.GGMLQuantizationType.F16
    return TYPES[dtype][0]


def encoded(tensor: Tensor, dtype: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Return a tensor as a file holds it, and its type."""
    kind = _kind(tensor.shape, dtype)
    array = np.ascontiguousarray(tensor.float().cpu().numpy())
    return gguf.quants.quantize(array, kind), kind


def round_weights(model: nn.Module, dtype: str) -> nn.Module:
    """Round the parameters in place as the file does."""
    for parameter in model.parameters():
        array, kind = encoded(parameter.data, dtype)
        plain = gguf.quants.dequantize(array, kind)
        parameter.data = torch.from_numpy(np.ascontiguousarray(plain)).view_as(parameter.data)
    return model
