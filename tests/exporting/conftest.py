"""Exports of these tests have model cards without a picture, which takes half a second to draw."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def plain_cards(request, monkeypatch):
    """Draw the picture of a card in the tests of cards alone."""
    from trainer.exporting import card

    if request.path.stem not in ("test_card", "test_upload"):
        monkeypatch.setattr(card, "_curves", lambda source: [])


@pytest.fixture(scope="session", autouse=True)
def engines_end():
    """End the processes of engines."""
    yield
    from tests.exporting.engines import environments

    environments.end()
