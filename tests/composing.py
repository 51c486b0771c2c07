"""Composes configs in tests as Hydra does, but reads and merges the files of conf/ once for each
choice of groups: later compositions copy the result and apply their single values to it.

The hook of trainer.config.hydra_hook, Hydra's parser and its errors are the real ones. Files
outside conf/ are read each time, and merged into what comes before them in the defaults list.
tests/config/test_composing.py compares both ways.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from omegaconf import flag_override
from omegaconf.errors import OmegaConfBaseException

from trainer.config.schema import CONF

# conf/ is a folder to `python -m trainer`, and a package where trainer.__main__ was imported.
OURS = {f"file://{CONF}", "pkg://conf", "pkg://hydra.conf", "structured://"}
create = config_loader_impl.create_defaults_list
merge = ConfigLoaderImpl._compose_config_from_defaults_list
read = ConfigRepository.load_config

files: dict[tuple[Any, ...], Any] = {}
lists: dict[tuple[Any, ...], Any] = {}
# By the id of a defaults list in `lists`, or by the first entries of another list.
merged: dict[tuple[Any, ...], bytes] = {}  # pickled: a copy costs a quarter of deepcopy's


def place(source: Any) -> str:
    """Where a source of files looks."""
    scheme = source.scheme()
    return f"{scheme}://{source.path.removeprefix(f'{scheme}://')}"


def read_once(repository: Any, config_path: str) -> Any:
    """ConfigRepository.load_config."""
    source = repository._find_object_source(config_path, ObjectType.CONFIG)
    if source is None or place(source) not in OURS:
        return read(repository, config_path)
    key = (place(source), config_path)
    if key not in files:
        files[key] = read(repository, config_path)
    return copy.deepcopy(files[key])


def create_once(
    repo: Any,
    config_name: str | None,
    overrides_list: list[Any],
    prepend_hydra: bool,
    skip_missing: bool,
) -> Any:
    """hydra._internal.defaults_list.create_defaults_list."""
    searched = tuple(map(place, repo.get_sources()))
    if not {*searched} <= OURS:
        return create(repo, config_name, overrides_list, prepend_hydra, skip_missing)
    overrides = [each for each in overrides_list if not each.is_sweep_override()]
    choices = [
        each
        for each in overrides
        if repo.group_exists(each.key_or_group) and not isinstance(each.value(), dict)
    ]
    lines = tuple(each.input_line for each in choices)
    key = (searched, config_name, lines, prepend_hydra, skip_missing)
    if key not in lists:
        lists[key] = create(repo, config_name, choices, prepend_hydra, skip_missing)
    values = [each for each in overrides if each not in choices]
    return dataclasses.replace(lists[key], config_overrides=values)


def merge_once(loader: Any, defaults: list[Any], repo: Any) -> Any:
    """ConfigLoaderImpl._compose_config_from_defaults_list."""
    if any(each.defaults is defaults for each in lists.values()):
        key, count = (id(defaults),), len(defaults)
    else:
        foreign = (at for at, each in enumerate(defaults) if not is_ours(each, repo))
        count = next(foreign, len(defaults))
        key = tuple(dataclasses.astuple(each) for each in defaults[:count])
    if key not in merged:
        merged[key] = pickle.dumps(merge(loader, defaults[:count], repo))
    config = pickle.loads(merged[key])
    try:
        with flag_override(config, "no_deepcopy_set_nodes", True):
            for each in defaults[count:]:
                config.merge_with(merge(loader, [each], repo))
    except OmegaConfBaseException:
        return merge(loader, defaults, repo)  # which raises Hydra's error
    return config


def is_ours(default: Any, repo: Any) -> bool:
    """Whether an entry of a defaults list is a file of conf/ or of Hydra's."""
    source = repo.delegate._find_object_source(default.config_path, ObjectType.CONFIG)
    return source is not None and place(source) in OURS


def install() -> None:
    """Compose this way in this process."""
    config_loader_impl.create_defaults_list = create_once
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once  # type: ignore[method-assign]
    ConfigRepository.load_config = read_once  # type: ignore[method-assign]


@contextlib.contextmanager
def as_hydra_does() -> Iterator[None]:
    """Compose without any of this."""
    config_loader_impl.create_defaults_list = create
    ConfigLoaderImpl._compose_config_from_defaults_list = merge  # type: ignore[method-assign]
    ConfigRepository.load_config = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        install()
