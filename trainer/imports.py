"""What makes the program's imports cost less: on two cores half of the time to the first optimiser step is importing libraries.

Importing trainer.run takes 5.4 to 6.5 seconds of a processor as Python does it, and 3.8 to 4.7 without the cyclic garbage collector,
which walks through all that the libraries define again and again and finds nothing. $GRAFT_PLAIN_IMPORTS=1 leaves it on.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator


@contextlib.contextmanager
def swift() -> Iterator[None]:
    """Import without garbage collections; what was imported is left to itself by later ones."""
    if os.environ.get("GRAFT_PLAIN_IMPORTS") == "1" or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
