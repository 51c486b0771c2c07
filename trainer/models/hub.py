"""Bases from a local folder, a GGUF file or a name on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from tasks import wheel
from trainer.models.base import Base, BaseError
from trainer.models.gguf import convert


def from_hub(
    path: str,
    revision: str | None,
    gguf_file: str | None,
    dtype: str,
    attn_implementation: str,
    quantization: str,
    double_quant: bool,
    trust_remote_code: bool,
    add_tokens: Sequence[str],
) -> Base:
    """Return the base that `path` names: a name on the hub, a folder or a .gguf file. `gguf_file`
    is a file of the hub's repository.

    Raises:
        BaseError: there is no such file, or it cannot be read as a language model.
    """
    if gguf_file is not None:
        path = huggingface_hub.hf_hub_download(path, gguf_file, revision=revision)
    if path.endswith(".gguf"):
        file = Path(path).expanduser()
        if not file.is_file():
            raise BaseError(f"base.path={path!r}: there is no such file")
        path, revision = str(convert(file, wheel.sha256(file))), None
    elif Path(path).expanduser().is_dir():
        path = str(Path(path).expanduser().resolve())
    return Base(
        path,
        dtype,
        attn_implementation,
        quantization,
        double_quant,
        revision,
        trust_remote_code,
        add_tokens=tuple(add_tokens),
    )
