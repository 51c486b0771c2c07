"""Configs that older versions recorded: add missing keys, and map moved classes.

A recorded config gets today's names, and is then checked like a new one. To move a class that conf/
names, add a line to MOVED.
"""

from __future__ import annotations

from typing import Any

from trainer.config import schema
from trainer.config.errors import ConfigError
from trainer.config.groups import default_choices, root_schema

# `_target_` names that older versions recorded -> the names of the same classes today
MOVED = {
    "trainer.base.from_hub": "trainer.models.hub.from_hub",
    "trainer.base.from_wheel": "trainer.models.gguf.from_wheel",
    "trainer.base.tiny": "trainer.models.tiny.tiny",
    "trainer.finetune.FineTune": "trainer.training.finetune.FineTune",
    "trainer.distill.Distill": "trainer.training.distill.Distill",
}

# Settings that older versions of an adapter lacked, with the values that they acted by.
_ADAPTERS: dict[str, dict[str, Any]] = {
    "adapters.rosa.RoSAAdapter": {"count_mask_steps": True, "within": "all"},
    "adapters.spiel.SpIEL": {"clip_moments": False, "within": "all"},
}
# The same of drafters: heads had the target's own layer, and blocks started at random.
_DRAFTERS: dict[str, dict[str, Any]] = {
    "trainer.drafters.block.Block": {"init": "random", "markov": "vanilla"},
    "trainer.drafters.eagle.Eagle": {"layer": "target", "topk": None, "topk_weight": 1.0},
    "trainer.drafters.eagle3.Eagle3": {"layer": "target"},
    "trainer.drafters.peagle.PEagle": {"init": "random"},
}


def keep_head(drafter: Any) -> None:
    """Complete the recorded settings of a draft head of an older version, in place: with the layer
    and the start that it has, and without newer losses."""
    if not isinstance(drafter, dict) or not isinstance(name := drafter.get("_target_"), str):
        return
    for key, value in _DRAFTERS.get(name, {}).items():
        drafter.setdefault(key, value)


def keep_counting(adapter: Any) -> None:
    """Complete the recorded settings of a sparse method of an older version, in place: the steps of
    the mask are part of the run, and moments are not clipped."""
    if not isinstance(adapter, dict):
        return
    for key, value in _ADAPTERS.get(adapter.get("_target_", ""), {}).items():
        adapter.setdefault(key, value)


def adopt(config: dict[str, Any], recorded: Any) -> bool:
    """Change `config`, in place, so that a run continues as the older version meant its settings.

    `recorded` is the config of the run that is continued. Return whether the adapter's settings
    have changed.
    """
    adopt_layer(config, recorded)
    earlier = recorded.get("adapter") if isinstance(recorded, dict) else None
    adapter = config["adapter"]
    if not isinstance(earlier, dict) or earlier.get("_target_") != adapter["_target_"]:
        return False
    before = dict(adapter)
    old = _ADAPTERS.get(adapter["_target_"], {})
    adapter |= {key: value for key, value in old.items() if key not in earlier and key in adapter}
    # Steps that were chosen by the run's rows or length stay when these change.
    for key in ("warmup_steps", "mask_steps"):
        now, then = adapter.get(key), earlier.get(key)
        chosen = now == "auto" or (isinstance(now, float) and now < 1)
        if chosen and isinstance(then, int):
            adapter[key] = then
    return bool(adapter != before)


def adopt_layer(config: dict[str, Any], recorded: Any) -> None:
    """Change `config`, in place, so that a run keeps the draft head of the run that it continues.

    `recorded` is that run's config. Its layer replaces `auto`, and an older version's start stays.
    """
    earlier = recorded.get("drafter") if isinstance(recorded, dict) else None
    drafter = config.get("drafter")
    if not isinstance(earlier, dict) or not isinstance(drafter, dict):
        keep_head(earlier)
        return
    old = earlier.keys()
    kind = drafter.get("_target_", "")  # a run without a head has none
    same = earlier.get("_target_", "") == kind
    if same and "init" in _DRAFTERS.get(kind, {}).keys() - old:
        drafter["init"] = "random"
    keep_head(earlier)
    if drafter.get("layer") == "auto" and same:
        drafter["layer"] = earlier.get("layer", "auto")


def rename(node: Any) -> None:
    """Replace the `_target_` names in a recorded config by today's, in place."""
    if isinstance(node, dict):
        if isinstance(name := node.get("_target_"), str):
            node["_target_"] = MOVED.get(name, name)
        for value in node.values():
            rename(value)
    elif isinstance(node, list):
        for value in node:
            rename(value)


def complete(plain: dict[str, Any], choices: dict[str, Any]) -> list[str]:
    """Add to a recorded config, in place, the keys that are new since. Return their dotted names.

    A new key gets the value in its group's file, a new group the file that conf/config.yaml uses.
    Moved classes get their new names, and lengths such as 20.0 are whole steps. `compose.check`
    refuses what is missing then.
    """
    rename(plain)
    keep_head(plain.get("drafter"))
    keep_counting(plain.get("adapter"))
    for group, name in default_choices().items():
        if group not in plain:
            choices.setdefault(group, name)
    try:
        table = root_schema(choices)
    except ConfigError:  # `compose.check` raises it again, with the file's name
        return []
    schema.whole_steps(plain, table)
    return schema.complete(plain, table)
