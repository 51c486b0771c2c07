"""Makes the program's imports faster. On two cores, half of the time to the first optimiser step is
spent importing libraries.

Importing trainer.run takes 5.4 to 6.5 seconds of processor time as Python does it, and 3.8 to 4.7
without the cyclic garbage collector, which scans everything that the libraries define again and
again and finds nothing. bitsandbytes, which PEFT imports, decorates four functions with
torch.compile, which imports the compiler for kernels that most runs never call. Lightning imports
torchmetrics for metrics that this program does not log by it. `python -m trainer
+experiment=smoke max_steps=1` took 7.7 to 8.6 seconds in all with the first two measures, and 11.1
to 12.8 with $GRAFT_PLAIN_IMPORTS=1, which turns all off.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.machinery
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

NAME = "torchmetrics"


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Import without garbage collections. Later collections skip what was imported."""
    if _turned_off() or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def without_torchmetrics() -> Iterator[None]:
    """While open, give Lightning an empty torchmetrics. The package and matplotlib, which it
    imports, take 2.5 of 29 seconds under python -X importtime, for metrics that are passed to
    `LightningModule.log`. Nothing here does that. A later import of torchmetrics is the real
    one."""
    if _turned_off() or NAME in sys.modules:
        yield
        return
    from torch import nn

    class Metric(nn.Module):
        """Stands in for torchmetrics' class in Lightning: nothing is an instance of it."""

        def __init__(self, *_: Any, **__: Any) -> None:
            raise RuntimeError(
                "LightningModule.log needs torchmetrics, which this program does not give to"
                " Lightning: set GRAFT_PLAIN_IMPORTS=1"
            )

    empty: Any = types.ModuleType(NAME)
    empty.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    empty.__version__ = metadata.version(NAME)
    empty.Metric, empty.MetricCollection = Metric, type("MetricCollection", (Metric,), {})
    sys.modules[NAME] = empty
    try:
        yield
    finally:
        if sys.modules.get(NAME) is empty:
            del sys.modules[NAME]


@contextlib.contextmanager
def lazy_compile() -> Iterator[None]:
    """While open, make torch.compile compile a function at its first call, so that decorating one
    does not import the compiler."""
    if _turned_off():
        yield
        return
    import torch

    original, is_open = torch.compile, True

    @functools.wraps(original)
    def compile_later(model: Any = None, **options: Any) -> Any:
        if not is_open:
            return original(model, **options)
        if model is None:
            return functools.partial(compile_later, **options)
        return (
            _compile_on_first_call(original, model, options)
            if inspect.isfunction(model)
            else original(model, **options)
        )

    torch.compile = compile_later
    try:
        yield
    finally:
        is_open = False
        # Lightning wraps torch.compile when it is imported: that wrapper must stay.
        if torch.compile is compile_later:
            torch.compile = original


def _compile_on_first_call(
    compile_function: Callable[..., Any], function: Callable[..., Any], arguments: dict[str, Any]
) -> Callable[..., Any]:
    """Return a function that compiles `function` at its first call."""
    results: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        if not results:
            results.append(compile_function(function, **arguments))
        return results[0](*args, **kwargs)

    return compiled


def _turned_off() -> bool:
    return os.environ.get("GRAFT_PLAIN_IMPORTS") == "1"
