"""GSM8K: grade-school mathematics (arXiv 2110.14168; MIT). The answer reasons step by step and ends
in its number after ####.

    {"question": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of
    babysitting. How much did she earn?",
     "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nWorking 50 minutes, she earned 0.2
     x 50 = $<<0.2*50=10>>10.\n#### 10"}

`exact_match` compares the number after the first ####, `flexible` the last number anywhere: a model
that was not trained to write #### can be right only by `flexible`.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from tasks.reading import DataError
from tasks.task import Chats, Conversation

# A minus after a digit or a bracket, or before a blank, is an operator: the last number of "7-5"
# and of "7 - 5" is 5.
_NUMBER = (
    r"(?P<minus>(?<![\w)\]])[-\u2212](?=[$0-9.]))?(?:\$ ?)?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
)
_ANYWHERE = re.compile(_NUMBER)
# Not the 1 of "1,5", nor the 5 of "5/6".
_MARKED = re.compile(rf"####[^\S\n]*\$?{_NUMBER}(?![,./]?[0-9])")


class GSM8K(Chats):
    """Questions and worked answers."""

    metrics = ["exact_match", "flexible"]

    def conversation(self, row: dict[str, Any], where: str) -> Conversation:
        question, answer = self.text(row, "question"), self.text(row, "answer")
        if marked(answer) is None:
            raise DataError(
                f"the answer must have its number after ####, and ends in {answer[-40:]!r}"
            )
        return self.pair(question, answer, where)

    def grade(self, example: Conversation, completion: str) -> dict[str, float]:
        right = marked(example.reference)
        return {
            "exact_match": float(marked(completion) == right),
            "flexible": float(last(completion) == right),
        }


def marked(text: str) -> Decimal | None:
    """Return the number after the first ####, None if there is none."""
    start = text.find("####")
    match = _MARKED.match(text, start) if start >= 0 else None
    return _value(match) if match else None


def last(text: str) -> Decimal | None:
    """Return the last number of a text, None if there is none."""
    match = None
    for match in _ANYWHERE.finditer(text):  # noqa: B007
        pass
    return _value(match) if match else None


def _value(match: re.Match[str]) -> Decimal:
    # As decimals, 72, 72.0 and 72.00 are equal.
    value = Decimal(match["digits"].replace(",", ""))
    return -value if match["minus"] else value
