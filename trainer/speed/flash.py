"""transformers' flash attention for packed rows: when it is used, and what keeps the rows of
several sequences apart in it.

The other implementations of attention get a mask, which is made from position_ids. Flash attention
gets the bounds of the rows instead, and transformers reads these from position_ids only in a batch
of one sequence. In a larger batch each row would see the rows before it in its sequence.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.utils import is_flash_attn_2_available

FLASH = "flash_attention_2"
NAMES = (FLASH, "flash_attention_3", "flash_attention_4")
WIDEST = 256  # numbers in a head, at most: a limit of its kernels


def use_flash(model: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Make `model` compute attention by flash-attn, whose time for packed rows grows with the
    length of the rows and not of their sequence. Return False, and change nothing, if the package
    is not installed or does not support this model's class, head size, dtype or GPU."""
    if device.type != "cuda":
        return False
    if (
        dtype not in (torch.bfloat16, torch.float16)
        or not getattr(model, "_supports_flash_attn", False)
        or head_width(model) > WIDEST
        or not is_flash_attn_2_available()
        or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return False
    isolate_packed_rows()
    model.set_attn_implementation(FLASH)  # type: ignore[operator]
    return True


def head_width(model: nn.Module) -> int:
    """Return the width of the widest attention head. Gemma 4's layers differ in theirs."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "head_dim")]
    widths = [module.head_dim for module in modules]
    return max(widths) if widths else config.hidden_size // config.num_attention_heads


def isolate_packed_rows() -> None:
    """Make transformers' flash attention keep packed rows apart in batches of any size, for all
    models of this process."""
    # Imported here: it takes a second or two, and describing a base should not.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in NAMES:
        attend = ALL_ATTENTION_FUNCTIONS.get(name)
        if attend is not None and not hasattr(attend, "isolates_packed_rows"):
            ALL_ATTENTION_FUNCTIONS.register(name, _with_row_bounds(attend))


def _with_row_bounds(attend: Callable[..., Any]) -> Callable[..., Any]:
    def attend_within_rows(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> Any:
        batch, length = query.shape[0], query.shape[2]
        positions: Tensor | None = options.get("position_ids")
        has_bounds = attention_mask is not None or "cu_seq_lens_q" in options
        # transformers would compute those of one sequence in each layer, if they are not known.
        several = batch > 1 or (positions is not None and _last[0]() is positions)
        whole = several and length > 1 and key.shape[2] == length
        if (
            whole
            and not has_bounds
            and positions is not None
            and positions.shape == (batch, length)
        ):
            options |= rows_of_pass(positions)
        return attend(module, query, key, value, attention_mask, **options)

    attend_within_rows.isolates_packed_rows = True  # type: ignore[attr-defined]
    return attend_within_rows


# (weak reference to position_ids, their bounds) of the last forward pass
_last: tuple[Any, dict[str, Any]] = (lambda: None, {})


@torch.compiler.disable
def rows_of_pass(positions: Int[Tensor, "B T"]) -> dict[str, Any]:
    """Return `rows_of` the position_ids of a forward pass. All its layers get the same tensor, so
    the bounds are computed once."""
    global _last
    if _last[0]() is not positions:
        _last = weakref.ref(positions), rows_of(positions)
    return _last[1]


def remember(positions: Int[Tensor, "B T"], bounds: Int[Tensor, " n"], longest: int) -> None:
    """Note the bounds (rows + 1,) int32 of the rows in a batch's position_ids, and the length of
    the longest, so that `rows_of_pass` does not compute them."""
    global _last
    _last = weakref.ref(positions), _options(bounds, longest)


def rows_of(positions: Int[Tensor, "B T"]) -> dict[str, Any]:
    """Return where rows begin and end in a batch, in the form that transformers passes to flash
    attention.

    The sequences are taken one after another. A row ends at the end of its sequence, or where
    `positions` is not the previous value plus one. Returns cu_seq_lens_q and cu_seq_lens_k,
    (rows + 1,) int32 from 0 to B T, and the longest row's length as max_length_q and max_length_k.
    """
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    bounds = torch.cat(
        [begins.flatten().nonzero()[:, 0], begins.new_tensor([begins.numel()], dtype=torch.int64)]
    )
    return _options(bounds.to(torch.int32), int(bounds.diff().max()))


def _options(bounds: Int[Tensor, " n"], longest: int) -> dict[str, Any]:
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
