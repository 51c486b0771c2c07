"""Makes the program's imports faster. On two cores, half of the time to the first optimiser step is
spent importing libraries.

Importing trainer.run takes 5.4 to 6.5 seconds of processor time as Python does it, and 3.8 to 4.7
without the cyclic garbage collector, which scans everything that the libraries define again and
again and finds nothing. bitsandbytes, which PEFT imports, decorates four functions with
torch.compile, which imports the compiler for kernels that most runs never call. `python -m trainer
+experiment=smoke max_steps=1` took 7.7 to 8.6 seconds in all with both measures, and 11.1 to 12.8
with $GRAFT_PLAIN_IMPORTS=1, which turns them off.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any


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
