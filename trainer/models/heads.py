"""The output head and the layers of any causal LM."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]  # (n, d) -> (n, V)


@contextlib.contextmanager
def captured_layers(decoder: nn.Module, layers: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """While open, the decoder keeps in ascending order of `layers` the states (B, T, d) that
    transformers calls hidden_states: i is what layer i is given, and L what the last one gives,
    before the final norm."""
    kept: list[Tensor] = []
    blocks: Any = decoder.layers if layers else ()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, __: Any, out: Any) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)

    handles = [
        (
            blocks[i].register_forward_pre_hook(before, with_kwargs=True)
            if i < len(blocks)
            else blocks[-1].register_forward_hook(after)
        )
        for i in sorted(layers)
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def captured_hidden(output_layer: nn.Module) -> Iterator[list[Tensor]]:
    """While open, the model's output layer keeps what it is given and computes no logits."""
    kept: list[Tensor] = []

    def keep(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        kept.append(hidden)
        return hidden[..., :0]

    # an adapter on this layer that is switched off has put one there
    before = vars(output_layer).get("forward")
    output_layer.forward = keep  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        if before is None:
            del output_layer.forward
        else:
            output_layer.forward = before  # type: ignore[method-assign]


def after_output(config: Any) -> Callable[[Tensor], Tensor]:
    """What follows a model's output layer, as far as its config says it: a scale, a soft cap, or
    nothing."""
    cap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1.0 / (
        getattr(config, "logits_scaling", None) or 1.0
    )

    def finish(logits: Tensor) -> Tensor:
        if factor != 1.0:
            logits = logits * factor
        return cap * torch.tanh(logits / cap) if cap else logits

    return finish


def output_head(model: nn.Module) -> Head | None:
    """From hidden states to logits as `model` does it: its output layer, then a scale or a soft cap
    where it has one.

    Models differ in what follows the output layer (Gemma caps, Granite divides, Cohere multiplies).
    So what the config says is tried on a few tokens against the model's own logits; None means that
    no known way reproduces them.
    """
    layer = model.get_output_embeddings()  # type: ignore[operator]
    finish = after_output(model.config.get_text_config())  # type: ignore[operator, union-attr]

    def scaled(hidden: Tensor) -> Tensor:
        return finish(layer(hidden))

    was_training, reproduced = model.training, False
    model.eval()
    probe = torch.arange(1, 7, device=next(model.parameters()).device).unsqueeze(0)
    with torch.no_grad():
        wanted = model(input_ids=probe, use_cache=False).logits[:, -4:].float()
        with captured_hidden(layer) as kept:
            try:
                model(input_ids=probe, use_cache=False)
            # what follows the output layer counts on the vocabulary's size
            except (RuntimeError, IndexError):
                kept.clear()
        if kept:
            found = scaled(kept[0][:, -4:]).float()
            tolerance = 3e-2 if kept[0].dtype in (torch.bfloat16, torch.float16) else 1e-4
            reproduced = torch.allclose(
                found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())
            )
    model.train(was_training)
    return scaled if reproduced else None
