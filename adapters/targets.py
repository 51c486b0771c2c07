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
    name endings, or a regular expression for whole names. `all-linear` leaves out layers that share
    one weight, as the blocks of Zamba 2 do, since one weight cannot hold two corrections.

    Raises:
        AdapterError: an entry matches no linear layer, or layers that share a weight. The message
            lists the layers of the model.
    """
    head = output_layer(model)
    untargeted = tuple(f"{name}." for name in new_modules) or ("\0",)  # \0 starts no name
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if is_linear(module) and not f"{name}.".startswith(untargeted)
    ]
    shared = _sharing(linears)
    if entries == "all-linear":
        reached = trained_by_text(model)
        chosen = [
            (n, layer)
            for n, layer in linears
            if layer is not head and n not in shared and reached(n)
        ]
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
    if named := next((name for name, _ in chosen if name in shared), None):
        raise AdapterError(
            f"adapter.target_modules={entries!r} has {named}, which has one weight together with"
            f" {shared[named]}, and an adapter would be two corrections of it: leave such layers"
            " out by exclude_modules, or use all-linear"
        )
    return chosen


def _sharing(linears: NamedLayers) -> dict[str, str]:
    """Return the layers whose weight is that of another one too, each with the other's name."""
    by_weight: dict[int, list[str]] = {}
    for name, layer in linears:
        by_weight.setdefault(id(layer.weight), []).append(name)
    groups = [names for names in by_weight.values() if len(names) > 1]
    return {name: names[-1] if name == names[0] else names[0] for names in groups for name in names}


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
