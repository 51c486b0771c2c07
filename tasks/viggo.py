"""ViGGO: from sentences about video games to meaning representations (ACL W19-8623; CC BY-SA 4.0).

    {"target": "Dirt: Showdown from 2012 is a sport racing game for the PlayStation, Xbox, PC rated
    E 10+ (for Everyone 10 and
                Older). It's not available on Steam, Linux, or Mac.",
     "meaning_representation": "inform(name[Dirt: Showdown], release_year[2012], esrb[E 10+ (for
     Everyone 10 and Older)],
                genres[driving/racing, sport], platforms[PlayStation, Xbox, PC],
                available_on_steam[no], has_linux_release[no], has_mac_release[no])"}

The data set was made for the other direction; this one, from `target` to `meaning_representation`,
is that of RoSA (arXiv 2401.04679). `exact_match` compares the whole text, `function` the outermost
name, and `slots_f1` the pairs of slot and value, in any order; a slot with a list of values makes
one pair for each value.

A meaning occurs in several rows, each with another sentence, so rows that are held out at random
have meanings that were trained. Use the data set's own validation or test rows (`eval_path`) for a
meaningful score.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tasks.reading import DataError
from tasks.task import Chats, Conversation

# Slots with lists of values. In others a comma is part of the value:
# exp_release_date[June 29, 2018]
LISTS = ("genres", "platforms", "player_perspective")


@dataclass
class Meaning:
    """A meaning representation's outermost name, and how often it holds each (slot, value)."""

    function: str
    pairs: Counter[tuple[str, str]]


class ViGGO(Chats):
    """Sentences and what they mean."""

    metrics = ["exact_match", "function", "slots_f1"]

    def conversation(self, row: dict[str, Any], where: str) -> Conversation:
        sentence, meaning = self.text(row, "target"), self.text(row, "meaning_representation")
        if parsed(meaning) is None:
            raise DataError(
                "meaning_representation must be written as function(slot[value], ...), and is"
                f" {meaning[:60]!r}"
            )
        return self.pair(sentence, meaning, where)

    def grade(self, example: Conversation, completion: str) -> dict[str, float]:
        expected, answer = parsed(example.reference), parsed(completion)
        same = " ".join(completion.split()) == " ".join(example.reference.split())
        if expected is None or answer is None:
            return {"exact_match": float(same), "function": 0.0, "slots_f1": 0.0}
        return {
            "exact_match": float(same),
            "function": float(answer.function == expected.function),
            "slots_f1": f1(answer.pairs, expected.pairs),
        }


def parsed(text: str) -> Meaning | None:
    """Parse a text as a meaning representation. Return None if it is not one from its first letter
    to the closing parenthesis.

    A value ends at the bracket that closes its own, so it may contain commas, parentheses and pairs
    of brackets. Text after the last parenthesis is ignored.
    """
    opening = re.match(r"\s*(\w+)\s*\(", text)
    if opening is None:
        return None
    pairs: Counter[tuple[str, str]] = Counter()
    position = opening.end()
    while True:
        rest = re.compile(r"[\s,]*").match(text, position)
        position = rest.end() if rest else position
        if text.startswith(")", position):
            return Meaning(opening[1], pairs)
        slot = re.compile(r"(\w+)\s*").match(text, position)
        if slot is None:
            return None
        position = slot.end()
        value = ""
        if text.startswith("[", position):
            end = _closing(text, position)
            if end is None:
                return None
            value, position = " ".join(text[position + 1 : end].split()), end + 1
        values = [part.strip() for part in value.split(",")] if slot[1] in LISTS else [value]
        pairs.update((slot[1], part) for part in values)


def _closing(text: str, start: int) -> int | None:
    """Return the index of the bracket that closes the one at `start`, None if there is none."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"[": 1, "]": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return None


def f1(answer: Counter[tuple[str, str]], expected: Counter[tuple[str, str]]) -> float:
    """Return the harmonic mean of precision and recall, 1 if both are empty."""
    common = (answer & expected).total()
    total = answer.total() + expected.total()
    return 2 * common / total if total else 1.0
