"""What is done before the libraries are imported."""

from __future__ import annotations

import gc

from trainer import imports


def test_swift_imports_collect_no_garbage(monkeypatch):
    frozen = gc.get_freeze_count()
    try:
        with imports.swift():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
    monkeypatch.setenv("GRAFT_PLAIN_IMPORTS", "1")
    with imports.swift():
        assert gc.isenabled()
