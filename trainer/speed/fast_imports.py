"""What makes the program's imports cost less: on two cores half of the time to the first optimiser
step is importing libraries.

Importing trainer.run takes 5.4 to 6.5 seconds of a processor as Python does it, and 3.8 to 4.7
without the cyclic garbage collector, which walks through all that the libraries define again and
again and finds nothing. bitsandbytes, which PEFT imports, decorates four functions with
torch.compile: that imports the compiler for kernels that most runs never call. `python -m trainer
+experiment=smoke max_steps=1` took 7.7 to 8.6 seconds in all with both measures, and 11.1 to 12.8
with $GRAFT_PLAIN_IMPORTS=1, as Python does it.
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
    """Import without garbage collections; what was imported is left to itself by later ones."""
    if _plain() or not gc.isenabled():
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
    """While open, a function that torch.compile is given is compiled when it is called first, and
    until then needs no compiler."""
    if _plain():
        yield
        return
    import torch

    plain, waits = torch.compile, True

    @functools.wraps(plain)
    def later(model: Any = None, **options: Any) -> Any:
        if not waits:
            return plain(model, **options)
        if model is None:
            return functools.partial(later, **options)
        return (
            _compile_on_first_call(plain, model, options)
            if inspect.isfunction(model)
            else plain(model, **options)
        )

    torch.compile = later
    try:
        yield
    finally:
        waits = False
        if torch.compile is later:  # Lightning puts one of its own around what it finds
            torch.compile = plain


def _compile_on_first_call(
    plain: Callable[..., Any], function: Callable[..., Any], options: dict[str, Any]
) -> Callable[..., Any]:
    """What `plain`, torch.compile, makes of a function, at its first call."""
    made: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(plain(function, **options))
        return made[0](*args, **kwargs)

    return compiled


def _plain() -> bool:
    return os.environ.get("GRAFT_PLAIN_IMPORTS") == "1"
