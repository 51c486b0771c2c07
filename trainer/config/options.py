"""Options of commands: `KEY=VALUE` words of a command line into a frozen dataclass.

A command declares its options as fields made by `option` and `rest`; the annotation is the type:
str, int, float, bool, Path, Literal[...], and unions of these with each other and None.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import signal
import sys
import textwrap
import threading
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from trainer.config import files
from trainer.config.errors import PANIC, bad, code_of, panicked, unwritable
from trainer.config.secrets import redact, redact_logs
from trainer.config.shown import protect_console, say

T = TypeVar("T")
PIPE_CLOSED = 141  # what a shell reports for a program that ends at `| head`: 128 + SIGPIPE
INTERRUPTED = 130  # 128 + SIGINT
WIDTH = 100
COLUMN = 34  # where the explanations of options begin
BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "at least": lambda value, bound: value >= bound,
    "above": lambda value, bound: value > bound,
    "at most": lambda value, bound: value <= bound,
    "below": lambda value, bound: value < bound,
}


def option(
    text: str,
    default: Any = dataclasses.MISSING,
    *,
    value: str = "",
    key: str = "",
    writes: bool | Literal["folder"] = False,
    reads: Callable[[str], str | None] | None = None,
    **limits: float | None,
) -> Any:
    """Declare an option; without a default it is required.

    Args:
        text: what it does, for --help.
        value: how --help writes its value, if it has no default to show.
        key: its name on the command line, if that is no name of a field.
        writes: it is a file to write, whose folder must exist, or a folder.
        reads: it is a path to read; returns what is wrong with it, as trainer.config.paths does.
        limits: at_least, above, at_most or below, of a number.
    """
    named = {name.replace("_", " "): limit for name, limit in limits.items()}
    bounds = {name: named.pop(name) for name in BOUNDS if named.get(name) is not None}
    if any(limit is not None for limit in named.values()):
        raise TypeError(f"no limit of an option: {', '.join(named)}")
    metadata: dict[str, Any] = {"text": text, "value": value, "key": key, "bounds": bounds}
    metadata |= {"writes": writes, "reads": reads}
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def rest(text: str, value: str, takes: Callable[[str], bool]) -> Any:
    """Declare a field for the words whose key `takes` accepts, such as settings of conf/: a tuple
    of words as they are."""
    metadata = {"text": text, "value": value, "takes": takes}
    return dataclasses.field(default=(), metadata=metadata, kw_only=True)


def places(text: str, value: str) -> Any:
    """Declare a field for the words that are no KEY=VALUE: a tuple of paths, as a shell makes them
    of `runs/*`. A path may have = in its name."""
    metadata = {"text": text, "value": value, "takes": lambda key: False, "places": True}
    return dataclasses.field(default=(), metadata=metadata, kw_only=True)


def parse(kind: type[T], argv: list[str], text: str | None, command: str) -> T:
    """Read a command's options. If `kind` has a method `faults`, it yields messages about options
    that do not go together.

    Raises:
        SystemExit: 0 after --help, which prints `text` and the options; 2 with every fault.
    """
    if "-h" in argv or "--help" in argv:
        say(f"{(text or '').strip()}\n\n{_table(kind)}")
        raise SystemExit(0)
    redact_logs()
    values, faults = _values(kind, argv)
    result = None if faults else kind(**values)
    if result is not None:
        faults += [*getattr(result, "faults", tuple)(), *_unreadable(result)]
    if result is None or faults:
        hint = f"{command} --help shows the options"
        raise SystemExit(bad("\n".join([hint, *faults])))
    protect_console()  # here, as it imports rich
    return result


def _unreadable(options: Any) -> Iterator[str]:
    """Yield what is wrong with the paths that are read."""
    for field in dataclasses.fields(options):
        reads, value = field.metadata.get("reads"), getattr(options, field.name)
        if reads and value is not None and (fault := reads(str(value))):
            yield f"{_key(field)}={value}: {fault}"


def values_of(options: Any) -> dict[str, Any]:
    """Return the options by their names on the command line, without those that `rest` declares."""
    fields = [field for field in dataclasses.fields(options) if "takes" not in field.metadata]
    return {_key(field): getattr(options, field.name) for field in fields}


def _key(field: dataclasses.Field[Any]) -> str:
    return field.metadata.get("key") or field.name


def _values(kind: Any, argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return (the values of the fields by name, the faults)."""
    fields, hints = dataclasses.fields(kind), typing.get_type_hints(kind)
    known = {_key(field): field for field in fields if "takes" not in field.metadata}
    rests = [field for field in fields if "takes" in field.metadata]
    values: dict[str, Any] = {}
    faults = []
    bare = next((field.name for field in fields if field.metadata.get("places")), None)
    for word in argv:
        key, equals, value = word.partition("=")
        if bare and key not in known and (not equals or "/" in key or Path(word).exists()):
            values[bare] = (*values.get(bare, ()), word)
            continue
        takers = [field for field in rests if field.metadata["takes"](key)]
        if takers and word.startswith("~"):
            values[takers[0].name] = (*values.get(takers[0].name, ()), word)
        elif not equals:
            faults.append(f"{word}: expected KEY=VALUE, in quotes if it has spaces")
        elif key in known:
            field = known[key]
            try:
                values[field.name] = _checked(value, hints[field.name], field.metadata)
            except ValueError as error:
                faults.append(f"{word}: {error}")
        elif takers and (option := _misspelt(key, known)) is None:
            values[takers[0].name] = (*values.get(takers[0].name, ()), word)
        elif takers:
            faults.append(f"{word}: there is no such option or setting. Did you mean {option}?")
        else:
            faults.append(f"{word}: there is no such option. {_nearest(key, known, rests)}")
    keys = {word.partition("=")[0] for word in argv}
    required = [f for f in known.values() if f.default is dataclasses.MISSING]
    missing = [f"missing: {_shown(f)}" for f in required if _key(f) not in keys]
    # A misspelt option is often the missing one: report the misspelling alone.
    taken = {key for field in rests for key in keys if field.metadata["takes"](key)}
    taken = {key for key in taken if _misspelt(key, known) is None}
    misspelt = keys - {*known} - taken
    return values, faults if misspelt else faults + missing


