"""A result's folder on the Hub: what would go there, and how it goes.

Weights go as they are. Small files are read first: paths of this machine are taken out of the
configs, and a file that still names one, or holds a secret, is refused. Files that no loader reads
stay here.
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from trainer.config import files
from trainer.config.secrets import redact
from trainer.evaluation.run_summary import record_of
from trainer.exporting import card, card_metadata
from trainer.exporting.card_loading import PLACE
from trainer.storage import door
from trainer.storage.door import FolderError

WEIGHTS = (".safetensors", ".gguf")
TEXTS = (".json", ".jinja", ".txt", ".model", ".svg", ".md")
NAMES = ("Modelfile",)
BINARY = (".model",)  # sentencepiece
# Vocabularies: their words may look like paths, and hold none.
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
# Configs whose texts may name a folder of this machine.
CONFIGS = ("adapter_config.json", "config.json", "tokenizer_config.json", "generation_config.json")
LARGEST = 1 << 28  # bytes of a file that is read whole
HEADER = 1 << 24  # bytes of the header of a safetensors file


# modules of the client that huggingface_hub uses, whose errors say that there is no connection
CLIENTS = ("httpx", "httpcore", "httpx2", "httpcore2")


class UploadError(RuntimeError):
    """The folder cannot be uploaded as it is, or not by this user. The message says how to fix
    it."""


class HubError(RuntimeError):
    """The Hub fails or cannot be reached."""


@dataclass(frozen=True)
class Part:
    """One file: `content` replaces what the folder has. `note` says what was taken out."""

    name: str
    length: int  # in bytes
    content: bytes | None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """The files that would go to `repo`; `left` are files that stay here."""

    folder: Path
    repo: str
    parts: list[Part]
    left: list[str]


def folder_of(run: Path, part: str | None) -> Path:
    """Return the folder of a run that is uploaded: `part`, by default adapter/ or drafter/.

    Raises:
        FolderError: there is none.
    """
    names = [part] if part is not None else ["adapter", "drafter"]
    for name in names:
        folder = run / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise FolderError(f"part={name}: expected the name of a folder in {run}")
        if (folder.is_dir() and any(folder.rglob("*.safetensors"))) or any(folder.glob("*.gguf")):
            door.enter(folder)
            return folder
    exports = sorted(
        {file.parent.relative_to(run).parts[0] for file in run.glob("*/**/*.safetensors")}
        - {"checkpoints"}
    )
    there = f"it has {', '.join(exports)}" if exports else "the run has not ended yet"
    raise FolderError(f"{run} has no {' and no '.join(f'{name}/' for name in names)}: {there}")


def plan(run: Path, part: str | None, repo: str, base: str | None) -> Plan:
    """Read a folder, and return what would be uploaded. Nothing is written.

    Raises:
        FolderError: there is nothing to upload.
        UploadError: a file names a path of this machine, or holds a secret.
    """
    record_of(run)  # refuses a stranger's folder that no command reads
    folder = folder_of(run, part)
    parts, left = [], []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file() or name == card_metadata.FILE:
            continue
        if any(piece.startswith(".") for piece in Path(name).parts) or not _wanted(file):
            left.append(name)
        elif file.suffix in WEIGHTS:
            _refuse_header(file, name)
            parts.append(Part(name, file.stat().st_size, None))
        else:
            parts.append(_small(file, name, base))
    readme = _readme(run, folder, repo, base)
    parts.append(Part(card_metadata.FILE, len(readme), readme))
    for each in parts:
        if each.content is not None and not each.name.endswith(BINARY):
            _refuse_traces(each, run)
    return Plan(folder, repo, sorted(parts, key=lambda each: each.name), left)


def _wanted(file: Path) -> bool:
    return file.suffix in (*WEIGHTS, *TEXTS) or file.name in NAMES


def _small(file: Path, name: str, base: str | None) -> Part:
    content = files.read_bytes(file, LARGEST)
    if file.name not in CONFIGS:
        return Part(name, len(content), content)
    try:
        config = door.parse(content.decode("utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise UploadError(f"{file} is damaged: {door.reason(error)}") from None
    changed: list[str] = []
    config = _without_paths(config, base, changed)
    if not changed:
        return Part(name, len(content), content)
    text = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    return Part(name, len(text), text, f"local paths taken out of {', '.join(changed)}")


def _without_paths(value: Any, base: str | None, changed: list[str], key: str = "") -> Any:
    """Return a config with the last name of each local path; the base's is its name on the Hub."""
    if isinstance(value, dict):
        return {k: _without_paths(v, base, changed, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_paths(item, base, changed, key) for item in value]
    if not isinstance(value, str):
        return value
    of_base = key in ("base_model_name_or_path", "_name_or_path", "name_or_path", "base",
                      "base_model_id")  # fmt: skip
    if of_base and base is not None and value != base:
        changed.append(key)
        return base
    local = value.startswith(("/", "~/", "./", "../")) and "\n" not in value
    if local or (key in ("run", "path") and "/" in value):
        changed.append(key)
        return Path(value).name
    return value


def _readme(run: Path, folder: Path, repo: str, base: str | None) -> bytes:
    """The card, with its own repository's name and the base's."""
    file = folder / card_metadata.FILE
    if not file.exists():  # of an older version
        with tempfile.TemporaryDirectory() as temporary:
            for config in folder.glob("*.json"):
                if config.name in CONFIGS:
                    (Path(temporary) / config.name).write_bytes(files.read_bytes(config, LARGEST))
            to = "drafter" if folder.name.startswith("drafter") else folder.name
            card.write(Path(temporary), to, run, None)
            text = (Path(temporary) / card_metadata.FILE).read_text("utf-8").replace(
                f"\n![loss]({card.PICTURE})\n", ""
            )  # fmt: skip
    else:
        text = files.read_text(file, card_metadata.LARGEST)
    if card_metadata.MARK in text:
        text = text.replace(PLACE, repo)
        if base is not None:
            text = text.replace("path/to/base", base).replace(
                f"`{base}` is the base that it was trained on.\n\n", ""
            )
            edited = ModelCard(text, ignore_metadata_errors=True)
            edited.data["base_model"] = base
            text = str(edited)
    return text.encode("utf-8")


def _refuse_header(file: Path, name: str) -> None:
    """Refuse a file of weights whose description holds a secret."""
    if file.suffix != ".safetensors":
        return
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER + 1
        if length > HEADER:
            raise UploadError(f"{file} is damaged: it is no safetensors file")
        header = stream.read(length).decode("utf-8", "replace")
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError):
        raise UploadError(f"{file} is damaged: it is no safetensors file") from None
    if redact(text := json.dumps(metadata)) != text:
        raise UploadError(f"{name} holds what looks like a secret in its metadata: export it again")


