"""W&B's settings of the current folder are ignored, unless they are asked for."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from trainer.callbacks import wandb_settings
from trainer.callbacks.wandb_settings import own_only, report_server


def default_server():
    from wandb.sdk.wandb_settings import Settings

    return Settings().base_url


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Reads W&B's settings, as it does at its start, in a folder with a stranger's file."""
    from wandb.sdk.wandb_settings import Settings

    read_settings = Settings.read_system_settings  # another test may have replaced it
    monkeypatch.setattr(
        Settings, "read_system_settings", getattr(read_settings, "whole", read_settings)
    )
    for name in ("wandb", ".wandb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings").write_text("[default]\nbase_url = http://evil.example\n")
    own = tmp_path / "own"
    own.write_text("[default]\nentity = me\n")
    monkeypatch.chdir(tmp_path)

    def read():
        built = Settings()
        built.settings_system = str(own)
        built.update_from_system_settings()
        return built

    return read


def test_wandb_alone_reads_the_settings_of_the_current_folder(settings):
    """If this fails, trainer/callbacks/wandb_settings.py need not keep it from that."""
    assert settings().base_url == "http://evil.example"


def test_a_strangers_settings_are_ignored_and_the_users_own_are_not(settings, monkeypatch, caplog):
    own_only()
    own_only()
    read = settings()
    assert (read.base_url, read.entity) == (default_server(), "me")
    assert "wandb/settings is ignored, since it may come from a stranger" in caplog.text
    monkeypatch.setenv(wandb_settings.TRUSTED, "true")
    assert settings().base_url == "http://evil.example"


def test_another_server_is_named(caplog):
    with caplog.at_level(logging.INFO):
        report_server(SimpleNamespace(settings=SimpleNamespace(base_url=default_server() + "/")))
        assert caplog.text == ""
        report_server(SimpleNamespace(settings=SimpleNamespace(base_url="http://x\x1b[2J")))
    assert "W&B: this run is sent to http://x\\x1b[2J" in caplog.text
