"""The hook into Hydra's composition: the one place that replaces functions of Hydra.

Hydra composes a config, then creates a folder, configures logging and instantiates callbacks from
it, all before the program's own code runs. Hydra's own callbacks are no place for the checks: the
config names them, and it is the config that must be checked. So the two functions that compose are
wrapped.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

VERSIONS = "1.3"  # of Hydra; the two functions are private, so others may differ
COMPOSE = ["self", "config_name", "overrides", "run_mode", "from_shell", "validate_sweep_overrides"]
READ = ["self", "config_path"]


def install(
    check_overrides: Callable[[list[str]], None],
    check_config: Callable[[DictConfig, list[str]], None],
    check_file: Callable[[Path], None],
) -> None:
    """Pass every composition of this process through three checks: of the overrides before
    composing, of the composed config, and of each file before it is parsed. A check raises to
    refuse. A second call changes nothing.

    Raises:
        RuntimeError: Hydra has another version, or its functions have other parameters.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    # Hydra executes its plugins' modules to load them, which defines FileConfigSource again. So
    # load them first, and get the class afterwards.
    Plugins.instance()
    file_source: Any = SourcesRegistry.instance().resolve("file")
    compose, read = ConfigLoaderImpl.load_configuration, file_source.load_config
    if getattr(compose, "checked", False):
        return
    check_hydra(hydra.__version__, compose, read)

    @functools.wraps(compose)
    def checked_compose(
        self: Any, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        check_overrides(overrides)
        config = compose(self, config_name, overrides, *args, **kwargs)
        check_config(config, overrides)
        return config

    @functools.wraps(read)
    def checked_read(self: Any, config_path: str) -> Any:
        name = config_path if config_path.endswith(".yaml") else f"{config_path}.yaml"
        check_file(Path(self.path, name))
        return read(self, config_path)

    checked_compose.checked = True  # type: ignore[attr-defined]
    ConfigLoaderImpl.load_configuration = checked_compose  # type: ignore[method-assign]
    file_source.load_config = checked_read


def check_hydra(version: str, compose: Callable[..., Any], read: Callable[..., Any]) -> None:
    """Check that these are the functions that `install` is written for.

    Raises:
        RuntimeError: they are not.
    """
    parameters = [list(inspect.signature(function).parameters) for function in (compose, read)]
    if version.split(".")[:2] != VERSIONS.split(".") or parameters != [COMPOSE, READ]:
        raise RuntimeError(
            f"Hydra {version} composes configs differently from {VERSIONS}.x, so configs could not"
            f" be checked. Install hydra-core=={VERSIONS}.*"
        )
