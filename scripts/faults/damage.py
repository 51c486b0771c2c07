"""Files that were truncated, or in which one bit was flipped: checkpoints, caches, data, and a
run's records."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from scripts.faults import cases
from scripts.faults.cases import STEPS, Place
from scripts.faults.ledger import Ledger
from scripts.faults.points import POINTS


def cut(path: Path) -> None:
    """cut off"""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def flip(path: Path) -> None:
    """with a bit flipped"""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = (cut, flip)


def inject(place: Place, ledger: Ledger) -> None:
    """Damage each kind of file in each way; a killed run must notice it when it resumes."""
    for damage in DAMAGES:
        cuts = damage is cut
        for case in ("lora", "rosa"):
            one(place, ledger, case, "the newest checkpoint", damage, newest, "is damaged")
        one(
            place,
            ledger,
            "lora",
            "the newest checkpoint's manifest",
            damage,
            manifest,
            "is damaged" if cuts else None,
        )
        one(
            place,
            ledger,
            "lora",
            "every checkpoint",
            damage,
            every,
            "every checkpoint of this run is damaged",
            (2,),
        )
        one(place, ledger, "lora", "the cache of tokens", damage, tokens, None)
        one(place, ledger, "lora", "metrics.jsonl", damage, journal_end, None)
        one(place, ledger, "lora", "run.yaml", damage, record, None, (2,) if cuts else (0, 2))
        one(
            place,
            ledger,
            "lora",
            "the data file",
            damage,
            rows,
            "rows.jsonl:" if cuts else None,
            (2,) if cuts else (1, 2),
        )
        one(
            place,
            ledger,
            "eagle3",
            "a shard of features",
            damage,
            shard,
            None if cuts else "shard-",
            (0,) if cuts else (2,),
        )


def newest(place: Place, name: str) -> list[Path]:
    """Return the newest checkpoint."""
    return every(place, name)[-1:]


def manifest(place: Place, name: str) -> list[Path]:
    """Return the newest checkpoint's manifest."""
    return [newest(place, name)[0].with_suffix(".json")]


def every(place: Place, name: str) -> list[Path]:
    """Return all checkpoints."""
    from trainer.storage import checkpoints

    return [saved.path for saved in checkpoints.complete(place.runs / name / "checkpoints")]


def tokens(place: Place, name: str) -> list[Path]:
    """Return the tokenised training rows: the largest table of the run's cache."""
    return [
        max(
            (place.path / "cache" / name / "tokens").glob("**/*.arrow"),
            key=lambda path: path.stat().st_size,
        )
    ]


def journal_end(place: Place, name: str) -> list[Path]:
    """Return the journal."""
    return [place.runs / name / "metrics.jsonl"]


def record(place: Place, name: str) -> list[Path]:
    """Return the run's record, run.yaml."""
    return [place.runs / name / "run.yaml"]


def rows(place: Place, name: str) -> list[Path]:
    """Return the data file, which only this run reads."""
    return [place.path / name / "rows.jsonl"]


def shard(place: Place, name: str) -> list[Path]:
    """Return a shard of features."""
    return sorted((place.path / "features" / name).glob("shard-*.safetensors"))[1:2]


def one(
    place: Place,
    ledger: Ledger,
    case: str,
    what: str,
    damage: Callable[[Path], None],
    files: Callable[[Place, str], list[Path]],
    expected: str | None,
    codes: tuple[int, ...] = (0,),
) -> None:
    """Kill a run, damage `files`, and start it again. It has to report `wanted` and exit with one
    of `codes`. If that is not 0, the files are repaired as the message says, and the run has to end
    like an undisturbed one.

    Damaged journals are left out of the comparison.
    """
    fault = f"{what} {damage.__doc__}"
    if not ledger.due("damage", case, fault):
        return
    cases.reference(place, case)
    name = cases.cleared(place, f"{case}-{damage.__name__}-{files.__name__}")
    own = place.path / name / "rows.jsonl"
    own.parent.mkdir(exist_ok=True)
    shutil.copyfile(place.rows, own)
    path = [f"task.path={own}"] if files is rows else []
    cases.start(place, case, name, *path, before=POINTS["mid_window"]).wait()
    damaged = files(place, name)
    contents = {file: file.read_bytes() for file in damaged}
    for file in damaged:
        damage(file)
    child = cases.start(place, case, name, *path)
    ended, output = child.wait(), child.output()
    line = child.message(expected) if expected else child.message("ERROR")
    traced = "Traceback" in output
    ok = (expected is None or bool(line)) and ended in codes and not traced
    if ended != 0:
        for file in damaged:
            if files is shard:
                file.unlink()  # the fix that the message names
            else:
                file.write_bytes(contents[file])
        cases.finish(cases.start(place, case, name, *path))
    same = cases.same(place, case, name)
    identical = same["weights"] and (files is journal_end or same["logged"])
    if traced:
        line = "a traceback: " + output.strip().splitlines()[-1]
    ledger.add(
        "damage",
        case,
        fault,
        code=ended,
        said=line or (f"exit code {ended}" if ended else ""),
        same=identical,
        ok=ok and identical,
    )


assert STEPS > 11
