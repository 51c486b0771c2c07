"""ViGGO: sentences about video games into meaning representations (ACL W19-8623; CC BY-SA 4.0).

    {"target": "Dirt: Showdown from 2012 is a sport racing game for the PlayStation, Xbox, PC rated
    E 10+ (for Everyone 10 and
                Older). It's not available on Steam, Linux, or Mac.",
     "meaning_representation": "inform(name[Dirt: Showdown], release_year[2012], esrb[E 10+ (for
     Everyone 10 and Older)],
                genres[driving/racing, sport], platforms[PlayStation, Xbox, PC],
                available_on_steam[no], has_linux_release[no], has_mac_release[no])"}

The data set was made for the other direction; this one, from `target` to `meaning_representation`,
is that of RoSA (arXiv 2401.04679). `exact_match` compares the whole, `function` its outermost name,
and `slots_f1` the pairs of slot and value, in any order; a slot that lists values makes a pair of
each.

A meaning stands in several rows, each with another sentence: rows that are held out at random have
meanings that were trained. Take the data set's own validation or test rows (`eval_path`) for a
number that says more.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tasks.reading import DataError
from tasks.task import Chats, Conversation

# elsewhere a comma belongs to the value: exp_release_date[June 29, 2018]
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
        wanted, found = parsed(example.reference), parsed(completion)
        same = " ".join(completion.split()) == " ".join(example.reference.split())
        if wanted is None or found is None:
            return {"exact_match": float(same), "function": 0.0, "slots_f1": 0.0}
        return {
            "exact_match": float(same),
            "function": float(found.function == wanted.function),
            "slots_f1": f1(found.pairs, wanted.pairs),
        }


def parsed(text: str) -> Meaning | None:
    """A text as a meaning representation, None if it is not written as one from its first letter to
    its closing bracket.

    Values run to the bracket that closes theirs, so they may hold commas, parentheses and pairs of
    brackets. What follows the last parenthesis is not read.
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
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"[": 1, "]": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return None


def f1(found: Counter[tuple[str, str]], wanted: Counter[tuple[str, str]]) -> float:
    """Harmonic mean of precision and recall; two empty ones agree."""
    both = (found & wanted).total()
    everything = found.total() + wanted.total()
    return 2 * both / everything if everything else 1.0
