"""Put a tiny random model of each family through loading, training, exports and decoding.

    python -m scripts.zoo [NAME ...] [checks=NAME,...] [results=FOLDER] [log=FILE] [again=true]

NAME is a family, such as qwen3, or a group, such as moe; by default all. A family whose results
are there is left out unless `again=true`. `checks=` runs some checks again, such as packing, and
those that they need; the other results stay. Results are JSON, one file a family, by default in
scripts/zoo/results. The last step writes docs/families.md from all of them. Nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: list[str]) -> int:
    """The program; see the module's text."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    options = dict(word.split("=", 1) for word in argv if "=" in word)
    names = [word for word in argv if "=" not in word]
    from scripts.zoo import checks, checks_decoder, checks_encoder, families, running, table  # noqa: F401

    every = families.every()
    known = {*every, *(family.group for family in every.values())}
    if unknown := sorted({*options} - {"results", "log", "again", "checks"} | {*names} - known):
        print(f"{', '.join(unknown)}: unknown\n\n{__doc__}", file=sys.stderr)
        return 2
    results = Path(options.get("results", RESULTS))
    log = Path(options["log"]) if "log" in options else None
    only = {check for check in options.get("checks", "").split(",") if check}
    if unknown_checks := only - {key for family in every.values() for key in family.checks}:
        print(f"checks={', '.join(sorted(unknown_checks))}: unknown", file=sys.stderr)
        return 2
    import trainer.run  # noqa: F401  # before the first fork

    for name, family in every.items():
        if names and not {name, family.group} & {*names}:
            continue
        if only:
            if not only & {*family.checks}:
                continue
            needed = only | {need for check, need in running.NEEDS.items() if check in only}
            chosen = {key: check for key, check in family.checks.items() if key in needed}
            family = replace(family, checks=chosen)
        elif (results / f"{name}.json").exists() and options.get("again") != "true":
            continue
        content = running.run(family, results, log, keep=bool(only))
        cells = {key: cell["outcome"] for key, cell in content["checks"].items()}
        print(name, " ".join(f"{key}={value}" for key, value in cells.items()), flush=True)
    print(table.counts(results))
    if results == RESULTS:
        table.write(results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
