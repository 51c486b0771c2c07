"""What users cannot act on is not shown, and everything else is."""

from __future__ import annotations

import logging
import warnings

import pytest
import rich

from trainer.assembly.quiet import quiet


@pytest.fixture
def silenced():
    """After `quiet`; the filters and levels of before come back."""
    names = ("bitsandbytes", "datasets", "lightning", "lightning.pytorch", "lightning.fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    width = rich.get_console().width
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet()
        yield levels
    rich.get_console().width = width
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(
    ("text", "category"),
    [
        (
            "The 'train_dataloader' does not have many workers",
            UserWarning,
        ),
        ("The `srun` command is available on your system but is not used", UserWarning),
        ("Position ids are not supported for parameter efficient tuning", UserWarning),
        ("`isinstance(treespec, LeafSpec)` is deprecated", FutureWarning),
    ],
)
def test_advice_that_does_not_apply_is_silent(silenced, text, category):
    warnings.warn(text, category, stacklevel=1)


def test_other_warnings_are_shown(silenced):
    with pytest.raises(UserWarning, match="something new"):
        warnings.warn("something new", UserWarning, stacklevel=1)
    with pytest.raises(DeprecationWarning):
        warnings.warn("about LeafSpec, of another category", DeprecationWarning, stacklevel=1)


def test_libraries_log_errors_alone(silenced):
    for name in silenced:
        assert logging.getLogger(name).getEffectiveLevel() == logging.ERROR
    assert logging.getLogger("trainer").getEffectiveLevel() <= logging.WARNING
    assert logging.getLogger("lightning.pytorch").handlers == []
