"""The runs of a study: which are missing, and the search for rates.

A piece is one run: its training, its loss on the validation rows, and its numbers on the test rows.
Its result is FOLDER/pieces/KEY.json. So a study can be stopped at any time, and further rates,
seeds, methods or data add pieces and repeat none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.errors import ConfigError
from trainer.studies.budget import last_of_each, words_of
from trainer.studies.plan import Study

Results = dict[str, dict[str, Any]]  # by key
UNTESTED = "untested"  # marks a finished run whose test is done again, with the study's settings


@dataclass(frozen=True)
class Piece:
    """One run of a study."""

    data: str
    method: str
    rate: float
    seed: int
    searches: bool  # whether it is a shorter run of the search

    @property
    def key(self) -> str:
        """The name of its run and of its result."""
        part = "search-" if self.searches else ""
        return f"{part}{self.data}-{self.method}-{self.rate:g}-{self.seed}"

    def words(self, study: Study) -> list[str]:
        """Return the overrides of its run."""
        words = [
            *words_of(study, self.method, study.data[self.data]),
            *(study.search if self.searches else []),
        ]
        return [*last_of_each(words), f"optimizer.lr={self.rate:g}", f"seed={self.seed}"]

    def tests(self, study: Study) -> list[str]:
        """Return the settings of its evaluation on the test rows that its numbers depend on."""
        data = study.data[self.data]
        answers = [f"generate={data.generate}", f"max_new_tokens={data.max_new_tokens}"]
        return [*data.test, *answers]


def missing(study: Study, results: Results) -> Iterator[Piece]:
    """Yield the pieces that can run now: those of searches, runs whose rate is chosen, and such
    runs whose test has to be done again. Methods follow each other seed by seed, so that a study
    that is stopped compares complete seeds."""
    chosen: dict[tuple[str, str], float | None] = {}
    for data in study.data:
        for method in study.methods:
            tried = _tried(study, data, method, results)
            pieces = [_search_piece(study, data, method, r) for r in _next(study, method, tried)]
            left = [piece for piece in pieces if piece.key not in results]
            yield from left
            if not pieces:
                chosen[data, method] = _rate(study, method, tried)
    for seed in study.seeds:
        for (data, method), rate in chosen.items():
            if rate is None:
                continue
            piece = Piece(data, method, rate, seed, False)
            if piece.key not in results or UNTESTED in results[piece.key]:
                yield piece


def chosen_rate(study: Study, data: str, method: str, results: Results) -> float | None:
    """Return the rate that the search has chosen; None while it runs, or if all its runs failed."""
    tried = _tried(study, data, method, results)
    return None if _next(study, method, tried) else _rate(study, method, tried)


def at_edge(study: Study, data: str, method: str, results: Results) -> bool:
    """Return whether the chosen rate is at an end of the tried ones: the best may be beyond."""
    tried = _tried(study, data, method, results)
    finite = [rate for rate, value in tried.items() if math.isfinite(value)]
    rate = best(study, tried)
    several = len(study.methods[method].rates) > 1
    return several and len(finite) > 1 and rate in (min(tried), max(tried))


def _rate(study: Study, method: str, tried: dict[float, float]) -> float | None:
    rates = study.methods[method].rates
    return rates[0] if len(rates) == 1 else best(study, tried)


def best(study: Study, tried: dict[float, float]) -> float | None:
    """Return the rate of the best metric, the middle one of rates that are equally good; None if no
    run has one."""
    finite = {rate: value for rate, value in tried.items() if math.isfinite(value)}
    if not finite:
        return None
    top = min(finite.values()) if study.mode == "min" else max(finite.values())
    equal = sorted(rate for rate, value in finite.items() if value == top)
    return equal[(len(equal) - 1) // 2]


def _tried(study: Study, data: str, method: str, results: Results) -> dict[float, float]:
    """Return the metric of each rate of a search; infinite for a run that failed."""
    worst = math.inf if study.mode == "min" else -math.inf
    tried = {}
    for result in results.values():
        piece = result["piece"]
        mine = piece["data"] == data and piece["method"] == method
        if mine and piece["searches"] == bool(study.search) and piece["seed"] == study.search_seed:
            value = result.get("validation", {}).get(study.choose)
            tried[piece["rate"]] = worst if value is None else value
    return tried


def _next(study: Study, method: str, tried: dict[float, float]) -> list[float]:
    """Return the rates that a search tries next; none if it has ended."""
    rates = study.methods[method].rates
    if len(rates) == 1:
        return []  # there is nothing to choose
    if left := [rate for rate in rates if rate not in tried]:
        return left
    rate = best(study, tried)
    extra = len([value for value in tried if value not in rates])
    if rate is None or extra >= study.widen:
        return []
    ordered = sorted(tried)
    further = rate
    if rate == ordered[-1]:
        further = float(f"{rate * rate / ordered[-2]:.2g}")
    elif rate == ordered[0]:
        further = float(f"{rate * rate / ordered[1]:.2g}")
    return [] if further in tried else [further]  # rounding may give a rate that was tried


def _search_piece(study: Study, data: str, method: str, rate: float) -> Piece:
    return Piece(data, method, rate, study.search_seed, bool(study.search))


def load(study: Study) -> Results:
    """Read the results of a study's pieces. Failed ones are among them. Runs that were tested with
    other settings than the study's file has now are marked UNTESTED, and their test is left out.

    Raises:
        ConfigError: a piece ran with other settings than the study's file has now.
    """
    results: Results = {}
    for path in sorted((study.folder / "pieces").glob("*.json")):
        try:
            result = json.loads(path.read_text("utf-8"))
            piece = Piece(**result["piece"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{path} cannot be read as a result: remove it, and its run is done again"
            ) from None
        if piece.data in study.data and piece.method in study.methods:
            _refuse_other(path, result["words"], piece.words(study))
            if result.get("tests", piece.tests(study)) != piece.tests(study) and "test" in result:
                result = {k: v for k, v in result.items() if k != "test"} | {UNTESTED: True}
            results[piece.key] = result
    return results


def _refuse_other(path: Path, recorded: list[str], now: list[str]) -> None:
    first, second = set(recorded), set(now)
    if first != second:
        raise ConfigError(
            f"{path} is the result of a run with other settings:\n"
            f"  then: {' '.join(sorted(first - second)) or '(nothing else)'}\n"
            f"  now:  {' '.join(sorted(second - first)) or '(nothing else)'}\n"
            "Give the settings of then, another name for the study, or another name for the method"
        )
