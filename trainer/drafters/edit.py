"""Copy a text that is being edited: aggressive decoding (Ge et al. 2022, arXiv 2205.10350; Sun et
al., ACL 2021).

For answers that mostly repeat the prompt: corrections, code edits, rewriting. The source S is the
prompt. A cursor says where in S the answer is.

    draft = S[cursor : cursor + count]
    all of a step's tokens as in S: the cursor moves on
    otherwise: the cursor moves to the place of S, nearest to where one replaced token would leave
        it, after which S has the answer's last n tokens, n = 3, 2, 1. One token alone must occur
        at most 3 times in S. Without such a place one replaced token is assumed.
    count: 32, doubled up to 128 after a step that took all, halved down to 4 after one that took
        nothing

Differs from the paper: an n-gram need not be unique in S, since repeated lines of code are not; the
place nearest to the expected one is taken. The text is drafted from the first step on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from trainer.drafters import Draft, Target, TargetUpdate, TreeBuilder, chain
from trainer.drafters.untrained import Untrained

LONGEST = 3
RARE = 3
FIRST, LEAST, MOST = 32, 4, 128


@dataclass
class Memory:
    """The prompt, the answer so far, and the cursor. `ends` has the places after each n-gram of the
    prompt."""

    source: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    ends: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    cursor: int = 0
    count: int = FIRST


class EditLookup(Untrained):
    """Chains copied from the prompt at a cursor. They are chosen without chance, and the shape is
    not used."""

    def __init__(self) -> None:
        super().__init__(MOST)

    def start(self, target: Target) -> Memory:
        return Memory()

    @torch.no_grad()
    def propose(
        self, memory: Memory, target: Target, update: TargetUpdate, build: TreeBuilder
    ) -> Draft:
        ids = update.ids.tolist()
        if update.first is not None:
            *prompt, first = [int(update.first), *ids]
            _read(memory, prompt)
            ids = [first]
        follow(memory, ids)
        copied = memory.source[memory.cursor : memory.cursor + memory.count]
        return chain(torch.tensor(copied, dtype=torch.long, device=update.ids.device))


def _read(memory: Memory, prompt: list[int]) -> None:
    memory.source = prompt
    for n in range(1, LONGEST + 1):
        for end in range(n, len(prompt) + 1):
            memory.ends.setdefault(tuple(prompt[end - n : end]), []).append(end)


def follow(memory: Memory, tokens: list[int]) -> None:
    """Move the cursor past a step's tokens."""
    memory.answer += tokens
    expected = memory.cursor + len(tokens)
    proposed = len(memory.source[memory.cursor : memory.cursor + memory.count])
    started = len(memory.answer) > len(tokens)  # the first token comes before any draft
    if memory.source[memory.cursor : expected] == tokens:
        memory.cursor = expected
    else:
        memory.cursor = _resumed(memory, expected)
    if started and proposed:
        if len(tokens) > proposed:
            memory.count = min(2 * memory.count, MOST)
        elif len(tokens) == 1:
            memory.count = max(memory.count // 2, LEAST)


def _resumed(memory: Memory, expected: int) -> int:
    for n in range(min(LONGEST, len(memory.answer)), 0, -1):
        places = memory.ends.get(tuple(memory.answer[-n:]), [])
        if places and (n > 1 or len(places) <= RARE):
            return min(places, key=lambda place: abs(place - expected))
    return expected
