"""The chat page loads nothing from elsewhere and writes texts as texts."""

from __future__ import annotations

import base64
import hashlib
import re

from trainer.serving.app import PAGE, policy

TEXT = PAGE.read_text("utf-8")


def test_it_needs_nothing_from_elsewhere():
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=|<link|<img|<iframe", TEXT)
    assert len(TEXT) < 12_000


def test_texts_of_models_are_never_markup():
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", TEXT
    )
    assert not re.search(r"\son\w+=|style=|javascript:", TEXT)  # the policy would refuse them


def test_the_policy_allows_its_own_script_alone():
    rules = dict(rule.strip().split(" ", 1) for rule in policy(TEXT).split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", TEXT, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
