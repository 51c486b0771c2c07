"""The models by name, while runs are loaded and unloaded."""

from __future__ import annotations

import threading

from trainer.config import paths
from trainer.serving.errors import ApiError
from trainer.serving.models import BASE, Loader, Served

NO_LOADING = (
    "this server loads no runs: it can be reached from other machines, and a path is one of this"
    " machine. Start it without host="
)


class Registry:
    """The models. Its dictionary is replaced and never changed, so that each reader has one state
    of it. Without a loader nothing is loaded or unloaded."""

    def __init__(self, models: dict[str, Served], loader: Loader | None):
        self.models, self.loader = models, loader
        self.changing = threading.Lock()

    def check(self, name: str, path: str, replaces: bool) -> None:
        """Check a run by its name and its folder.

        Raises:
            ApiError: it cannot be loaded under this name.
        """
        self._loader()
        if name == BASE:
            raise ApiError(400, f"lora_name={name} is the base: choose another name", "lora_name")
        if name in self.models and not replaces:
            raise ApiError(
                400,
                f"lora_name={name} is loaded already: unload it, choose another name, or replace"
                " it by load_inplace=true",
                "lora_name",
            )
        try:
            fault = paths.saved_fault(path)
        except (OSError, ValueError) as error:  # a name that no folder can have
            fault = str(error)
        if fault is not None:
            raise ApiError(400, f"lora_path={path[:200]!r}: {fault}", "lora_path")

    def load(self, name: str, path: str, replaces: bool) -> str:
        """Load a run, in the worker's thread, and return a line about it.

        Raises:
            ApiError: as `check`, which another request may have overtaken.
            as Loader.load.
        """
        self.check(name, path, replaces)
        model = self._loader().load(path, name)
        with self.changing:
            self.models = {**self.models, name: model}
        return f"loaded {name}: step {model.step} of {path}"

    def unload(self, name: str) -> str:
        """Remove a model and return a line about it.

        Raises:
            ApiError: there is none of this name, or it is the base.
        """
        self._loader()
        with self.changing:
            if name == BASE:
                raise ApiError(400, f"lora_name={name}: the base stays", "lora_name")
            if name not in self.models:
                known = ", ".join(other for other in self.models if other != BASE) or "none"
                raise ApiError(
                    404,
                    f"lora_name={name!r}: there is no such run. Loaded: {known}",
                    "lora_name",
                    "model_not_found",
                )
            self.models = {key: model for key, model in self.models.items() if key != name}
        return f"unloaded {name}"

    def _loader(self) -> Loader:
        if self.loader is None:
            raise ApiError(403, NO_LOADING, code="no_loading")
        return self.loader
