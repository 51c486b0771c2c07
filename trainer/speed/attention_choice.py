"""The choice of attention kernels on a CPU, by measurement.

On an Intel Xeon with AMX, SmolLM2's attention over 4096 tokens in bf16 took 440 ms forward and 784
backward by blocks, and 131 and 714 by torch's flash kernel; over 256 tokens 12 and 21 against 6 and
40. On other processors the order is another one. So both are timed at a few lengths, before the
first step: 0.4 seconds for rows of up to 512 tokens, and one for longer ones. The times are cached
for a machine, its thread count and the versions of torch and of this code, and recorded in
run.yaml: what runs is computed from the times, so that a resumed run takes the same kernels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from adapters.native import processor
from tasks.wheel import cache_dir
from trainer.speed import attention, flash_pieces
from trainer.speed.attention import BLOCKS, FLASH, Plans

log = logging.getLogger("trainer")

VERSION = 1  # of the kernels and of the measurement
LENGTHS = (128, 256, 512, 1024, 2048)  # longer rows cost what their length squared says
MASKED = 512  # the longest row that is timed with a mask
TOKENS = 1024  # that a thread computes at a time, in two rows at least: blocks multiply batches
BUDGET = 0.05  # seconds for each length, or two turns; next to other work those of the processor
# Blocks are left only for kernels that are faster by more than what such a short measurement errs.
MARGIN = 0.93
PAIRS = ((BLOCKS, BLOCKS), (FLASH, BLOCKS), (FLASH, FLASH))  # kernels: forward, backward
DTYPES = ("bfloat16", "float16", "float32", "float64")
NAMES = {"blocks": PAIRS[0], "mixed": PAIRS[1], "flash": PAIRS[2]}


class Shape(NamedTuple):
    """The values that the times of a kernel depend on, besides the length."""

    heads: int  # query heads that share a key
    width: int  # of a head
    dtype: str
    threads: int


def shape_of(config: Any, dtype: torch.dtype) -> Shape | None:
    """Return the shape of a model's attention in this process; None if its config does not say
    it."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or not isinstance(getattr(config, "hidden_size", None), int):
        return None
    keys = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    name = str(dtype).removeprefix("torch.")
    return Shape(max(1, heads // keys), width, name, torch.get_num_threads())


@dataclass
class Choice:
    """Chooses the kernels of a batch. `times` has, for each length as text, the seconds of
    (blocks, flash with a causal mask, flash with another mask), each (forward, backward)."""

    machine: str
    shape: Shape
    times: dict[str, list[list[float]]] = field(default_factory=dict)
    fixed: tuple[str, str] | None = None  # kernels for all batches

    def kernels(self, plans: Plans, dtype: torch.dtype) -> tuple[str, str]:
        """Return the kernels of the forward and of the backward pass."""
        if self.fixed is not None:
            return self.fixed
        if not self.times or str(dtype).removeprefix("torch.") != self.shape.dtype:
            return PAIRS[0]
        if not hasattr(plans, "kernels"):  # the same for all layers
            plans.kernels = self._fastest(plans)  # type: ignore[attr-defined]
        return plans.kernels  # type: ignore[attr-defined]

    def _fastest(self, plans: Plans) -> tuple[str, str]:
        blocks, flash = self._blocks(plans), self._flash(plans)
        seconds = {
            pair: sum((blocks if kernel == BLOCKS else flash)[i] for i, kernel in enumerate(pair))
            for pair in PAIRS
        }
        fastest = min(PAIRS, key=lambda pair: seconds[pair])
        return fastest if seconds[fastest] < MARGIN * seconds[PAIRS[0]] else PAIRS[0]

    def _blocks(self, plans: Plans) -> list[float]:
        """Seconds of blocks: those of a causal row of the length, by the scores they compute."""
        seconds = [0.0, 0.0]
        for plan in plans.blocks:
            T = plan[-1][1]
            length, (causal, *_) = self._nearest(T)
            scores = sum((b - a) * (high - low) for a, b, low, high, _ in plan)
            for i in (0, 1):
                seconds[i] += causal[i] * scores / _scores(length)
        return [value / len(plans.blocks) for value in seconds]

    def _flash(self, plans: Plans) -> list[float]:
        seconds = [0.0, 0.0]
        for row in plans.pieces:
            for piece in row:
                queries, keys = piece.b - piece.a, piece.high - piece.low
                length, (_, causal, masked) = self._nearest(max(queries, keys))
                for i in (0, 1):
                    kernel = causal if piece.causal else masked
                    seconds[i] += kernel[i] * queries * keys / length**2
        return [value / len(plans.pieces) for value in seconds]

    def _nearest(self, T: int) -> tuple[int, list[list[float]]]:
        """Return the longest timed length that is no longer than T, else the shortest, with its
        times."""
        lengths = sorted(map(int, self.times))
        length = max((n for n in lengths if n <= T), default=lengths[0])
        return length, self.times[str(length)]

    def describe(self) -> str:
        """Return, as text, what computes a causal row at each length."""
        if self.fixed is not None:
            return "forward by {}, backward by {}".format(*self.fixed)
        chosen: dict[tuple[str, str], list[str]] = {}
        for length in self.times:
            dtype = getattr(torch, self.shape.dtype)
            plans = attention.causal(int(length), torch.float32, torch.device("cpu"))
            chosen.setdefault(self.kernels(plans, dtype), []).append(length)
        return "; ".join(
            f"rows of {', '.join(lengths)}: forward by {pair[0]}, backward by {pair[1]}"
            for pair, lengths in chosen.items()
        )

    def record(self) -> dict[str, Any]:
        """Return what run.yaml keeps."""
        return {
            "machine": self.machine,
            "shape": list(self.shape),
            "times": self.times,
            "fixed": list(self.fixed) if self.fixed else None,
        }


def machine() -> str:
    """Return the digest of this processor and of the code that runs on it."""
    parts = (processor(), torch.__version__, VERSION)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def recorded(content: Any) -> Choice | None:
    """Return the choice that `record` wrote, None if there is none or it is from another
    machine or version."""
    try:
        if content["machine"] != machine():
            return None
        times = {
            str(int(length)): [[float(one), float(two)] for one, two in kernels]
            for length, kernels in content["times"].items()
        }
        shape = Shape(*content["shape"])
        if any(len(kernels) != 3 for kernels in times.values()) or not _plausible(shape, times):
            return None
        fixed = next((pair for pair in PAIRS if list(pair) == content["fixed"]), None)
        if fixed is None and content["fixed"] is not None:
            return None
        return Choice(content["machine"], shape, times, fixed)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _plausible(shape: Shape, times: dict[str, Any]) -> bool:
    """Return whether a record, which may come from anyone, is one of this code."""
    return shape.dtype in DTYPES and {int(length) for length in times} <= set(LENGTHS)


def choose(setting: str, shape: Shape, longest: int) -> Choice | None:
    """Return the choice for rows of up to `longest` tokens: what the setting names, or for `auto`
    by times from the cache, measured where it has none. None, which is blocks, for rows shorter
    than all timed ones, and where this torch has no other kernel."""
    if not flash_pieces.available() or setting == "blocks":
        return None
    if setting != "auto":
        return Choice(machine(), shape, fixed=NAMES[setting])
    lengths = [length for length in LENGTHS if length <= longest]
    if not lengths:
        return None
    choice = Choice(machine(), shape)
    name = hashlib.sha256(repr((choice.machine, shape)).encode()).hexdigest()[:16]
    file = cache_dir() / "attention" / f"{name}.json"
    cached: Choice | None = None
    try:
        cached = recorded(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError):
        log.debug("no times of attention in %s", file)
    known = cached.times if cached is not None else {}
    missing = [length for length in lengths if str(length) not in known]
    if missing:
        known = known | _measure(shape, missing)
        choice.times = known
        write(file, json.dumps(choice.record()))
    choice.times = {str(length): known[str(length)] for length in lengths}
    return choice


def write(file: Any, text: str) -> None:
    """Write a file of the cache at once; without it the next run measures again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            temporary.write(text)
        os.replace(temporary.name, file)
    except OSError as error:
        log.debug("times are not cached: %s", error)


def _scores(T: int) -> int:
    """Return how many scores blocks compute for a causal row."""
    plan = attention.causal_plan(T, torch.float32, torch.device("cpu"))
    return sum((b - a) * high for a, b, _, high, _ in plan)


def _measure(shape: Shape, lengths: list[int]) -> dict[str, list[list[float]]]:
    """Time the kernels on random numbers, on the query heads of one key and as many rows as give
    TOKENS tokens a thread. Random generators stay as they are."""
    times: dict[str, list[list[float]]] = {}
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, shape.dtype)
    for length in lengths:
        rows = max(2 if length < LENGTHS[-1] else 1, TOKENS // length) * max(1, shape.threads)
        q, k, v, upstream = (
            torch.randn(rows, length, heads, shape.width, generator=generator, dtype=torch.float32)
            .to(dtype)
            .transpose(1, 2)
            for heads in (shape.heads, 1, 1, shape.heads)
        )
        causal = attention.causal(length, torch.float32, q.device)
        runs = [(causal, PAIRS[0]), (causal, PAIRS[2])]
        if length <= MASKED:
            mask = torch.ones(length, length, dtype=torch.bool).tril_()
            mask[-1, 0] = False  # no triangle any more
            masked = attention.of_mask(mask[None, None], torch.float32, True)
            assert masked is not None
            runs.append((masked, PAIRS[2]))
        best = _shortest((q, k, v), upstream.transpose(1, 2), runs, 2 if rows > 1 else 1)
        if length > MASKED:  # the kernel skips nothing: twice the work of a causal mask
            best.append([2 * value for value in best[1]])
        times[str(length)] = [[round(value / rows, 8) for value in kernel] for kernel in best]
    return times


def _shortest(
    inputs: tuple[torch.Tensor, ...],
    upstream: torch.Tensor,
    runs: list[tuple[Plans, tuple[str, str]]],
    turns: int,
) -> list[list[float]]:
    """Return the shortest seconds of a forward and of a backward pass of each run, taken in turns:
    at least `turns`, and more until BUDGET is spent."""
    one_thread = torch.get_num_threads() == 1
    clock: Callable[[], float] = time.process_time if one_thread else time.monotonic
    leaves = [x.detach().requires_grad_() for x in inputs]
    best = [[float("inf"), float("inf")] for _ in runs]
    started, turn = clock(), 0
    while turn < turns or clock() - started < BUDGET:
        turn += 1
        for (plans, pair), shortest in zip(runs, best, strict=True):
            one = clock()
            q, k, v = leaves
            out = attention.attention(q, k, v, 0.125, plans, pair)
            two = clock()
            torch.autograd.grad(out, leaves, upstream)
            three = clock()
            shortest[0] = min(shortest[0], two - one)
            shortest[1] = min(shortest[1], three - two)
    return best
