"""GSM8K: grade-school mathematics (arXiv 2110.14168; MIT). The answer reasons step by step and ends in its number after ####.

    {"question": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How much did she earn?",
     "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10"}

`exact_match` reads the number after the first ####, `flexible` the last number wherever it stands: a model that was not
taught the #### can be right by the second alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal

from tasks.reading import Bad, DataError
from tasks.task import Conversation, Splits, column, text_of

# A minus after a digit or a bracket subtracts, and so does one before a blank: the last number of "7-5" and of "7 - 5" is 5.
_NUMBER = (
    r"(?P<minus>(?<![\w)\]])[-\u2212](?=[$0-9.]))?(?:\$ ?)?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
)
_ANYWHERE = re.compile(_NUMBER)
# Not the 1 of "1,5", nor the 5 of "5/6".
_MARKED = re.compile(rf"####[^\S\n]*\$?{_NUMBER}(?![,./]?[0-9])")


class GSM8K:
    """Questions and worked answers."""

    kind = "conversation"
    metrics = ["exact_match", "flexible"]
    streaming = False
    train_on = "all"

    def __init__(
        self, path: str | list[str], split: str, eval_path: str | list[str] | None, eval_split: str, eval_fraction: float,
        limit: int | None, eval_limit: int | None, columns: dict[str, str], system: str | None, chat_template: str | None, on_bad: str,
    ):  # fmt: skip
        self.splits = Splits.of(path, split, eval_path, eval_split, eval_fraction, limit, eval_limit)
        self.columns, self.system, self.chat_template, self.on_bad = dict(columns), system, chat_template, on_bad

    def examples(self, split: str) -> Iterator[Conversation | Bad]:
        for where, row in self.splits.rows(split):
            if isinstance(row, Bad):
                yield row
                continue
            try:
                question = text_of(column(row, self.columns, "question"), "question")
                answer = text_of(column(row, self.columns, "answer"), "answer")
                if marked(answer) is None:
                    raise DataError(f"the answer must hold its number after ####, and ends in {answer[-40:]!r}")
            except DataError as error:
                yield Bad(where, str(error))
                continue
            messages = [{"role": "system", "content": self.system}] if self.system is not None else []
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield Conversation(messages, where, reference=answer)

    def fingerprint(self, split: str) -> str:
        return f"{self.splits.fingerprint(split)} {sorted(self.columns.items())} {self.system}"

    def grade(self, example: Conversation, completion: str) -> dict[str, float]:
        right = marked(example.reference)
        return {"exact_match": float(marked(completion) == right), "flexible": float(last(completion) == right)}


def marked(text: str) -> Decimal | None:
    """The number after the first ####, or None."""
    start = text.find("####")
    found = _MARKED.match(text, start) if start >= 0 else None
    return _value(found) if found else None


def last(text: str) -> Decimal | None:
    """The last number of a text, or None."""
    found = None
    for found in _ANYWHERE.finditer(text):  # noqa: B007
        pass
    return _value(found) if found else None


def _value(found: re.Match[str]) -> Decimal:
    """72, 72.0 and 72.00 are equal as decimals; 1,080 is 1080."""
    value = Decimal(found["digits"].replace(",", ""))
    return -value if found["minus"] else value