def _refuse_traces(part: Part, run: Path) -> None:
    """Refuse a file that names a folder of this machine, or holds a secret.

    Raises:
        UploadError: names the file and what it holds.
    """
    assert part.content is not None
    text = part.content.decode("utf-8", "replace")
    if redact(text) != text:
        raise UploadError(
            f"{part.name} holds what looks like a secret: take it out, or remove the file"
        )
    if Path(part.name).name in VOCABULARIES:
        return
    places = {str(Path.home()), str(Path.cwd()), str(run.resolve()), str(run.resolve().parent)}
    for place in sorted(places - {"/", "/root", "."}, key=len, reverse=True):
        after = text.split(place)[1:]
        if any(not re.match(r"[\w.-]", rest[:1]) for rest in after):
            raise UploadError(
                f"{part.name} names a folder of this machine, {place}: take it out, or remove the"
                " file"
            )


def push(planned: Plan, private: bool) -> str:
    """Create the repository if there is none, upload all files as one commit, and return its
    address.

    Raises:
        UploadError: the Hub refuses. HubError: it fails, or cannot be reached.
    """
    api = HfApi()
    operations = [
        CommitOperationAdd(part.name, part.content or str(planned.folder / part.name))
        for part in planned.parts
    ]
    try:
        api.create_repo(planned.repo, private=private, exist_ok=True)
        commit = api.create_commit(
            planned.repo, operations, commit_message="Upload with graft push"
        )
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = str(error).strip().partition("\n")[0]
        if status in (401, 403):
            raise UploadError(
                f"the Hub does not let you write to {planned.repo} ({reason}): set HF_TOKEN to a"
                " token with write access, or run: hf auth login"
            ) from None
        kind = HubError if status is None or status >= 500 or status == 429 else UploadError
        raise kind(f"the Hub refuses {planned.repo}: {reason}") from None
    except huggingface_hub.errors.OfflineModeIsEnabled:
        raise UploadError("HF_HUB_OFFLINE is set: unset it to upload") from None
    except (OSError, ValueError, RuntimeError) as error:
        cause = f" {error.__cause__}" if error.__cause__ is not None else ""
        raise HubError(f"the upload to {planned.repo} failed: {error}{cause}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in CLIENTS:
            raise
        raise HubError(f"the Hub cannot be reached: {error or type(error).__name__}") from None
    return str(commit.repo_url)
