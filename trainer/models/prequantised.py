"""Models whose files are quantised already: GPTQ, AWQ, bitsandbytes, FP8, MXFP4 and others."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch

INSTEAD = "Give the unquantised model; base.quantization=nf4 then makes 4 bits of it"


def fault(config: Any) -> str | None:
    """Return why a model with this config cannot be loaded here or cannot be trained, with the
    method and the package that it needs; None for all others."""
    from transformers.quantizers import AutoHfQuantizer

    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    plain = settings if isinstance(settings, dict) else settings.to_dict()
    method = getattr(plain.get("quant_method"), "value", plain.get("quant_method"))
    if method is None and (plain.get("load_in_4bit") or plain.get("load_in_8bit")):
        method = "bitsandbytes"
    try:
        chosen = dequantising(config) or copy.deepcopy(settings)
        quantiser = AutoHfQuantizer.from_config(chosen, pre_quantized=True)
        quantiser.validate_environment(device_map={"": "cpu"})
        trainable = hasattr(chosen, "dequantize") or bool(quantiser.is_trainable)
    except Exception as error:  # ImportError, or ValueError of an unknown method or a device
        first = str(error).partition("\n")[0].rstrip(".")
        return f"is quantised by {method}, which cannot be loaded here: {first}. {INSTEAD}"
    if trainable:
        return None
    return f"is quantised by {method}, through which transformers computes no gradient. {INSTEAD}"


def int8_fault() -> str | None:
    """Return why 8-bit products give wrong numbers on this CPU, None if they do not. oneDNN adds
    pairs of them in 16 bits where ONEDNN_MAX_CPU_ISA hides VNNI, and torch does not notice.
    bitsandbytes takes torch's 8-bit products with AVX-512 alone."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    ones = torch.full((32, 64), 127, dtype=torch.int8)
    if bool((torch._int_mm(ones, ones.t()) == 64 * 127**2).all()):
        return None
    return (
        "base.quantization=int8: 8-bit products overflow on this CPU with ONEDNN_MAX_CPU_ISA="
        f"{os.environ.get('ONEDNN_MAX_CPU_ISA')}. Unset it, or set base.quantization=nf4"
    )


def plain_weights(model: Any) -> str | None:
    """Return what is wrong with a loaded model whose config says 4 bits while a weight in its files
    is plain, so that no layer of bitsandbytes can compute with it; None for all others."""
    for name, module in model.named_modules():
        owners: tuple[Any, ...] = (module, getattr(module, "weight", None))
        packed = any(getattr(owner, "quant_state", None) is not None for owner in owners)
        if type(module).__name__ == "Linear4bit" and not packed:
            return (
                "has a quantization_config of 4 bits in its config.json, and plain weights in its"
                f" files, such as {name}: remove the one, or give the quantised files"
            )
    return None


def sharding_fault(config: Any) -> str | None:
    """Return why FSDP2 cannot shard a model with this config; None if it can. It shards plain
    weights, and the 4-bit ones of bitsandbytes (adapters.packed)."""
    settings = getattr(config, "quantization_config", None)
    if settings is None or dequantising(config) is not None:
        return None
    plain = settings if isinstance(settings, dict) else settings.to_dict()
    if plain.get("load_in_4bit"):
        return None
    method = getattr(plain.get("quant_method"), "value", plain.get("quant_method"))
    return (
        f"is quantised by {method}, and lightning.strategy=fsdp2 shards plain weights and 4-bit"
        " ones of bitsandbytes only: set lightning.strategy=ddp, or give the unquantised model with"
        " base.quantization=nf4"
    )


def dequantising(config: Any) -> Any:
    """Return the quantisation config with which transformers dequantises a model as it loads it
    (MXFP4, FP8), since their kernels compute no gradients; None for other models."""
    from transformers.quantizers import AutoQuantizationConfig

    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    try:
        chosen = AutoQuantizationConfig.from_dict(
            settings if isinstance(settings, dict) else settings.to_dict()
        )
    except (ValueError, ImportError):
        return None
    if not hasattr(chosen, "dequantize"):
        return None
    chosen.dequantize = True
    return chosen
