"""What a config may not do, found in configs of any origin; test_security has it through the
program."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from trainer.config import forbidden


def test_the_targets_are_those_of_conf():
    targets = forbidden.shipped_targets()
    assert {
        "torch.optim.AdamW",
        "adapters.lora.LoRAAdapter",
        "trainer.models.tiny.tiny",
        "trainer.callbacks.tracking.wandb_logger",
    } <= targets
    assert all(
        name.split(".")[0]
        in ("adapters", "tasks", "trainer", "torch", "bitsandbytes", "schedulefree")
        or name == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
        for name in targets
    )
    assert len(targets) < 80


FAULTS = {
    "a target": (
        {"a": {"_target_": "os.system"}},
        "a._target_ is 'os.system'. Only classes that conf/ names",
    ),
    "positional arguments": ({"a": {"_args_": ["x"]}}, "a._args_.0: positional arguments"),
    "a secret of the environment": (
        {"a": "${oc.env:MY_SECRET}"},
        "a reads the environment variable MY_SECRET",
    ),
    "a resolver within a resolver": (
        {"a": "${hydra:${oc.decode:x}}"},
        "a uses the resolver 'oc.decode'",
    ),
    "an environment that is set": (
        {"hydra": {"job": {"env_set": {"LD_PRELOAD": "x"}}}},
        "hydra.job.env_set.LD_PRELOAD: the environment",
    ),
    "a module for attention": (
        {"base": {"attn_implementation": "a/b"}},
        "base.attn_implementation is 'a/b'",
    ),
    "remote code that a file asks for": (
        {"base": {"trust_remote_code": True}, "hydra": {"overrides": {"task": []}}},
        "is taken from the command line only",
    ),
    "a launcher's commands": (
        {"hydra": {"overrides": {"hydra": []}, "launcher": {"setup": ["rm x"]}}},
        "hydra.launcher.setup.0 runs commands",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named_with_its_place(case):
    config, message = FAULTS[case]
    (fault,) = forbidden.forbidden_settings(OmegaConf.create(config))
    assert message in fault


def test_what_a_config_may_hold():
    requested = ["+base.trust_remote_code=true"]
    config = {
        "adapter": {"_target_": "adapters.lora.LoRAAdapter"},
        "a": "${oc.env:USER}/${now:%Y}",
        "base": {"trust_remote_code": True},
        "hydra": {
            "overrides": {"task": requested, "hydra": ["hydra.launcher.setup=[x]"]},
            "launcher": {"setup": ["x"]},
            "output_subdir": None,
        },
    }
    assert list(forbidden.forbidden_settings(OmegaConf.create(config))) == []
