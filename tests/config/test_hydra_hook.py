"""The hook into Hydra is written for one version of Hydra, and says so for another."""

from __future__ import annotations

import inspect
from importlib import metadata

import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.experimental.callback import Callback

from trainer.config import hydra_hook


def wrapped(function):
    return getattr(function, "__wrapped__", function)


def test_the_installed_hydra_is_the_one_that_the_hook_is_written_for():
    assert hydra.__version__ == metadata.version("hydra-core")
    hydra_hook.check_hydra(
        hydra.__version__,
        wrapped(ConfigLoaderImpl.load_configuration),
        wrapped(FileConfigSource.load_config),
    )


def test_the_composition_of_this_process_is_checked(compose):
    compose("experiment=smoke", "task.path=x")
    before = ConfigLoaderImpl.load_configuration
    assert before.checked
    compose("experiment=smoke", "task.path=x")
    assert ConfigLoaderImpl.load_configuration is before


@pytest.mark.parametrize("version", ["1.2.0", "1.4.0", "2.3.8", "1.30.0"])
def test_another_hydra_is_refused(version):
    compose, read = ConfigLoaderImpl.load_configuration, FileConfigSource.load_config
    with pytest.raises(RuntimeError, match=r"Install hydra-core==1\.3\.\*"):
        hydra_hook.check_hydra(version, wrapped(compose), wrapped(read))


def test_other_parameters_are_refused():
    def compose(self, config_name, overrides, strict, run_mode): ...

    def read(self, config_path): ...

    with pytest.raises(RuntimeError, match="configs could not be checked"):
        hydra_hook.check_hydra("1.3.8", compose, read)


def test_hydra_has_no_hook_that_a_program_could_install_itself():
    """Its callbacks are named in the config, which is what must be checked before. If it offers
    another way, the two replaced functions may no longer be needed."""
    hooks = {name for name, _ in inspect.getmembers(Callback, inspect.isfunction)}
    assert hooks == {
        "on_job_end", "on_job_start", "on_multirun_end", "on_multirun_start", "on_run_end",
        "on_run_start",
    }  # fmt: skip
    assert list(inspect.signature(hydra.main).parameters) == [
        "config_path",
        "config_name",
        "version_base",
    ]
