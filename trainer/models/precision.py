"""The dtypes that `precision` and `base.dtype` of a config stand for on a machine."""

from __future__ import annotations

import torch


def compute(
    precision: str, base_dtype: str, trains_base: bool, cuda: bool
) -> tuple[torch.dtype, str, str]:
    """Return the base's dtype, Lightning's precision, and the precision that `auto` stands for.

    Trained weights stay in fp32 (an adapter's own dtype), so bf16-true needs no autocast of
    Lightning: the frozen base computes in bf16, and no time is lost. Only full fine-tuning with
    bf16-true trains bf16 weights.
    """
    if precision == "auto":
        precision = (
            "bf16-true"
            if bf16_is_fast(cuda) and not trains_base
            else "bf16-mixed"
            if cuda and trains_base
            else "fp32"
        )
    low = {
        "fp32": torch.float32,
        "bf16-true": torch.bfloat16,
        "bf16-mixed": torch.bfloat16,
        "16-mixed": torch.float16,
    }[precision]
    if precision.endswith("-mixed") and trains_base:
        low = torch.float32
    dtype = low if base_dtype == "auto" else getattr(torch, base_dtype)
    return dtype, precision if precision.endswith("-mixed") else "32-true", precision


def bf16_is_fast(cuda: bool) -> bool:
    """Return whether the hardware supports bf16 products. Without such support they are slower
    than fp32."""
    if cuda:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
