"""Write docs/cli.md from the help texts, and docs/knobs.md from the comments of conf/.

    python -m scripts.docs [check=true]

check=true writes nothing, and exits with 1 if a page differs. `make docs` writes them before it
builds the site.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer.config import conflicts, schema

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GROUPS = {
    "base": "The frozen model.",
    "task": "The data, and how answers are graded.",
    "adapter": "What is trained on the frozen base.",
    "penalty": "A term that is added to the task's loss.",
    "drafter": "A head that predicts further tokens.",
    "drafter_adapter": "What of an earlier head is trained, if not all of it.",
    "target": "The model that a draft head is trained for.",
    "objective": "Loss, clipping and recomputation.",
    "optimizer": "The optimiser.",
    "schedule": "How the learning rate changes over the run.",
    "branch": "Filled in by `graft cooldown`.",
    "callbacks": "Evaluation, checkpoints, progress; averaging and cooldown triggers.",
    "logger": "Dashboards.",
    "lightning": "Device, number of processes and strategy.",
}
CODE_NOTE = re.compile(r"(?:It is |[Ee]ach )?[Cc]alled with [^.]*(?:\.\s*|$)")


def commands() -> list[str]:
    """Return the commands: the files directly in trainer/ that have a `main`."""
    files = sorted((ROOT / "trainer").glob("[a-z]*.py"))
    return [file.stem for file in files if "\ndef main(" in file.read_text("utf-8")]


def help_of(module: str) -> str:
    """Return the output of `python -m MODULE --help`."""
    command = [sys.executable, "-m", module, "--help"]
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def cli() -> str:
    """Return the text of docs/cli.md."""
    lines = [
        "# Commands",
        "",
        "Generated from the help texts by `python -m scripts.docs`.",
        "",
        "`graft VERB`, `python -m trainer VERB` and `python -m trainer.VERB` are the same command.",
        "`graft` without a verb trains.",
        "",
        *_fenced("graft --help", help_of("trainer")),
    ]
    for name in commands():
        lines += [
            "",
            f"## {name}",
            "",
            *_fenced(f"graft {name} --help", help_of(f"trainer.{name}")),
        ]
    return "\n".join(lines) + "\n"


def _fenced(command: str, text: str) -> list[str]:
    return ["```text", f"$ {command}", text, "```"]


def knobs() -> str:
    """Return the text of docs/knobs.md."""
    lines = [
        "# Settings",
        "",
        "Generated from the comments of `conf/` by `python -m scripts.docs`.",
        "",
        "Write a setting on the command line as `KEY=VALUE`. `graft --cfg job` prints the composed",
        "config. Each entry has key, default, type and meaning. A default of `???` must be set.",
        "",
        "## The run",
        "",
        *_knobs(schema.load("config"), ""),
        *_conflicts("config"),
    ]
    for group, about in GROUPS.items():
        lines += ["", f"## {group}", "", about]
        for choice in schema.options(group):
            lines += _choice(group, choice)
    lines += ["", "## slurm", "", _head("slurm"), "", *_knobs(schema.load("slurm"), "slurm.")]
    lines += [
        "",
        "## experiment",
        "",
        "Chosen with `experiment=NAME`: settings that belong together.",
    ]
    for choice in schema.options("experiment"):
        lines += ["", f"### experiment={choice}", "", _head(f"experiment/{choice}")]
    return "\n".join(lines) + "\n"


def _choice(group: str, choice: str) -> list[str]:
    file = f"{group}/{choice}"
    content: Any = OmegaConf.to_container(OmegaConf.load(schema.CONF / f"{file}.yaml"))
    parents = [
        entry
        for entry in content.get("defaults") or []
        if isinstance(entry, str) and entry != "_self_"
    ]
    lines = ["", f"### {group}={choice}"]
    if head := _head(file):
        lines += ["", head]
    own = _knobs(schema.load(file), f"{group}.", f"conf/{file}.yaml")
    if parents:
        links = " and ".join(f"[{group}={parent}](#{group}{parent})" for parent in parents)
        lines += [
            "",
            f"All settings of {links}"
            + (", and with other values or further ones:" if own else "."),
        ]
    elif not own:
        lines += ["", "No settings."]
    return lines + ([""] if own else []) + own + _conflicts(file)


def _conflicts(file: str) -> list[str]:
    """Return a list entry for each row of the file's conflicts."""
    rows = [row for row in conflicts.table() if row.file == file]
    entries = [line for row in rows for line in _wrapped(f"- {_message(row)}")]
    return ["", "Does not go together:", "", *entries] if rows else []


def _message(row: conflicts.Conflict) -> str:
    """Return a row's message, with `...` for each value of the config."""
    return re.sub(r"\{[\w.]+\}", "...", row.message)


def _knobs(table: schema.Table, prefix: str, file: str | None = None) -> list[str]:
    """Return a list entry for each leaf; with `file`, only for those that this file sets."""
    lines = []
    for key, child in table.children.items():
        if isinstance(child, schema.Table):
            lines += _knobs(child, f"{prefix}{key}.", file)
        elif file is None or child.file == file:
            kind = f" (`{child.type}`)" if child.type else ""
            text = f"- `{prefix}{key}` = `{_plain(child.default)}`{kind}: {child.doc}"
            lines += _wrapped(text.rstrip(": "))
    return lines


def _wrapped(text: str) -> list[str]:
    """Wrap a list entry to lines of 100 columns, without breaking code spans."""
    whole = re.sub(r"`[^`]*`", lambda span: span[0].replace(" ", "\0"), text)
    broken = textwrap.wrap(
        whole, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return [line.replace("\0", " ") for line in broken]


def _plain(value: Any) -> str:
    """Format a value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return str(value)


def _sentence(text: str) -> str:
    return (text[:1].upper() + text[1:]).rstrip(".") + "." if text else ""


def _head(file: str) -> str:
    """Return the comment at the top of a file of conf/, without notes for developers."""
    lines = []
    for line in (schema.CONF / f"{file}.yaml").read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not re.match(r"# (@package|open:)", line):
            lines.append(line.lstrip("# ").rstrip())
    text = CODE_NOTE.sub("", " ".join(lines)).strip()
    return "\n".join(
        textwrap.wrap(
            _sentence(text.replace("<", "&lt;")),
            100,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def main(check: bool) -> int:
    """Write both pages, or compare them."""
    code = 0
    for path, text in ((DOCS / "cli.md", cli()), (DOCS / "knobs.md", knobs())):
        if not check:
            path.write_text(text, "utf-8")
        elif path.read_text("utf-8") != text:
            print(f"{path} is out of date: run python -m scripts.docs and commit it")
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(check="check=true" in sys.argv[1:]))
