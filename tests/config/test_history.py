"""Recorded configs name classes as they were called then."""

from __future__ import annotations

import copy

from trainer.config import forbidden, history


def test_moved_classes_get_the_name_of_today_and_others_keep_theirs():
    old, new = "trainer.base.tiny", "trainer.models.tiny.tiny"
    config = {
        "a": {"_target_": old, "x": old},
        "b": [{"c": {"_target_": old}}, {"_target_": "os.system"}],
        "c": {"_target_": [old]},
        "d": None,
    }
    wanted = copy.deepcopy(config)
    wanted["a"]["_target_"] = wanted["b"][0]["c"]["_target_"] = new
    history.rename(config)
    assert config == wanted


def test_every_moved_name_is_one_of_conf_and_no_old_one_is():
    assert set(history.MOVED.values()) <= forbidden.shipped_targets()
    assert not history.MOVED.keys() & forbidden.shipped_targets()
