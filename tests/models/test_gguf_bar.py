"""transformers' reader of GGUF files draws no bar into logs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import transformers
from transformers import modeling_gguf_pytorch_utils as reader

from trainer.models.gguf import without_bar


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reader, "tqdm", reader.tqdm)
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def test_the_bar_follows_transformers_own_setting(capsys):
    without_bar()
    assert [*reader.tqdm([1, 2, 3], desc="Converting")] == [1, 2, 3]
    assert capsys.readouterr().err == ""
    transformers.utils.logging.enable_progress_bar()
    assert [*reader.tqdm([1, 2, 3], desc="Converting")] == [1, 2, 3]
    assert "Converting" in capsys.readouterr().err


def test_transformers_alone_draws_a_bar():
    """If this fails, `without_bar` is no longer needed."""
    assert "from tqdm.auto import tqdm\n" in inspect.getsource(reader)
