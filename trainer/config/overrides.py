"""Words of a command line: check their keys, and write them as Hydra's overrides."""

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
    argv = [_of_drafter(word) for word in argv]
    words = [word for word in argv if "=" in word and re.match(r"[+~]*[A-Za-z_]", word)]
    check_keys(words)
    return [_rewrite(word, sweep) if word in words else word for word in argv]


def _of_drafter(word: str) -> str:
    """Return drafter.adapter=lora and drafter.adapter.r=8 in the names of conf/drafter_adapter."""
    word = re.sub(r"^(\+*)drafter[./]adapter(?=[.=])", r"\1drafter_adapter", word)
    return re.sub(r"^(\+*drafter_adapter\.)r=", r"\1rank=", word)


def _rewrite(word: str, sweep: bool) -> str:
    key = word.partition("=")[0]
    if re.match(r"[+~]*hydra\b", key):
        return word
    word = quoted(word, sweep)
    if not re.match(r"[A-Za-z_]", word) or "@" in key or (schema.CONF / key).is_dir():
        return "+" + word if key == "experiment" else word
    return "++" + word


def settings() -> set[str]:
    """Return the names that an override may begin with: keys of conf/config.yaml, and groups."""
    return {*schema.load("config").children, *groups()}


def groups() -> list[str]:
    """Return the groups of conf/."""
    return sorted(path.name for path in schema.CONF.iterdir() if any(path.glob("*.yaml")))


def is_setting(key: str) -> bool:
    """Return whether a key of a command line names a setting of conf/."""
    return re.split(r"[./]", key_of(key))[0] in settings()


def is_override(key: str) -> bool:
    """Return whether a key can be an override: a setting of conf/ or Hydra's, perhaps misspelt.
    Composing a config accepts or explains it."""
    return re.match(r"[+~]*[A-Za-z_]", key) is not None


def is_inherited(override: str) -> bool:
    """Return whether a new run may take an override from the record of another one. The record may
    come from a stranger: Hydra's own settings, the places of files and what runs code are not taken
    from it, nor words that are no overrides."""
    key, equals, _ = override.partition("=")
    removes = override.startswith("~")
    return (
        bool(equals or removes)
        and is_setting(key)
        and key_of(key) not in ("runs", "resume", "target.features")
        and not key_of(key).endswith("harness_include")
    )


def check_keys(words: list[str]) -> None:
    """Check the first name of each override.

    Raises:
        ConfigError: lists the names that are neither a key nor a group.
    """
    known = settings()
    # `compose.check` has its own message for a new node that names a class
    ours = [word for word in words if not any(key in word for key in schema.INSTANTIATE_KEYS)]
    names = dict.fromkeys(re.split(r"[./]", key_of(word))[0] for word in ours)
    faults = [
        "slurm.KEY=VALUE is for jobs: graft submit ..."
        if name == "slurm"
        else f"{name}: there is no such key. {schema.hint(name, sorted(known))} (conf/config.yaml)"
        for name in names
        if name not in known and name != "hydra"
    ]
    if faults:
        raise ConfigError("\n".join(faults))
