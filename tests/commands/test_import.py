"""graft import: every key of a config of another trainer is carried, explained or unknown, and the
experiment composes."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import yaml

from tests.conftest import composed, sums, write_rows
from tests.toys.commands import exit_code
from trainer.config import imported, json_schema, schema

command = import_module("trainer.import")

AXOLOTL = {
    "base_model": "NousResearch/Llama-3.2-1B", "load_in_4bit": True, "adapter": "qlora",
    "datasets": [{"path": "teknium/GPT4-LLM-Cleaned", "type": "alpaca"}], "val_set_size": 0.1,
    "output_dir": "./outputs/x", "sequence_len": 2048, "sample_packing": True,
    "eval_sample_packing": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05,
    "lora_target_modules": ["gate_proj", "down_proj"], "lora_fan_in_fan_out": None,
    "wandb_project": None, "gradient_accumulation_steps": 2, "micro_batch_size": 3,
    "num_epochs": 1, "optimizer": "adamw_8bit", "lr_scheduler": "cosine", "learning_rate": 0.0002,
    "bf16": "auto", "tf32": False, "gradient_checkpointing": True, "logging_steps": 1,
    "flash_attention": True, "warmup_ratio": 0.1, "evals_per_epoch": 4, "saves_per_epoch": 1,
    "weight_decay": 0.0, "special_tokens": {"pad_token": "<|end_of_text|>"},
}  # fmt: skip
LLAMA_FACTORY = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "trust_remote_code": True,
    "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8,
    "lora_target": "all", "dataset": "identity", "template": "llama3", "cutoff_len": 2048,
    "max_samples": 1000, "preprocessing_num_workers": 16, "output_dir": "saves",
    "logging_steps": 10,    "save_steps": 500, "plot_loss": True, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8, "learning_rate": 0.0001, "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True, "ddp_timeout": 180000000,
}  # fmt: skip
TRL = {
    "model_name_or_path": "Qwen/Qwen2-0.5B", "dataset_name": "trl-lib/Capybara", "use_peft": True,
    "lora_r": 32, "lora_alpha": 16, "learning_rate": 2e-4, "num_train_epochs": 1, "packing": True,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "eval_strategy": "steps",
    "eval_steps": 100, "max_length": 1024, "report_to": "none",
}  # fmt: skip
TORCHTUNE = {
    "model": {"_component_": "torchtune.models.llama3_2.lora_llama3_2_1b", "lora_rank": 64,
              "lora_attn_modules": ["q_proj", "v_proj"], "lora_alpha": 128, "lora_dropout": 0.0},
    "tokenizer": {"_component_": "torchtune.models.llama3.llama3_tokenizer", "max_seq_len": 1024},
    "checkpointer": {"_component_": "x", "checkpoint_dir": "meta-llama/Llama-3.2-1B"},
    "dataset": {"_component_": "torchtune.datasets.chat_dataset", "source": "org/chats",
                "packed": True},
    "seed": 3, "batch_size": 4, "epochs": 1, "gradient_accumulation_steps": 8, "dtype": "bf16",
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 3e-4, "weight_decay": 0.01},
    "lr_scheduler": {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule",
                     "num_warmup_steps": 100},
    "enable_activation_checkpointing": True, "profiler": {"enabled": False},
}  # fmt: skip
LITGPT = {
    "checkpoint_dir": "checkpoints/meta-llama/Llama-2-7b-hf", "precision": "bf16-true",
    "quantize": "bnb.nf4", "lora_r": 32, "lora_alpha": 16, "lora_query": True, "seed": 1337,
    "data": {"class_path": "litgpt.data.JSON", "init_args": {"json_path": "rows.json"}},
    "train": {"save_interval": 200, "global_batch_size": 8, "micro_batch_size": 2, "epochs": 2,
              "max_seq_length": 512, "lr_warmup_steps": 10},
    "eval": {"interval": 100}, "optimizer": {"class_path": "torch.optim.AdamW",
                                             "init_args": {"lr": 2e-4, "weight_decay": 0.0}},
}  # fmt: skip
CONFIGS = {
    "axolotl": AXOLOTL, "llama-factory": LLAMA_FACTORY, "trl": TRL, "torchtune": TORCHTUNE,
    "litgpt": LITGPT,
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.long
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_key_is_accounted_for_and_the_experiment_composes(kind, place, capsys):
    (place / "other.yml").write_text(yaml.safe_dump(CONFIGS[kind]))
    assert exit_code(command.main, ["other.yml"]) == 0
    result = imported.convert(CONFIGS[kind], kind)
    keys = [key for key, _ in imported._entries(CONFIGS[kind], imported.TABLES[kind], kind)]
    assert sorted([*result.carried, *result.explained, *result.unknown]) == sorted(keys)
    assert len(result.unknown) <= 0.1 * len(keys), result.unknown
    shown = capsys.readouterr().out
    assert f"of {len(keys)} keys" in shown
    write_rows(place / "rows.jsonl", sums(4))
    own = {"task.path": "rows.jsonl", "base.path": "org/name"}
    words = [f"{key}={json.dumps(value)}" for key, value in (result.settings | own).items()]
    config = composed("experiment=smoke", *words)
    for key, value in result.settings.items():
        if "." in key and key not in own:
            node = config
            for part in key.split("."):
                node = node[part]
            assert node == value, key


def test_what_the_settings_are():
    settings = imported.convert(AXOLOTL, "axolotl").settings
    assert settings["adapter.rank"] == 16
    assert settings["base.quantization"] == "nf4"
    assert settings["task.format"] == "alpaca"
    assert settings["optimizer"] == "adamw_8bit"
    assert settings["callbacks.evaluation.every"] == 0.25
    assert settings["callbacks.checkpoints.every"] is None  # once an epoch, of one
    assert settings["adapter.target_modules"] == ["gate_proj", "down_proj"]
    assert imported.convert(LITGPT, "litgpt").settings["accumulate"] == 4
    assert imported.convert(TORCHTUNE, "torchtune").settings["schedule.warmup"] == 100


def test_a_rule_for_all_keys_of_a_part():
    config = TORCHTUNE | {"profiler": {"enabled": True, "with_flops": False, "x": {"y": 1}}}
    result = imported.convert(config, "torchtune")
    for key in ("enabled", "with_flops", "x"):
        assert "no profiler" in result.explained[f"profiler.{key}"]
    assert imported.convert({"base_model": "x", "profiler.y": 1}, "axolotl").unknown == [
        "profiler.y"
    ]


def test_which_trainer_is_found():
    assert {kind: imported.kind_of(config) for kind, config in CONFIGS.items()} == {
        kind: kind for kind in CONFIGS
    }
    assert imported.kind_of({"peft_type": "LORA", "r": 8}) == "trl"
    assert imported.kind_of({"x": 1}) is None


def test_each_rule_leads_to_a_setting_of_conf():
    files = ["config", *(name for name in json_schema.names() if "/" in name)]
    known = {f"{name.split('/')[0]}.{key}" if "/" in name else key
             for name in files for key in flat(schema.load(name))}  # fmt: skip
    rules = {rule for table in imported.TABLES.values() for rule in table.values()
             if isinstance(rule, str) and not rule.startswith(imported.NO)}  # fmt: skip
    assert rules <= known, rules - known


def flat(table, prefix=""):
    for key, child in table.children.items():
        yield f"{prefix}{key}"
        if isinstance(child, schema.Table):
            yield from flat(child, f"{prefix}{key}.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is no config: expected a mapping"),
        ("a: [", "cannot be read"),
        ("x: 1", "it is not known whose config that is"),
        (None, "there is no such file"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(text, message, place, capsys):
    if text is not None:
        (place / "other.yml").write_text(text)
    assert exit_code(command.main, ["other.yml"]) == 2
    assert message in capsys.readouterr().err
    assert not (place / "experiments").exists()
