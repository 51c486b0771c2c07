"""ViGGO: rows, and how meaning representations are compared."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tasks.reading import Bad
from tasks.task import Conversation
from tasks.viggo import Meaning, ViGGO, f1, parsed
from tests.conftest import ROOT, write_rows
from tests.toys import tasks as toys

DATA = ROOT.parent / "shared" / "data"
MEANING = "inform(name[Dirt: Showdown], genres[driving/racing, sport], available_on_steam[no])"
ROW = {
    "target": "Dirt: Showdown is a sport racing game, and not on Steam.",
    "meaning_representation": MEANING,
}


def task(path: Path, **changes: Any) -> ViGGO:
    return ViGGO(str(path), **toys.CHATS | changes)


@pytest.mark.parametrize("more", [{}, {"gem_id": "viggo-train-0", "references": [ROW["target"]]}])
def test_a_row_of_a_file_or_of_the_hub_becomes_a_sentence_and_its_meaning(tmp_path, more):
    file = write_rows(tmp_path / "rows.jsonl", [ROW | more])
    chat = [{"role": "user", "content": ROW["target"]}, {"role": "assistant", "content": MEANING}]
    assert list(task(file).examples("train")) == [Conversation(chat, f"{file}:1", None, MEANING)]
    (reported,) = task(file, system="Parse.").examples("train")
    assert reported.messages == [{"role": "system", "content": "Parse."}, *chat]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"target": "t", "mr": "m"},
            (
                "no column 'meaning_representation'; the row has: target, mr; set"
                " task.columns={meaning_representation: YOUR_COLUMN}"
            ),
        ),
        ({"meaning_representation": MEANING}, None),
        ({"target": "", "meaning_representation": MEANING}, "target is empty"),
        (
            {"target": "t", "meaning_representation": ["m"]},
            "meaning_representation must be text, and is list: \"['m']\"",
        ),
        (
            {"target": "t", "meaning_representation": "inform(name[a)"},
            (
                "meaning_representation must be written as function(slot[value], ...), and is"
                " 'inform(name[a)'"
            ),
        ),
    ],
)
def test_a_broken_row_is_bad_with_its_line(tmp_path, row, reason):
    file = write_rows(tmp_path / "rows.jsonl", [ROW, row])
    reason = (
        reason
        or "no column 'target'; the row has: meaning_representation; set task.columns={target:"
        " YOUR_COLUMN}"
    )
    assert list(task(file).examples("train"))[1] == Bad(f"{file}:2", reason)


def test_the_digest_follows_the_columns_and_the_system_prompt(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [ROW])
    digests = {
        task(file, **change).fingerprint("train")
        for change in ({}, {"system": "S"}, {"columns": {"target": "text"}})
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("text", "function", "pairs"),
    [
        ("request(specifier[terrible])", "request", [("specifier", "terrible")]),
        (
            "inform(esrb[E 10+ (for Everyone 10 and Older)])",
            "inform",
            [("esrb", "E 10+ (for Everyone 10 and Older)")],
        ),
        (
            "confirm(developer[Spectrum HoloByte, Inc.])",
            "confirm",
            [("developer", "Spectrum HoloByte, Inc.")],
        ),
        (
            "inform(exp_release_date[June 29, 2018])",
            "inform",
            [("exp_release_date", "June 29, 2018")],
        ),
        (
            "inform(name[a [b, c] d], rating[good])",
            "inform",
            [("name", "a [b, c] d"), ("rating", "good")],
        ),
        ("suggest(genres[sport, indie])", "suggest", [("genres", "indie"), ("genres", "sport")]),
        (
            "suggest(genres[sport,indie],platforms[PC])",
            "suggest",
            [("genres", "indie"), ("genres", "sport"), ("platforms", "PC")],
        ),
        ("inform(name[x), y[z]])", "inform", [("name", "x), y[z]")]),
        (" inform ( name [ A   B ] ) ", "inform", [("name", "A B")]),
        ("request_attribute(esrb[])", "request_attribute", [("esrb", "")]),
        ("request_attribute(esrb)", "request_attribute", [("esrb", "")]),
        ("inform(name[a], name[a])", "inform", [("name", "a"), ("name", "a")]),
        ("inform()", "inform", []),
        ("inform(name[a]) and more", "inform", [("name", "a")]),
    ],
)
def test_a_meaning_is_read(text, function, pairs):
    assert parsed(text) == Meaning(function, Counter(pairs))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "inform",
        "inform(",
        "inform(name[a]",
        "inform(name[a)",
        "inform(name]a[)",
        "a inform()",
        "(name[a])",
        "inform[a]",
    ],
)
def test_what_is_no_meaning_is_not_read(text):
    assert parsed(text) is None


@pytest.mark.parametrize(
    ("actual", "reference", "expected"),
    [
        ("ab", "ab", 1.0),
        ("ab", "ba", 1.0),
        ("ab", "ac", 0.5),
        ("abc", "ab", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("a", "ab", 2 * 1 * (1 / 2) / (1 + 1 / 2)),
        ("aa", "a", 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("a", "b", 0.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("", "", 1.0),
    ],
)
def test_f1_by_hand(actual, reference, expected):
    pairs = [Counter((slot, "value") for slot in slots) for slots in (actual, reference)]
    assert f1(*pairs) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("completion", "exact", "function", "slots"),
    [
        (MEANING, 1.0, 1.0, 1.0),
        (f"\n{MEANING}  ", 1.0, 1.0, 1.0),
        (MEANING.replace(", ", ",  "), 1.0, 1.0, 1.0),
        (
            "inform(available_on_steam[no], name[Dirt: Showdown], genres[sport, driving/racing])",
            0.0,
            1.0,
            1.0,
        ),
        (MEANING.replace("inform", "confirm"), 0.0, 0.0, 1.0),
        (MEANING.replace("[no]", "[yes]"), 0.0, 1.0, 0.75),
        (MEANING.replace(", sport", ""), 0.0, 1.0, 2 * 3 / (3 + 4)),
        (MEANING.replace("name[", "developer["), 0.0, 1.0, 0.75),
        (MEANING.lower(), 0.0, 1.0, 0.75),
        (MEANING[:-1], 0.0, 0.0, 0.0),
        (ROW["target"], 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
    ],
)
def test_an_answer_is_graded(tmp_path, completion, exact, function, slots):
    actual = task(write_rows(tmp_path / "rows.jsonl", [ROW]))
    (example,) = actual.examples("train")
    scores = actual.grade(example, completion)
    assert list(scores) == actual.metrics
    assert scores == pytest.approx({"exact_match": exact, "function": function, "slots_f1": slots})


@pytest.mark.long
@pytest.mark.skipif(
    not (DATA / "viggo_train.jsonl").is_file(),
    reason="../shared/data/viggo_train.jsonl is not there",
)
@pytest.mark.parametrize(("name", "count"), [("viggo_train", 5103), ("viggo_valid", 714)])
def test_the_real_meanings_are_right_and_those_of_other_sentences_mostly_not(name, count):
    actual = task(DATA / f"{name}.jsonl")
    examples = list(actual.examples("train"))
    assert len(examples) == count
    assert all(
        set(actual.grade(example, example.reference).values()) == {1.0} for example in examples
    )
    others = random.Random(0).sample(examples, count)
    chance = [
        actual.grade(example, other.reference)
        for example, other in zip(examples, others, strict=True)
    ]
    for metric, most in (("exact_match", 0.01), ("function", 0.4), ("slots_f1", 0.15)):
        assert sum(scores[metric] for scores in chance) < most * count
