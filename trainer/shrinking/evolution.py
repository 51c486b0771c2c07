"""Parts of a model that go, k of n, by evolution: EvoPress (arXiv 2410.14649).

    parent      a set of k of n parts that go
    offspring   copies with min(U{1..3}, U{1..3}) swaps each: a part comes back, another one goes
    selection   stage by stage on more and more fresh rows: each keeps its best; in the last one the
                parent takes part, so the next parent is never worse on these rows
    start       the best of random sets and of a set from outside

A generation depends on its number, the seed and the parent only, so a search resumes from those.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Gone = tuple[int, ...]  # the parts that go, ascending
# (candidates, tokens to judge them by, source of the choice of rows) -> a number for each, lower is
# better
Fitness = Callable[[list[Gone], int, random.Random], list[float]]


@dataclass(frozen=True)
class Settings:
    """The sizes of a search: those of the paper for whole blocks, in which a stage is (survivors,
    tokens)."""

    generations: int
    offspring: int = 32
    initial: int = 64
    stages: tuple[tuple[int, int], ...] = ((2, 2048), (1, 32768))


def generations_of(parts: int, gone: int) -> int:
    """Return the paper's number of generations, k (n - k) / 1.5."""
    return max(1, round(gone * (parts - gone) / 1.5))


class Search:
    """A search for `gone` of `parts`. `seed` decides on everything that is drawn.

    `parent` is the best set of `generation` generations, and None before the first."""

    def __init__(self, parts: int, gone: int, fitness: Fitness, seed: int, settings: Settings):
        self.parts, self.gone, self.fitness = parts, gone, fitness
        self.seed, self.settings = seed, settings
        self.parent: Gone | None = None
        self.generation = 0

    def start(self, others: Iterable[Gone]) -> None:
        """Choose the first parent, of random sets and `others`."""
        draw = random.Random(f"{self.seed} start")
        sets = {tuple(sorted(other)) for other in others}
        for _ in range(self.settings.initial):
            sets.add(tuple(sorted(draw.sample(range(self.parts), self.gone))))
        tokens = self.settings.stages[0][1]
        self.parent = self._best(sorted(sets), 1, tokens, draw)[0]

    def step(self) -> Gone:
        """Run one generation, and return the new parent."""
        assert self.parent is not None
        draw = random.Random(f"{self.seed} {self.generation}")
        alive = self._offspring(draw)
        for number, (survivors, tokens) in enumerate(self.settings.stages):
            if number + 1 == len(self.settings.stages):
                alive = [*alive, self.parent]
            alive = self._best(alive, survivors, tokens, draw)
        self.parent, self.generation = alive[0], self.generation + 1
        return self.parent

    def state(self) -> dict[str, Any]:
        """Return what a search resumes from."""
        return {"parent": list(self.parent or ()), "generation": self.generation}

    def load(self, state: Any) -> bool:
        """Resume from a `state`. Return whether it fits this search."""
        try:
            parent, generation = tuple(map(int, state["parent"])), int(state["generation"])
        except (KeyError, TypeError, ValueError):
            return False
        fits = len(set(parent)) == self.gone and all(0 <= part < self.parts for part in parent)
        if not fits or not 0 <= generation <= self.settings.generations:
            return False
        self.parent, self.generation = parent, generation
        return True

    def _offspring(self, draw: random.Random) -> list[Gone]:
        """Return different copies of the parent with swaps; fewer where there are no more."""
        assert self.parent is not None
        result: dict[Gone, None] = {}
        for _ in range(20 * self.settings.offspring):
            if len(result) == self.settings.offspring:
                break
            gone = set(self.parent)
            for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
                back = draw.choice(sorted(gone))
                away = draw.choice([part for part in range(self.parts) if part not in gone])
                gone = gone - {back} | {away}
            if (child := tuple(sorted(gone))) != self.parent:
                result[child] = None
        return list(result)

    def _best(
        self, candidates: list[Gone], count: int, tokens: int, draw: random.Random
    ) -> list[Gone]:
        values = self.fitness(candidates, tokens, draw)
        order = sorted(range(len(candidates)), key=lambda place: (values[place], candidates[place]))
        return [candidates[place] for place in order[:count]]
