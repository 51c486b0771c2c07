"""The choice of the elementwise parts of a step that C computes on a CPU, by measurement.

Each kind of trainer.speed.elementwise is timed against torch at the model's widths, before the
first step: a tenth of a second, and once a second for the compiler. The times are cached for a
machine, its thread count and the versions of torch and of this code. What was chosen is recorded in
run.yaml, so that a resumed run computes the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adapters.native import processor
from tasks.wheel import cache_dir
from trainer.speed import elementwise, fused, predictions, rotations
from trainer.speed.attention_choice import write
from trainer.speed.elementwise import KINDS

log = logging.getLogger("trainer")

VERSION = 1  # of the measurement; the C code counts by itself
TOKENS = 256  # of a thread
PREDICTED = 32  # positions of a thread whose loss is computed
TURNS = 4  # the shortest of so many counts
# C is left only for what is faster by more than such a short measurement errs.
MARGIN = 1.1
NARROWEST = 256  # of models whose kernels are timed: below it a call costs more than its numbers


class Shape(NamedTuple):
    """The sizes that the times depend on."""

    hidden: int
    inner: int  # width of a gated MLP
    head: int
    vocabulary: int
    dtype: str
    threads: int


@dataclass
class Choice:
    """`times` has the seconds of (torch, C) for each kind."""

    machine: str
    kinds: tuple[str, ...]  # what C computes
    times: dict[str, list[float]] = field(default_factory=dict)

    def describe(self) -> str:
        """Return, as text, what computes each kind."""
        return ", ".join(
            f"{kind} by {'C' if kind in self.kinds else 'torch'}"
            + ("" if kind not in self.times else " ({1:.1f} and {0:.1f} ms)".format(
                *(1000 * seconds for seconds in self.times[kind])
            ))
            for kind in KINDS
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Return what run.yaml keeps."""
        return {"machine": self.machine, "kinds": list(self.kinds), "times": self.times}


def shape_of(config: Any, dtype: torch.dtype) -> Shape | None:
    """Return the shape of a model in this process; None if its config does not say it."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    sizes: list[Any] = [getattr(config, name, None) for name in names]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    hidden, inner, heads, vocabulary = sizes
    head = getattr(config, "head_dim", None) or hidden // heads
    name = str(dtype).removeprefix("torch.")
    return Shape(hidden, inner, head // 2 * 2, vocabulary, name, torch.get_num_threads())


def machine() -> str:
    """Return the digest of this processor and of the code that runs on it."""
    source = Path(elementwise.__file__).with_suffix(".c").read_bytes()
    parts = (processor(), torch.__version__, VERSION, source)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def recorded(content: Any) -> Choice | None:
    """Return the choice that `record` wrote, None if there is none, it is from another machine or
    version, or nothing here compiles C."""
    try:
        if content["machine"] != machine():
            return None
        kinds = tuple(kind for kind in KINDS if kind in content["kinds"])
        times = {kind: [float(t), float(c)] for kind, (t, c) in content["times"].items()}
        if len(kinds) != len(content["kinds"]) or not times.keys() <= {*KINDS}:
            return None
        return Choice(content["machine"], kinds, times) if _there(kinds) else None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _there(kinds: tuple[str, ...]) -> bool:
    return not kinds or elementwise.library() is not None


def choose(setting: str, shape: Shape) -> Choice | None:
    """Return the choice that the setting names, or for `auto` the faster of each kind: by times
    from the cache, measured where it has none. None, which is torch, for narrow models and where
    nothing compiles C."""
    if setting == "torch" or elementwise.library() is None:
        return None
    if setting == "c":
        return Choice(machine(), KINDS)
    if shape.hidden < NARROWEST or getattr(torch, shape.dtype) not in elementwise.DTYPES:
        return None
    here = machine()
    name = hashlib.sha256(repr((here, shape)).encode()).hexdigest()[:16]
    file = cache_dir() / "elementwise" / f"{name}.json"
    try:
        if (cached := recorded(json.loads(file.read_text("utf-8")))) is not None:
            return cached
    except (OSError, ValueError):
        log.debug("no times of elementwise parts in %s", file)
    times = measure(shape)
    kinds = tuple(kind for kind in KINDS if times[kind][1] < MARGIN * times[kind][0])
    choice = Choice(here, kinds, times)
    write(file, json.dumps(choice.record()))
    return choice


def measure(shape: Shape) -> dict[str, list[float]]:
    """Time each kind on random numbers, a forward and a backward pass by torch and by C in turns.
    Random generators stay as they are."""
    calls = _calls(shape)
    clock = time.process_time if torch.get_num_threads() == 1 else time.monotonic
    times: dict[str, list[float]] = {}
    for kind in KINDS:
        best = [float("inf"), float("inf")]
        for _ in range(TURNS):
            for i, native in enumerate((False, True)):
                started = clock()
                calls[kind](native)
                best[i] = min(best[i], clock() - started)
        times[kind] = [round(seconds, 8) for seconds in best]
    return times


def _calls(shape: Shape) -> dict[str, Callable[[bool], Any]]:
    """Return for each kind the function that computes it, by C or not."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, shape.dtype)
    tokens, heads = TOKENS * shape.threads, max(1, shape.hidden // max(1, shape.head))

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32).to(dtype)

    gate, up, upstream = (drawn(tokens, shape.inner).requires_grad_() for _ in range(3))
    x, weight = drawn(tokens, shape.hidden).requires_grad_(), drawn(shape.hidden)
    q = drawn(1, tokens, heads, shape.head).transpose(1, 2).requires_grad_()
    angles = drawn(1, tokens, shape.head), drawn(1, tokens, shape.head)
    count = PREDICTED * shape.threads
    logits = drawn(count, shape.vocabulary)
    targets = torch.arange(count) * 7919 % shape.vocabulary
    rotate = rotations.by_c(rotations.plain)

    def gates(native: bool) -> None:
        h = fused.swiglu(gate, up, native)
        torch.autograd.grad(h, (gate, up), upstream.detach())

    def norms(native: bool) -> None:
        y = fused.rms_norm(x, weight, 1e-6, native)
        torch.autograd.grad(y, x, x.detach())

    def rotated(native: bool) -> None:
        y, _ = (rotate if native else rotations.plain)(q, q, *angles)
        torch.autograd.grad(y, q, q.detach())

    def losses(native: bool) -> None:
        predictions.with_slopes(logits, targets, None, 1, native)

    return {"gates": gates, "norms": norms, "rotations": rotated, "losses": losses}
