"""Words of a command line, checked and written as Hydra's overrides."""

from __future__ import annotations

import re

from trainer.config import schema
from trainer.config.errors import ConfigError
from trainer.config.quoting import key_of, quoted


def rewrite(argv: list[str], sweep: bool = False) -> list[str]:
    """Return the arguments as Hydra takes them.

    `experiment=x` works like `+experiment=x`. An unknown key below a group passes Hydra and reaches
    our own check, which suggests the right key. A value that Hydra's grammar cannot read is quoted.
    `sweep` says that commas separate values (--multirun).

    Raises:
        ConfigError: a key begins with a name that conf/ does not have.
    """
    words = [word for word in argv if "=" in word and re.match(r"[+~]*[A-Za-z_]", word)]
    check_keys(words)
    return [_rewritten(word, sweep) if word in words else word for word in argv]


def _rewritten(word: str, sweep: bool) -> str:
    key = word.partition("=")[0]
    if re.match(r"[+~]*hydra\b", key):
        return word
    word = quoted(word, sweep)
    if not re.match(r"[A-Za-z_]", word) or "@" in key or (schema.CONF / key).is_dir():
        return "+" + word if key == "experiment" else word
    return "++" + word


def settings() -> set[str]:
    """The names that an override may begin with: keys of conf/config.yaml, and groups."""
    return {*schema.load("config").children, *groups()}


def groups() -> list[str]:
    """The groups of conf/."""
    return sorted(path.name for path in schema.CONF.iterdir() if any(path.glob("*.yaml")))


def is_setting(key: str) -> bool:
    """Whether a key of a command line is that of a setting of conf/."""
    return re.split(r"[./]", key_of(key))[0] in settings()


def is_override(key: str) -> bool:
    """Whether a key is that of a setting of conf/, or of one that is misspelt or Hydra's: what
    composing a config accepts or explains."""
    return re.match(r"[+~]*[A-Za-z_]", key) is not None


def check_keys(words: list[str]) -> None:
    """
    Raises:
        ConfigError: names each override whose first name is neither a key nor a group.
    """
    known = settings()
    # `check` refuses a new node that names a class, in its own words
    ours = [word for word in words if not any(key in word for key in schema.INSTANTIATE_KEYS)]
    first = dict.fromkeys(re.split(r"[./]", key_of(word))[0] for word in ours)
    faults = [
        "slurm.KEY=VALUE is for jobs: graft submit ..."
        if name == "slurm"
        else f"{name}: there is no such key. {schema.nearest(name, sorted(known))}"
        " (conf/config.yaml)"
        for name in first
        if name not in known and name != "hydra"
    ]
    if faults:
        raise ConfigError("\n".join(faults))
