"""The layers that a stopped `graft shrink` has finished.

They are in .NAME.shrink next to the output folder NAME, with the settings that they were made with.
The folder is removed when the output is complete. Layers of other settings are removed.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from trainer.shrinking.families import replace
from trainer.storage import atomic, door
from trainer.storage.run_folder import FolderError

log = logging.getLogger("trainer")


class Resumed:
    """The finished layers of one output folder, locked by one process.

    Raises:
        FolderError: another process makes the same folder, or a link has this name.
    """

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.path = out.with_name(f".{out.name}.shrink")
        self.out, self.settings = out, settings

    def __enter__(self) -> Resumed:
        if self.path.is_symlink():
            raise FolderError(f"{self.path} is a link, and layers would be written elsewhere")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise FolderError(
                f"{self.out} is being made by another process. Wait for it, or choose another to="
            ) from None
        record = self.path / "settings.json"
        try:
            same = door.json_file(record, dict) == self.settings
        except (OSError, ValueError):
            same = False
        if not same:
            for file in (*self.path.glob("layer-*.safetensors"), *self.path.glob("search.json")):
                file.unlink()
            atomic.write_text(record, json.dumps(self.settings, indent=2) + "\n")
        elif done := len(list(self.path.glob("layer-*.safetensors"))):
            log.warning("%s: %d layers are finished, and the others follow", self.path, done)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._lock.release()
        if kind is None:
            shutil.rmtree(self.path, ignore_errors=True)

    def load(self, index: int, layer: nn.Module) -> dict[str, Any] | None:
        """Put a finished layer in place and return its figures; None if it is not finished, or its
        file is damaged."""
        file = self._file(index)
        if not file.is_file():
            return None
        device = next(layer.parameters()).device
        try:
            with safe_open(file, "pt", device=str(device)) as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                figures: dict[str, Any] = json.loads(opened.metadata()["figures"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            file.unlink()
            return None
        replace(layer, tensors)
        return figures

    def save(self, index: int, layer: nn.Module, figures: dict[str, Any]) -> None:
        """Keep a finished layer."""
        tensors = {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}
        with atomic.file(self._file(index)) as temporary:
            save_file(tensors, temporary, {"figures": json.dumps(figures)})

    def _file(self, index: int) -> Path:
        return self.path / f"layer-{index:04d}.safetensors"
