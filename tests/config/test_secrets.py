"""Secrets, by their form and by the environment's names: found in configs, taken out of texts and
logs."""

from __future__ import annotations

import io
import logging

import pytest
from omegaconf import OmegaConf

from tests.toys.secrets import SECRETS
from trainer.config import secrets
from trainer.config.errors import bad


@pytest.fixture(autouse=True)
def exported(monkeypatch):
    for name, value in (SECRETS | {"EMPTY_TOKEN": "", "SHORT_TOKEN": "ab"}).items():
        monkeypatch.setenv(name, value)


def test_redaction():
    text = f"train about={' '.join(SECRETS.values())} key=sk-abcdefghijklmnopqrstuvwx ab {'0' * 64}"
    redacted = secrets.redact(text)
    assert redacted == f"train about={' '.join(['[redacted]'] * 4)} key=[redacted] ab {'0' * 64}"
    assert secrets.redact("nothing here") == "nothing here"


def test_logs_and_messages_hold_no_secret(capsys):
    secrets.redact_logs()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = logging.Logger("one of its own")
    log.addHandler(handler)
    log.info("asked %s of %s", SECRETS["HF_TOKEN"], "it")
    try:
        raise ValueError(SECRETS["SOME_PASSWORD"])
    except ValueError:
        log.exception("failed")
    bad(f"it has {SECRETS['AWS_SECRET_ACCESS_KEY']}")
    message = stream.getvalue() + capsys.readouterr().err
    assert message.count("[redacted]") == 3
    assert "Traceback" in message
    assert not any(secret in message for secret in SECRETS.values())


def test_a_record_holds_no_exception_whose_text_has_a_secret():
    """Handlers that format the exception themselves, as rich's does, read exc_info."""
    secrets.redact_logs()
    records: list[logging.LogRecord] = []
    log = logging.Logger("a test's")
    log.addHandler(handler := logging.Handler())
    handler.emit = records.append  # type: ignore[method-assign]
    for text in (SECRETS["SOME_PASSWORD"], "nothing secret"):
        try:
            raise ValueError(text)
        except ValueError:
            log.exception("failed")
    assert records[0].exc_info is None
    assert "ValueError: [redacted]" in str(records[0].exc_text)
    assert records[1].exc_info is not None


def test_a_secret_in_a_config_is_named_by_its_place_alone():
    named = {
        "logger": {"api_key": "quiet"},
        "task": {"path": f"x{SECRETS['SOME_PASSWORD']}"},
        "base": {"revision": "0" * 40},
    }
    faults = list(secrets.secrets_in(OmegaConf.create(named)))
    assert [fault.split()[0] for fault in faults] == ["logger.api_key", "task.path"]
    assert "SOME_PASSWORD" in faults[1]
    assert not any(value in fault for fault in faults for value in ("quiet", *SECRETS.values()))
