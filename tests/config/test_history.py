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
    expected = copy.deepcopy(config)
    expected["a"]["_target_"] = expected["b"][0]["c"]["_target_"] = new
    history.rename(config)
    assert config == expected


def test_every_moved_name_is_one_of_conf_and_no_old_one_is():
    assert set(history.MOVED.values()) <= forbidden.shipped_targets()
    assert not history.MOVED.keys() & forbidden.shipped_targets()


def test_lengths_that_were_read_as_whole_steps_are_whole():
    choices = {"schedule": "multistep", "callbacks": "default", "optimizer": "adamw"}
    config = {
        "schedule": {
            "_target_": "trainer.schedules.multistep.multistep",
            "warmup": 2.5,
            "milestones": [20.0, 30],
            "factors": [0.5, 0.1],
        },
        "callbacks": {"evaluation": {"every": 1.0}, "checkpoints": {"every": 0.2}},
        "optimizer": {"lr": 2.0},
    }
    history.complete(config, choices)
    assert config["schedule"]["warmup"] == 2
    assert config["schedule"]["milestones"] == [20, 30]
    every = [config["callbacks"][name]["every"] for name in ("evaluation", "checkpoints")]
    assert every == [1, 0.2]
    assert [type(number) for number in every] == [int, float]
    assert isinstance(config["optimizer"]["lr"], float)


ROSA = {"_target_": "adapters.rosa.RoSAAdapter", "warmup_steps": 64}


def test_older_runs_of_sparse_methods_count_and_clip_as_they_did():
    for node, key, value in (
        (ROSA | {"mask_steps": 1}, "count_mask_steps", True),
        ({"_target_": "adapters.spiel.SpIEL"}, "clip_moments", False),
    ):
        recorded = dict(node)
        history.keep_counting(recorded)
        assert recorded[key] is value
        history.keep_counting(recorded | {key: not value})
        # a run that resumes or branches off one composes its settings of today
        config = {"adapter": node | {key: not value}, "drafter": None}
        assert history.adopt(config, {"adapter": node})
        assert config["adapter"][key] is value
        config = {"adapter": node | {key: not value}, "drafter": None}
        assert not history.adopt(config, {"adapter": node | {key: value}})  # a difference stays one
        assert config["adapter"][key] is not value


def test_steps_that_a_run_has_resolved_stay_when_it_is_continued():
    recorded = {"adapter": ROSA | {"mask_steps": 4, "count_mask_steps": False}}
    now = ROSA | {"mask_steps": "auto", "warmup_steps": 0.1, "count_mask_steps": False}
    config = {"adapter": now, "drafter": None}
    assert history.adopt(config, recorded)
    assert (config["adapter"]["warmup_steps"], config["adapter"]["mask_steps"]) == (64, 4)
    config = {"adapter": ROSA | {"mask_steps": 7, "count_mask_steps": False}, "drafter": None}
    assert not history.adopt(config, recorded)
    other = {"adapter": {"_target_": "adapters.lora.LoRAAdapter"}, "drafter": None}
    assert not history.adopt(other, recorded)


def test_a_run_without_a_head_keeps_its_settings():
    config = {"adapter": {"_target_": "adapters.lora.LoRAAdapter", "rank": 4}, "drafter": {}}
    recorded = {"adapter": dict(config["adapter"]), "drafter": {}}
    assert not history.adopt(config, recorded)
    assert config == {"adapter": recorded["adapter"], "drafter": {}}
