"""A LoRA that acts on chosen rows of the target's own passes, and on nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.errors import AdapterError
from adapters.lora import LoRA, scaling
from adapters.targets import targets
from trainer.drafters import DrafterError, Target
from trainer.drafters.passes import inner_model
from trainer.speed import few_rows

Cast = Sequence[tuple[Tensor, Tensor] | None]


class RowLoRA(nn.Module):
    """LoRA's A and B, in fp32, for linear layers of a target. They are added in `on` alone. An
    adapter of the target stays below them.

    Raises:
        DrafterError: `target_modules` matches no linear layer.
    """

    def __init__(self, model: Any, rank: int, alpha: float, target_modules: str | list[str]):
        super().__init__()
        try:
            linears = targets(model, target_modules)
        except AdapterError as error:
            raise DrafterError(str(error).replace("adapter.", "drafter.")) from None
        scale = scaling(rank, alpha, rslora=False)
        self.names = [name for name, _ in linears]
        self.loras = nn.ModuleList(
            LoRA(linear, rank, scale, 0.0, torch.float32) for _, linear in linears
        )

    @torch.no_grad()
    def cast(self, target: Target) -> Cast:
        """Return A and B of each layer as few_rows computes them, or None where it cannot: not in
        bf16, or not on a CPU. Decoding makes them once for a text, since casting takes as long as a
        pass does. Training changes A and B, which their versions may not show (fused AdamW)."""
        if few_rows.library() is None:
            return [None] * len(self.names)
        layers = self._layers(target)
        loras: list[Any] = list(self.loras)
        return [
            few_rows.low_rank(lora.A, lora.B, lora.scale) if few_rows.is_product(layer) else None
            for layer, lora in zip(layers, loras, strict=True)
        ]

    def _layers(self, target: Target) -> list[Any]:
        model: Any = inner_model(target.model)
        return [model.get_submodule(name) for name in self.names]

    @contextlib.contextmanager
    def on(self, target: Target, rows: int, last: int, cast: Cast | None = None) -> Iterator[None]:
        """While open, add the LoRA to the `last` of the `rows` positions of a pass, of which those
        before have none. `cast` has what `cast` returned, for passes without gradients.

        Raises:
            DrafterError: a layer was not called, or not with all rows.
        """
        layers, called = self._layers(target), set[str]()
        lows = [
            None if pair is None else few_rows.LowRank(*pair, rows, last)
            for pair in cast or [None] * len(layers)
        ]

        def hook_of(name: str, lora: Any, low: few_rows.LowRank | None) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
                called.add(name)
                x = args[0]
                if last != rows and x.shape[-2] != rows:
                    raise DrafterError(
                        f"{name} is given {x.shape[-2]} of {rows} positions, and the LoRA of a"
                        " drafter acts on some of them: name other layers in"
                        " drafter.target_modules"
                    )
                if low is not None and x.dtype == torch.bfloat16 and x.shape[-2] == rows:
                    return few_rows.corrected(x, out, low)
                if last == rows:
                    return lora(x, out)
                new = lora(x[..., -last:, :], out[..., -last:, :])
                return torch.cat([out[..., :-last, :], new], dim=-2)

            return hook

        handles = [
            layer.register_forward_hook(hook_of(name, lora, low))
            for layer, name, lora, low in zip(layers, self.names, self.loras, lows, strict=True)
        ]
        for layer, low in zip(layers, lows, strict=True):
            layer.low_rank = low  # for layers that are one call, whose hooks are not called
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in layers:
                del layer.low_rank
        called |= {name for name, low in zip(self.names, lows, strict=True) if low and low.used}
        if missed := [name for name in self.names if name not in called]:
            raise DrafterError(
                f"{len(missed)} of the {len(self.names)} layers of the drafter's LoRA are not"
                f" called in a pass over text, {missed[0]} first: name others in"
                " drafter.target_modules"
            )

    def tensors(self) -> dict[str, nn.Parameter]:
        """Return A (r, i) and B (o, r) of each layer by its name in the model."""
        pairs = zip(self.names, self.loras, strict=True)
        return {f"{name}.{key}": getattr(lora, key) for name, lora in pairs for key in ("A", "B")}