def _misspelt(key: str, known: dict[str, Any]) -> str | None:
    """Return the option that a key resembles, if the key is no setting."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if not close or not key.isidentifier():
        return None
    from trainer.config.overrides import settings

    near = difflib.get_close_matches(key, [close[0], *sorted(settings())], n=1)
    return close[0] if key not in settings() and near == close else None


def _nearest(key: str, known: dict[str, Any], rests: list[Any]) -> str:
    names = [*known]
    if rests:
        from trainer.config.overrides import settings

        names += [name for name in sorted(settings()) if rests[0].metadata["takes"](name)]
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}."


def _checked(text: str, hint: Any, metadata: Any) -> Any:
    """Convert an option's text to a value of its type, within its bounds.

    Raises:
        ValueError: says what was expected.
    """
    bounds = metadata["bounds"]
    try:
        value = _read(text, hint)
    except ValueError:
        close = difflib.get_close_matches(text, choices_of(hint), n=1, cutoff=0.6)
        close_text = f". Did you mean {close[0]}?" if close else ""
        raise ValueError(f"expected {_expected(hint, bounds)}{close_text}") from None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not all(BOUNDS[name](value, bound) for name, bound in bounds.items()):
        raise ValueError(f"expected {_expected(hint, bounds)}")
    if metadata["writes"] and isinstance(value, Path):
        check = files.place_fault if metadata["writes"] == "folder" else files.output_fault
        if (fault := check(value)) is not None:
            raise ValueError(fault)
    return value


def members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type."""
    return (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )


