"""report.html: a run to look at, in one file that needs no network.

    python -m trainer.report run=FOLDER

makes it anew from what the run folder holds. A run writes it when it ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.session.report_html import write


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from trainer.config.errors import EXIT_BAD_INPUT
    from trainer.config.options import arguments

    folder = Path(arguments(argv, {"run": ...}, __doc__ or "")["run"]).expanduser()
    if not (folder / "run.yaml").exists():
        print(f"{folder} is no run folder: it has no run.yaml", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(write(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
