"""The environments of `make test-matrix` follow the bounds of pyproject.toml."""

from __future__ import annotations

import json

from packaging.version import Version

from scripts import matrix


def test_oldest_and_newest_of_each_bound(monkeypatch):
    monkeypatch.setattr(matrix, "cuda_only", lambda *_: "")
    required = matrix.bounds()
    low = {name: matrix.oldest(required[name]) for name in matrix.PACKAGES}
    available = {name: [version] for name, version in low.items()}
    assert [e.name for e in matrix.environments(available)] == ["oldest"]
    limit = Version("5.24.0")
    assert limit in required["transformers"].specifier
    available["transformers"] += [limit, Version("99.0"), Version("5.24.1rc1")]
    available["peft"] += [Version("99.0.dev1")]
    rest = [e for e in matrix.environments(available) if e.name != "oldest"]
    assert [(e.name, e.pins) for e in rest] == [
        ("transformers-newest", ("transformers==5.24.0",)),
        ("transformers-pre", ("transformers==5.24.1rc1",)),
    ]


def test_a_build_for_cuda_alone_is_left_out_with_its_reason(monkeypatch, tmp_path):
    class Report:
        stdout = json.dumps({"install": [{"metadata": {"requires_dist": ["jinja2", "nvidia-x"]}}]})

    monkeypatch.setattr(matrix, "_pip", lambda *_: Report)
    reason = matrix.cuda_only("torch", Version("2.14.1"))
    assert reason == "the index has a CUDA build alone (1 CUDA packages)"
    assert matrix.cuda_only("torch", Version("2.13.0+cpu")) == ""
    left_out = matrix.Environment("torch-newest", ("torch==2.14.1",), reason)
    result = matrix.run(left_out, tmp_path, "light", [])
    assert result.passed
    assert "| torch-newest | torch==2.14.1 | not run: the index has a CUDA" in matrix.page(
        [result], "light", ["tests/data"]
    )
