"""A search among candidates of one cost by evolution: EvoPress (arXiv 2410.14649).

    candidate   k of n parts that go, or a level for each of n weights with a sum of 0
    offspring   copies of the parent with min(U{1..3}, U{1..3}) swaps each: a part comes back and
                another one goes, or one weight goes a level up and another one a level down
    selection   stage by stage on more and more fresh rows: each keeps its best; in the last one the
                parent takes part, so the next parent is never worse on these rows
    start       the best of random candidates and of one from outside

A generation depends on its number, the seed and the parent only, so a search resumes from those.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

Candidate = tuple[int, ...]
# (candidates, tokens to judge them by, source of the choice of rows) -> a number for each, lower is
# better
Fitness = Callable[[list[Candidate], int, random.Random], list[float]]


class Space(Protocol):
    """The candidates of one cost."""

    def sample(self, draw: random.Random) -> Candidate:
        """Return any candidate."""

    def swapped(self, parent: Candidate, draw: random.Random) -> Candidate:
        """Return a copy with one swap."""

    def holds(self, candidate: Candidate) -> bool:
        """Return whether this is a candidate of this space."""


@dataclass(frozen=True)
class Sets:
    """The sets of `gone` of `parts`, ascending: the parts that go."""

    parts: int
    gone: int

    def sample(self, draw: random.Random) -> Candidate:
        """Return a set, all being as likely."""
        return tuple(sorted(draw.sample(range(self.parts), self.gone)))

    def swapped(self, parent: Candidate, draw: random.Random) -> Candidate:
        """Return a copy in which a part comes back and another one goes."""
        back = draw.choice(sorted(parent))
        away = draw.choice([part for part in range(self.parts) if part not in parent])
        return tuple(sorted(set(parent) - {back} | {away}))

    def holds(self, candidate: Candidate) -> bool:
        """Return whether as many different parts go."""
        places = {part for part in candidate if 0 <= part < self.parts}
        return len(candidate) == len(places) == self.gone


@dataclass(frozen=True)
class Levels:
    """A level from `lowest` to `highest` for each weight. The levels of weights of one shape sum to
    0, so that every candidate has as many entries."""

    shapes: tuple[tuple[int, ...], ...]
    lowest: int
    highest: int

    def sample(self, draw: random.Random) -> Candidate:
        """Return the uniform candidate after as many swaps as there are weights."""
        candidate: Candidate = (0,) * len(self.shapes)
        for _ in self.shapes:
            candidate = self.swapped(candidate, draw)
        return candidate

    def swapped(self, parent: Candidate, draw: random.Random) -> Candidate:
        """Return a copy in which a weight goes a level up, and one of its shape a level down. It is
        the parent itself if the weight that was drawn has no partner."""
        levels = list(parent)
        up = draw.choice([at for at, level in enumerate(parent) if level < self.highest])
        partners = [
            at
            for at, level in enumerate(parent)
            if at != up and level > self.lowest and self.shapes[at] == self.shapes[up]
        ]
        if partners:
            levels[up] += 1
            levels[draw.choice(partners)] -= 1
        return tuple(levels)

    def holds(self, candidate: Candidate) -> bool:
        """Return whether the levels are in their bounds and sum to 0 for each shape."""
        if len(candidate) != len(self.shapes):
            return False
        sums = dict.fromkeys(self.shapes, 0)
        for shape, level in zip(self.shapes, candidate, strict=True):
            sums[shape] += level
        return not any(sums.values()) and all(
            self.lowest <= level <= self.highest for level in candidate
        )


@dataclass(frozen=True)
class Settings:
    """The sizes of a search: those of the paper for whole blocks, in which a stage is (survivors,
    tokens)."""

    generations: int
    offspring: int = 32
    initial: int = 64
    stages: tuple[tuple[int, int], ...] = ((2, 2048), (1, 32768))


# The paper's for unstructured pruning, with a start from the uniform candidate.
OF_LEVELS = Settings(400, 64, 0, ((8, 2048), (2, 16384), (1, 65536)))


def generations_of(parts: int, gone: int) -> int:
    """Return the paper's number of generations, k (n - k) / 1.5."""
    return max(1, round(gone * (parts - gone) / 1.5))


class Search:
    """A search in a space. `seed` decides on everything that is drawn.

    `parent` is the best candidate of `generation` generations, and None before the first."""

    def __init__(self, space: Space, fitness: Fitness, seed: int, settings: Settings):
        self.space, self.fitness = space, fitness
        self.seed, self.settings = seed, settings
        self.parent: Candidate | None = None
        self.generation = 0

    def start(self, others: Iterable[Candidate]) -> None:
        """Choose the first parent, of random candidates and `others`."""
        draw = random.Random(f"{self.seed} start")
        candidates = set(others)
        for _ in range(self.settings.initial):
            candidates.add(self.space.sample(draw))
        tokens = self.settings.stages[0][1]
        self.parent = self._best(sorted(candidates), 1, tokens, draw)[0]

    def step(self) -> Candidate:
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
        if not self.space.holds(parent) or not 0 <= generation <= self.settings.generations:
            return False
        self.parent, self.generation = parent, generation
        return True

    def _offspring(self, draw: random.Random) -> list[Candidate]:
        """Return different copies of the parent with swaps; fewer where there are no more."""
        assert self.parent is not None
        result: dict[Candidate, None] = {}
        for _ in range(20 * self.settings.offspring):
            if len(result) == self.settings.offspring:
                break
            child = self.parent
            for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
                child = self.space.swapped(child, draw)
            if child != self.parent:
                result[child] = None
        return list(result)

    def _best(
        self, candidates: list[Candidate], count: int, tokens: int, draw: random.Random
    ) -> list[Candidate]:
        values = self.fitness(candidates, tokens, draw)
        order = sorted(range(len(candidates)), key=lambda place: (values[place], candidates[place]))
        return [candidates[place] for place in order[:count]]
