"""A LoRA that acts on chosen rows of the target's own passes, and on nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adapters.errors import AdapterError
from adapters.lora import LoRA, scaling
from adapters.targets import targets
from trainer.drafters import DrafterError, Target
from trainer.drafters.passes import inner_model


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

    @contextlib.contextmanager
    def on(self, target: Target, rows: int, last: int) -> Iterator[None]:
        """While open, add the LoRA to the `last` of the `rows` positions of a pass.

        Raises:
            DrafterError: a layer was not called, or not with all rows.
        """
        model: Any = inner_model(target.model)
        called: set[str] = set()

        def hook_of(name: str, lora: Any) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
                called.add(name)
                x = args[0]
                if last == rows:
                    return lora(x, out)
                if x.shape[-2] != rows:
                    raise DrafterError(
                        f"{name} is given {x.shape[-2]} of {rows} positions, and the LoRA of a"
                        " drafter acts on some of them: name other layers in"
                        " drafter.target_modules"
                    )
                new = lora(x[..., -last:, :], out[..., -last:, :])
                return torch.cat([out[..., :-last, :], new], dim=-2)

            return hook

        handles = [
            model.get_submodule(name).register_forward_hook(hook_of(name, lora))
            for name, lora in zip(self.names, self.loras, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
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
