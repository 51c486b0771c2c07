"""Calibration rows through the decoder layers of a model, one layer after the other.

The states of all rows are held in memory, tokens x width numbers; a device holds one layer. Each
layer runs once while a method reads its inputs. If the method changes it, it runs again, so that
the next layer sees what the changed one gives. A row is a batch of its own: no padding is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainer.shrinking.resuming import Resumed
from trainer.storage.progress import Progress

States = list[Float[Tensor, "1 t d"]]


class Method:
    """The work on each layer of a walk.

    reads    whether layers run while `watch` is open; without it no row is needed
    changes  whether `change` changes the layer
    doing    the word for it in the log
    """

    reads = True
    changes = True
    doing = "shrink"

    def watch(self, layer: nn.Module) -> list[Any]:
        """Hook the modules whose inputs are read. Return the handles of the hooks."""
        return []

    def see(self, before: Float[Tensor, "1 t d"], after: Float[Tensor, "1 t d"]) -> None:
        """Look at a row before and after the layer."""

    def change(self, layer: nn.Module) -> dict[str, Any]:
        """Change the layer in place. Return its figures for the record."""
        return {}


@torch.no_grad()
def walk(
    model: Any,
    layers: nn.ModuleList,
    rows: list[Int[Tensor, " t"]],
    method: Method,
    device: torch.device,
    resumed: Resumed | None = None,
) -> list[dict[str, Any]]:
    """Apply a method to each layer in turn. Return the figures of the layers.

    A layer that `resumed` holds is loaded from there, and others are put there.
    """
    figures: list[dict[str, Any]] = []
    rows = rows if method.reads else []
    states, arguments = entry(model, layers, rows) if rows else ([], {})
    with Progress(method.doing, len(layers), "layers") as progress:
        for index, layer in enumerate(layers):
            layer.to(device)
            first = None
            earlier = resumed.load(index, layer) if resumed is not None else None
            new = earlier is None
            if earlier is None:
                earlier, states, first = _apply(method, layer, states, arguments, index, device)
            if method.changes and index + 1 < len(layers):
                states = [
                    run(layer, state, arguments[state.shape[1]][index], device) for state in states
                ]
                if first is not None:
                    earlier["moved"] = float((states[0] - first).norm() / first.norm())
            if new and resumed is not None and method.changes:
                resumed.save(index, layer, earlier)
            figures.append(earlier)
            layer.to("cpu")
            progress.advance(1)
    return figures


def _apply(
    method: Method,
    layer: nn.Module,
    states: States,
    arguments: dict[int, list[dict[str, Any]]],
    index: int,
    device: torch.device,
) -> tuple[dict[str, Any], States, Tensor | None]:
    """Run a layer and change it. Return its figures, the states that the next step starts from, and
    what the unchanged layer made of the first row."""
    handles, results, first = method.watch(layer), [], None
    try:
        for state in states:
            after = run(layer, state, arguments[state.shape[1]][index], device)
            method.see(state, after)
            first = after if first is None else first
            if not method.changes:
                results.append(after)
    finally:
        for handle in handles:
            handle.remove()
    return method.change(layer), results if not method.changes else states, first


def run(
    layer: nn.Module, state: Float[Tensor, "1 t d"], arguments: dict[str, Any], device: torch.device
) -> Float[Tensor, "1 t d"]:
    """Return what a layer makes of a row's states, on the CPU."""
    output = layer(_moved(state, device), **_moved(arguments, device))
    return (output[0] if isinstance(output, tuple) else output).cpu()


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


@torch.no_grad()
def entry(
    model: Any, layers: nn.ModuleList, rows: list[Int[Tensor, " t"]]
) -> tuple[States, dict[int, list[dict[str, Any]]]]:
    """Return the states that enter the first layer, and for each length of a row the arguments of
    every layer: masks and positions, which depend on nothing else.

    The model runs with layers that only note their arguments.
    """
    states: States = []
    arguments: dict[int, list[dict[str, Any]]] = {}
    noted: list[tuple[Tensor, dict[str, Any]]] = []
    with _noting(layers, noted):
        for row in rows:
            noted.clear()
            model.base_model(input_ids=row.unsqueeze(0), use_cache=False)
            states.append(noted[0][0].clone())
            arguments.setdefault(len(row), [named for _, named in noted])
    return states, arguments


@contextlib.contextmanager
def _noting(layers: nn.ModuleList, noted: list[tuple[Tensor, dict[str, Any]]]) -> Iterator[None]:
    """Let the layers hand their states on as they are, and note them with the arguments."""

    def note(states: Tensor, **named: Any) -> Tensor:
        noted.append((states, named))
        return states

    try:
        for layer in layers:
            layer.forward = note
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
