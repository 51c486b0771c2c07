"""A recipe, before any weights load: trained parameters, steps, and the run's identity."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import composed
from trainer.assembly import recipe as recipe_module
from trainer.assembly.build import instantiate
from trainer.assembly.recipe import Recipe
from trainer.config.errors import ConfigError


@pytest.fixture
def recipe(chats):
    """A recipe of the smoke experiment with some overrides."""

    def built(*overrides, device=None, ranks=1):
        cfg = composed(
            "experiment=smoke", f"task.path={chats}", "precision=fp32", "lightning=cpu", *overrides
        )
        bare = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        config = OmegaConf.to_container(bare, resolve=True)
        return Recipe.of(config, instantiate(config["adapter"]), device, ranks)

    return built


@pytest.mark.long
@pytest.mark.parametrize(
    ("overrides", "ranks", "steps"),
    [
        (["max_steps=7"], 1, 7),
        # 48 of 60 rows: 8 a batch
        (["max_steps=null", "max_epochs=2", "task.eval_fraction=0.2", "batch_size=8"], 1, 12),
        (["max_steps=null", "max_epochs=2", "task.eval_fraction=0.2", "batch_size=8"], 2, 6),
        (["max_steps=null", "max_epochs=2", "task.eval_fraction=0.2", "accumulate=3"], 1, 4),
        (["adapter=none", "max_steps=7"], 1, 0),
        (["adapter=none", "drafter=mtp_shared", "objective=distill", "max_steps=7"], 1, 7),
        (["task.streaming=true", "task.eval_fraction=0", "max_steps=9"], 1, 9),
    ],
)
def test_steps_are_those_of_the_rows_or_of_the_config(recipe, overrides, ranks, steps):
    built = recipe(*overrides, ranks=ranks)
    assert built.steps == steps
    assert built.trains == bool(steps)
    assert (built.order is None) == ("task.streaming=true" in overrides)


@pytest.mark.long
def test_full_trains_the_base_and_the_others_do_not(recipe):
    assert recipe("adapter=full").trains_base
    assert not recipe().trains_base
    assert not recipe("adapter=none").trains_base


@pytest.mark.long
def test_only_what_trains_is_sharded(recipe):
    shared = ["lightning.strategy=fsdp2", "lightning.devices=2"]
    assert recipe(*shared).sharded
    assert not recipe(*shared, "adapter=none").sharded
    assert not recipe().sharded


@pytest.mark.long
def test_the_identity_names_what_has_to_be_the_same_to_resume(recipe):
    built = recipe("max_steps=7")
    identity = built.identity({"adapter": "lora"})
    assert identity | {"base": "", "data": ""} == {
        "choices": {"adapter": "lora"}, "base": "", "data": "", "precision": "fp32",
        "trains_base": False, "labels": None, "steps": 7, "ranks": 1, "target": None,
    }  # fmt: skip
    assert identity["base"] == built.base.fingerprint
    assert set(identity["data"]) == {"train", "eval"}
    other = recipe("max_steps=7", "task.limit=20").identity({})
    assert other["data"]["train"] != identity["data"]["train"]


@pytest.mark.long
def test_a_device_is_asked_for_only_in_a_run(recipe, monkeypatch):
    """A check may be made on another machine."""
    monkeypatch.setattr(
        recipe_module.liger, "fault", lambda _, cuda=True, *__: None if cuda else "no Liger here"
    )
    assert recipe("fused=liger", "lightning=auto").device.type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="no Liger here"):
        recipe("fused=liger", "lightning=auto", device=torch.device("cpu"))
