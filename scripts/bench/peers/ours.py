"""The program as `python -m trainer OVERRIDES` runs it, in this process; its step times and losses
are in its own journal."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    result, *overrides = sys.argv[1:]
    sys.argv = ["trainer", *overrides]
    from trainer.__main__ import run_words

    if code := run_words(overrides):
        sys.exit(code)
    import measuring  # not before, since what it imports is no part of the program

    Path(result).write_text(json.dumps(measuring.memory()), "utf-8")


if __name__ == "__main__":
    main()