def choices_of(hint: Any) -> list[str]:
    """Return the literal values that a type takes."""
    literals = [m for m in members(hint) if typing.get_origin(m) is Literal]
    return [str(choice) for member in literals for choice in typing.get_args(member)]


def _read(text: str, hint: Any) -> Any:
    """Convert a text to the first of its types that can read it.

    Raises:
        ValueError: none of the types can.
    """
    for member in members(hint):
        if member is types.NoneType:
            if text == "null":
                return None
        elif typing.get_origin(member) is Literal:
            if text in typing.get_args(member):
                return text
        elif member is bool:
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
        elif member is Path:
            # a union may end in None, and null is not a path then
            if not (text == "null" and types.NoneType in members(hint)):
                return Path(text).expanduser()
        elif member is str:
            if not (text == "null" and types.NoneType in members(hint)):
                return text
        else:
            try:
                value = member(text)
            except ValueError:
                continue
            if math.isfinite(value):
                return value
    raise ValueError(text)


def _expected(hint: Any, bounds: dict[str, float]) -> str:
    """Describe the values that an option takes."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    limit = " and".join(f" {name} {bound:g}" for name, bound in bounds.items())
    limit = f",{limit}" if limit else ""
    parts = [names[member] + limit for member in members(hint) if member in (int, float)]
    parts += [names[member] for member in members(hint) if member in (bool, str)]
    choices = choices_of(hint)
    parts += [f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]] if choices else []
    parts += ["null"] if types.NoneType in members(hint) else []
    return ", or ".join(parts)


def _shown(field: dataclasses.Field[Any]) -> str:
    """Format an option as --help writes it."""
    default, value = field.default, field.metadata["value"]
    if default is not None and default is not dataclasses.MISSING:
        value = value or (str(default).lower() if isinstance(default, bool) else f"{default}")
    return f"{_key(field)}={value or 'VALUE'}"


def _table(kind: Any) -> str:
    """Format the options of a command for --help."""
    return "Options\n" + "\n".join(line for field in _lines(kind) for line in field)


def _lines(kind: Any) -> Iterator[list[str]]:
    hints = typing.get_type_hints(kind)
    fields = sorted(dataclasses.fields(kind), key=_group)
    for field in fields:
        text = field.metadata["text"]
        if "takes" in field.metadata:
            head = field.metadata["value"]
        else:
            head = _shown(field)
            if choices := choices_of(hints[field.name]):
                text += f" ({', '.join(choices)})"
            if field.default is dataclasses.MISSING:
                text += " (required)"
        lines = textwrap.wrap(text, WIDTH - COLUMN)
        if len(head) + 4 > COLUMN - 1:
            lines.insert(0, "")
        yield [
            f"{'    ' + head:<{COLUMN if lines[0] else 0}}{lines[0]}",
            *(" " * COLUMN + line for line in lines[1:]),
        ]


def _group(field: dataclasses.Field[Any]) -> int:
    """Return a field's rank in --help: required options first, words of `rest` last."""
    return 2 if "takes" in field.metadata else int(field.default is not dataclasses.MISSING)


def exit_with(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command on the arguments of this process, and exit with its code.

    Exit without a traceback after Ctrl-C, and if the reader of the output has closed it (`| head`).
    """
    if threading.current_thread() is threading.main_thread():
        # during the imports a handler of the package's __init__ is there
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            code: Any = main(sys.argv[1:])
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        # Python flushes again as it exits, which would raise once more: redirect it to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = PIPE_CLOSED
    except BaseException as error:
        if type(error).__name__ == PANIC:
            code = bad(panicked(error))
        elif (message := unwritable(error)) is not None:
            bad(message)
            code = code_of(error)
        else:  # as Python prints it, without secrets, and its text may be of a stranger
            say(redact(traceback.format_exc()), end="", file=sys.stderr)
            code = 1
    sys.exit(code)
