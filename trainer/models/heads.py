"""The output head and the layers of any causal LM."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]  # (n, d) -> (n, V)
# the names of the soft cap on logits: Gemma's, Recurrent Gemma's, xLSTM's
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
CLASSIFIERS = ("classifier", "score")  # PEFT trains each module whose name ends in one of these


def fresh_modules(
    model: nn.Module, missing: Iterable[str] | None = None
) -> tuple[tuple[str, ...], list[str]]:
    """Return (the modules of a classifier that are trained as a whole, the `missing` tensors that
    belong to none of them).

    These are the modules outside the body and the pooler in it, as far as tensors of theirs are
    `missing` in the files, and the classifier itself. Without `missing`, as on a model without
    weights, they are all modules outside the body.
    """
    body = model.base_model_prefix
    names: set[str] = set()
    foreign = []
    for key in sorted(missing or ()):
        parts = key.split(".")
        if parts[0] != body:
            names.add(parts[0])
        elif "pooler" in parts[:-1]:
            names.add(".".join(parts[: parts.index("pooler") + 1]))
        else:
            foreign.append(key)
    for name, child in model.named_children():
        trained = missing is None or name.endswith(CLASSIFIERS)
        if name != body and trained and next(child.parameters(), None) is not None:
            names.add(name)
    return tuple(sorted(names)), foreign


def first_positions(model: nn.Module) -> int:
    """Return how many entries at the start of the position embeddings no token ever gets: those up
    to the padding token's, in models that count positions from there."""
    return max(
        (
            module.padding_idx + 1
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding)
            and module.padding_idx is not None
            and name.endswith("position_embeddings")
        ),
        default=0,
    )


def probe(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return inputs for a forward pass over some tokens (B, T): an encoder-decoder that writes text
    gets them on both sides."""
    pairs = model.config.is_encoder_decoder and model.get_output_embeddings() is not None
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if pairs else {})


def decoder_of(model: Any) -> Any:
    """Return the decoder of a causal LM, without its output head."""
    decoder = model.get_decoder()
    # Llama 4's returns itself, with its head.
    while hasattr(decoder, "lm_head") and isinstance(getattr(decoder, "model", None), nn.Module):
        decoder = decoder.model
    return decoder


@contextlib.contextmanager
def captured_layers(decoder: nn.Module, layers: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """While open, collect states (B, T, d) of the decoder, in ascending order of `layers`. They are
    numbered as transformers' hidden_states: i is the input of layer i, and the number of layers is
    the output of the last layer, before the final norm."""
    states: list[Tensor] = []
    blocks: Any = decoder.layers if layers else ()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, __: Any, out: Any) -> None:
        states.append(out[0] if isinstance(out, tuple) else out)

    handles = [
        (
            blocks[i].register_forward_pre_hook(before, with_kwargs=True)
            if i < len(blocks)
            else blocks[-1].register_forward_hook(after)
        )
        for i in sorted(layers)
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def captured_hidden(output_layer: nn.Module) -> Iterator[list[Tensor]]:
    """While open, collect the inputs of the model's output layer, which computes no logits."""
    inputs: list[Tensor] = []

    def capture(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        inputs.append(hidden)
        return hidden[..., :0]

    # An adapter on this layer that is switched off has set a forward on the instance.
    previous = vars(output_layer).get("forward")
    output_layer.forward = capture  # type: ignore[method-assign]
    try:
        yield inputs
    finally:
        if previous is None:
            del output_layer.forward
        else:
            output_layer.forward = previous  # type: ignore[method-assign]


def after_output(config: Any) -> Callable[[Tensor], Tensor]:
    """Return the function that follows a model's output layer, as its config says: a scale, a
    soft cap, or neither."""
    cap = next((value for name in CAPS if (value := getattr(config, name, None))), None)
    factor = getattr(config, "logit_scale", None) or 1.0 / (
        getattr(config, "logits_scaling", None) or 1.0
    )

    def finish(logits: Tensor) -> Tensor:
        if factor != 1.0:
            logits = logits * factor
        return cap * torch.tanh(logits / cap) if cap else logits

    return finish


def output_head(model: nn.Module) -> Head | None:
    """Return the function from hidden states to logits: the output layer of `model`, then a scale
    or a soft cap if it has one. Return None if that does not give the model's own logits.

    Models differ in what follows the output layer (Gemma caps, Granite divides, Cohere multiplies),
    so the function is compared with the model's own logits on a few tokens.
    """
    layer = model.get_output_embeddings()  # type: ignore[operator]
    finish = after_output(model.config.get_text_config())  # type: ignore[operator, union-attr]

    def scaled(hidden: Tensor) -> Tensor:
        return finish(layer(hidden))

    was_training, reproduced = model.training, False
    model.eval()
    ids = torch.arange(1, 7, device=next(model.parameters()).device).unsqueeze(0)
    inputs = probe(model, ids)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits[:, -4:].float()
        with captured_hidden(layer) as hidden:
            try:
                model(**inputs, use_cache=False)
            # A model may compute with the vocabulary's size after its output layer.
            except (RuntimeError, IndexError):
                hidden.clear()
        if hidden:
            logits = scaled(hidden[0][:, -4:]).float()
            tolerance = 3e-2 if hidden[0].dtype in (torch.bfloat16, torch.float16) else 1e-4
            reproduced = torch.allclose(
                logits, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
            )
    model.train(was_training)
    return scaled if reproduced else None
