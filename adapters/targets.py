"""The linear layers of a model that an adapter is attached to, by its settings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from adapters.errors import AdapterError
from adapters.linear import ends_with, is_linear, output_layer
from adapters.reached import trained_by_text

NamedLayers = list[tuple[str, nn.Module]]


def targets(
    model: nn.Module,
    entries: str | list[str],
    exclude: Iterable[str] = (),
    new_modules: Iterable[str] = (),
) -> NamedLayers:
    """Return the linear layers to adapt, by name.

    `entries` is `all-linear` (all layers that text goes through, but the output layer), a list of
    name endings, or a regular expression for whole names.

    Raises:
        AdapterError: an entry matches no linear layer. The message lists the layers of the model.
    """
    head = output_layer(model)
    untargeted = tuple(f"{name}." for name in new_modules) or ("\0",)  # \0 starts no name
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if is_linear(module) and not f"{name}.".startswith(untargeted)
    ]
    if entries == "all-linear":
        reached = trained_by_text(model)
        chosen = [(n, layer) for n, layer in linears if layer is not head and reached(n)]
    elif isinstance(entries, str):
        chosen = _matching(entries, linears)
    else:
        _check_endings("target_modules", entries, linears)
        chosen = [layer for layer in linears if ends_with(layer[0], *entries)]
    exclude = list(exclude)
    _check_endings("exclude_modules", exclude, linears)
    chosen = [layer for layer in chosen if not ends_with(layer[0], *exclude)]
    if not chosen:
        raise AdapterError(
            f"adapter.target_modules={entries!r} without {exclude!r} leaves no linear layer."
            f" {_choices(linears)}"
        )
    return chosen


def _matching(pattern: str, linears: NamedLayers) -> NamedLayers:
    try:
        chosen = [layer for layer in linears if re.fullmatch(pattern, layer[0])]
    except re.error as error:
        raise AdapterError(
            f"adapter.target_modules={pattern!r} is no regular expression: {error}"
        ) from error
    if not chosen:
        raise AdapterError(
            f"adapter.target_modules={pattern!r} matches no linear layer. {_choices(linears)}"
        )
    return chosen


def _check_endings(setting: str, endings: Iterable[str], linears: NamedLayers) -> None:
    for ending in endings:
        if not any(ends_with(name, ending) for name, _ in linears):
            raise AdapterError(
                f"adapter.{setting} has {ending!r}, which matches no linear layer."
                f" {_choices(linears)}"
            )


def _choices(linears: NamedLayers) -> str:
    counts = Counter(name.rpartition(".")[2] for name, _ in linears)
    return "The model's linear layers: " + ", ".join(
        f"{name} ({count}x)" for name, count in counts.items()
    )
