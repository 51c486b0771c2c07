"""Configs of other trainers as an experiment of this one.

Each trainer has a table: its key -> our setting, a function that makes settings, or a sentence that
says why there is no counterpart. A key PART.* stands for all keys of a part. What no table names is
reported as unknown; nothing is dropped in silence. Only settings that differ from our defaults need
to be read: the experiment is a draft that `graft preflight` checks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]
Rule = str | Callable[[Any, dict[str, Any]], Settings]
NO = "no: "  # a rule that begins so says why there is no counterpart

_LATER = f"{NO}set by this trainer itself"
_LOG = f"{NO}every step is logged; callbacks and logger say what else"
_KERNELS = f"{NO}fused=true has kernels of its own, fused=liger those of Liger"
_WATCH = f"{NO}callbacks.rollback goes back where the loss is a multiple of its median"
_DISTILLED = f"{NO}no distillation from a teacher"
_IMAGES = f"{NO}only texts are trained on"
_DIST = f"{NO}lightning=gpu lightning.strategy=fsdp2 is the counterpart; it has few options"


@dataclass
class Imported:
    """The result: `settings` by dotted key, what was carried, what was explained, what is
    unknown."""

    source: str
    settings: Settings = field(default_factory=dict)
    carried: dict[str, Settings] = field(default_factory=dict)
    explained: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def _when(setting: str, value: Any) -> Rule:
    """Set a setting where the key is true."""
    return lambda raw, all_: {setting: value} if raw else {}


def _wandb(key: str) -> Rule:
    return lambda raw, all_: {"logger": "wandb", f"logger.wandb.{key}": raw} if raw else {}


def _steps(setting: str) -> Rule:
    """Steps between two events; below one a fraction, as ours; zero or less means never."""

    def rule(raw: Any, all_: dict[str, Any]) -> Settings:
        steps = float(raw or 0)
        return {setting: None if steps <= 0 else raw if steps < 1 else int(steps)}

    return rule


def _each_epoch(setting: str) -> Rule:
    """Times an epoch, as a fraction of the run; null is only at the end."""

    def rule(raw: Any, all_: dict[str, Any]) -> Settings:
        times = float(raw or 0) * float(all_.get("num_epochs") or 1)
        return {setting: round(1 / times, 6) if times > 1 else None}

    return rule


def _targets(raw: Any, all_: dict[str, Any]) -> Settings:
    names = raw.split(",") if isinstance(raw, str) else raw
    names = [str(name).strip() for name in names or []]
    if names in (["all"], ["all-linear"]):
        return {"adapter.target_modules": "all-linear"}
    return {"adapter.target_modules": names} if names else {}


def _precision(raw: Any, all_: dict[str, Any]) -> Settings:
    names = {"bf16": "bf16-true", "bfloat16": "bf16-true", "bf16-true": "bf16-true",
             "bf16-mixed": "bf16-mixed", "fp32": "fp32", "32": "fp32", "32-true": "fp32",
             "float32": "fp32", "fp16": "16-mixed", "float16": "16-mixed", "16-mixed": "16-mixed",
             "auto": "auto"}  # fmt: skip
    name = names.get(str(raw).lower())
    return {"precision": name} if name else {}


def _bf16(raw: Any, all_: dict[str, Any]) -> Settings:
    if str(raw).lower() == "auto":
        return {"precision": "auto"}
    return {"precision": "bf16-true"} if raw in (True, "true", "full") else {}


def _schedule(raw: Any, all_: dict[str, Any]) -> Settings:
    names = {"cosine": "cosine", "linear": "linear", "constant": "constant",
             "constant_with_warmup": "constant", "inverse_sqrt": "inverse_sqrt",
             "warmup_stable_decay": "cooldown", "cosine_with_min_lr": "cosine"}  # fmt: skip
    name = names.get(str(raw))
    return {"schedule": name} if name else {}


def _optimizer(raw: Any, all_: dict[str, Any]) -> Settings:
    name = str(raw).lower().rpartition(".")[2]
    if "paged" in name and "8bit" in name:
        return {"optimizer": "paged_adamw_8bit"}
    if "8bit" in name or "bnb" in name:
        return {"optimizer": "adamw_8bit"}
    if "schedule_free" in name or "schedulefree" in name:
        return {"optimizer": "schedulefree"}
    return {"optimizer": "adamw"} if "adamw" in name else {}


def _bits(raw: Any, all_: dict[str, Any]) -> Settings:
    kinds = {"4": "nf4", "8": "int8", "bnb.nf4": "nf4", "bnb.nf4-dq": "nf4", "bnb.int8": "int8"}
    kind = kinds.get(str(raw))
    return {"base.quantization": kind} if kind else {}


def _adapter(raw: Any, all_: dict[str, Any]) -> Settings:
    name = str(raw or "").lower()
    if name in ("lora", "true"):
        return {"adapter": "lora"}
    if name == "qlora":
        return {"adapter": "lora", "base.quantization": "nf4"}
    return {"adapter": "full"} if name in ("full", "", "none", "false") else {}


def _axolotl_data(raw: Any, all_: dict[str, Any]) -> Settings:
    first = (raw or [{}])[0] if isinstance(raw, list) else {}
    kinds = {"alpaca": "alpaca", "sharegpt": "sharegpt", "chat_template": "auto",
             "completion": None}  # fmt: skip
    settings: Settings = {"task.path": first.get("path")}
    if first.get("split"):
        settings["task.split"] = first["split"]
    kind = str(first.get("type") or "chat_template")
    if kind == "completion":
        settings["task"] = "completion"
    elif kinds.get(kind):
        settings["task.format"] = kinds[kind]
    return {key: value for key, value in settings.items() if value is not None}


def _fraction(raw: Any, all_: dict[str, Any]) -> Settings:
    value = float(raw or 0)
    return {"task.eval_fraction": value} if 0 <= value < 1 else {}


COMMON: dict[str, Rule] = {
    "output_dir": _LATER + ": runs/NAME",
    "seed": "seed",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "objective.max_grad_norm",
    "num_train_epochs": "max_epochs",
    "max_steps": _steps("max_steps"),
    "gradient_accumulation_steps": "accumulate",
    "per_device_train_batch_size": "batch_size",
    "gradient_checkpointing": "objective.gradient_checkpointing",
    "lr_scheduler_type": _schedule,
    "warmup_ratio": "schedule.warmup",
    "warmup_steps": "schedule.warmup",
    "optim": _optimizer,
    "bf16": _bf16,
    "fp16": _when("precision", "16-mixed"),
    "tf32": f"{NO}precision says what is computed in",
    "save_steps": _steps("callbacks.checkpoints.every"),
    "save_total_limit": "callbacks.checkpoints.keep",
    "save_strategy": f"{NO}callbacks.checkpoints.every counts steps or a fraction of the run",
    "eval_steps": _steps("callbacks.evaluation.every"),
    "eval_strategy": f"{NO}callbacks.evaluation.every counts steps or a fraction of the run",
    "evaluation_strategy": f"{NO}callbacks.evaluation.every counts steps or a fraction of the run",
    "per_device_eval_batch_size": "callbacks.evaluation.batch_size",
    "logging_steps": _LOG,
    "report_to": f"{NO}choose logger=wandb, tensorboard or none",
    "ddp_timeout": lambda seconds, all_: {"lightning.timeout": seconds / 60},
    "resume_from_checkpoint": f"{NO}resume=auto continues runs/NAME",
    "dataloader_num_workers": "workers",
    "group_by_length": "group_by_length",
    "packing": "packing",
    "deepspeed": f"{NO}there is no DeepSpeed; lightning.strategy=fsdp2 shards",
    "fsdp": _DIST,
    "fsdp_config": _DIST,
    "push_to_hub": f"{NO}graft push uploads a result",
    "hub_model_id": f"{NO}graft push to=ORG/NAME",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "trust_remote_code": f"{NO}only the command line may set base.trust_remote_code=true",
}

AXOLOTL: dict[str, Rule] = COMMON | {
    "base_model": "base.path",
    "model_type": _LATER, "tokenizer_type": _LATER, "is_llama_derived_model": _LATER,
    "base_model_config": _LATER, "tokenizer_config": _LATER,
    "load_in_4bit": _when("base.quantization", "nf4"),
    "load_in_8bit": _when("base.quantization", "int8"),
    "strict": _LATER, "datasets": _axolotl_data, "val_set_size": _fraction,
    "dataset_prepared_path": f"{NO}tokenised rows are cached by their content",
    "adapter": _adapter, "lora_r": "adapter.rank", "lora_target_modules": _targets,
    "lora_target_linear": _when("adapter.target_modules", "all-linear"),
    "lora_fan_in_fan_out": _LATER, "lora_modules_to_save": "adapter.train_modules",
    "lora_model_dir": "adapter.from", "peft_use_dora": _when("adapter", "dora"),
    "peft_use_rslora": _when("adapter", "rslora"),
    "sequence_len": "max_length", "sample_packing": "packing",
    "eval_sample_packing": f"{NO}evaluation rows are never packed",
    "pad_to_sequence_len": f"{NO}batches are padded to their longest row",
    "micro_batch_size": "batch_size", "num_epochs": "max_epochs", "optimizer": _optimizer,
    "lr_scheduler": _schedule, "train_on_inputs": _when("task.train_on", "everything"),
    "flash_attention": _when("base.attn_implementation", "auto"),
    "sdp_attention": _when("base.attn_implementation", "sdpa"),
    "eager_attention": _when("base.attn_implementation", "eager"),
    "xformers_attention": f"{NO}base.attn_implementation=auto", "s2_attention": f"{NO}not here",
    "early_stopping_patience": "callbacks.evaluation.patience", "local_rank": _LATER,
    "evals_per_epoch": _each_epoch("callbacks.evaluation.every"),
    "saves_per_epoch": _each_epoch("callbacks.checkpoints.every"),
    "eval_table_size": f"{NO}callbacks.evaluation.samples keeps answers",
    "eval_max_new_tokens": "callbacks.evaluation.max_new_tokens", "debug": f"{NO}graft preflight",
    "chat_template": "task.chat_template", "special_tokens": f"{NO}the tokenizer's own are used",
    "tokens": "base.add_tokens", "wandb_project": _wandb("project"),
    "wandb_entity": _wandb("entity"),
    "wandb_watch": f"{NO}not logged", "wandb_name": "name", "wandb_run_id": _LATER,
    "wandb_log_model": f"{NO}results stay in the run folder", "hub_strategy": f"{NO}graft push",
    "liger_rope": _when("fused", "liger"), "liger_rms_norm": _when("fused", "liger"),
    "liger_glu_activation": _when("fused", "liger"), "plugins": f"{NO}fused=liger is a setting",
    "liger_fused_linear_cross_entropy": f"{NO}the loss is computed in chunks anyway",
    "group_by_length": "group_by_length", "auto_resume_from_checkpoints": _when("resume", "auto"),
    "gradient_checkpointing_kwargs": _LATER, "neftune_noise_alpha": f"{NO}no noise on embeddings",
    "attn_implementation": "base.attn_implementation", "liger_layer_norm": _when("fused", "liger"),
    "lora_mlp_kernel": _KERNELS, "lora_qkv_kernel": _KERNELS, "lora_o_kernel": _KERNELS,
    "use_kernels": _KERNELS, "fused_attn_kernel": _KERNELS, "liger_rms_norm_gated": _KERNELS,
    "use_scattermoe": _KERNELS, "experts_implementation": _KERNELS,
    "quantize_moe_experts": f"{NO}base.quantization is for linear layers",
    "lora_target_parameters": f"{NO}adapter.target_modules names layers",
    "loss_watchdog_threshold": _WATCH,
    "loss_watchdog_patience": _WATCH,
    "eot_tokens": f"{NO}the chat template says what ends an answer",
    "tokenizer_use_mistral_common": f"{NO}tokenizers are those of transformers",
    "push_dataset_to_hub": f"{NO}tokenised rows stay here", "torchdistx_path": _LATER,
    "gptq_groupsize": f"{NO}no GPTQ", "gptq_model_v1": f"{NO}no GPTQ",
    "activation_offloading": f"{NO}no offloading", "max_packed_sequence_len": "max_length",
    "ddp_find_unused_parameters": _DIST, "gpu_memory_limit": f"{NO}graft preflight shows the need",
    "shuffle_merged_datasets": _LATER, "sample_packing_eff_est": _LATER, "torch_compile": "compile",
}  # fmt: skip

LLAMA_FACTORY: dict[str, Rule] = COMMON | {
    "model_name_or_path": "base.path",
    "stage": lambda v, a: {"task": "completion"} if v == "pt" else {"task": "sft"} if v == "sft"
    else {}, "do_train": _LATER, "do_eval": _LATER, "finetuning_type": _adapter,
    "lora_rank": "adapter.rank", "lora_target": _targets, "quantization_bit": _bits,
    "quantization_method": f"{NO}bitsandbytes", "dataset": "task.path", "dataset_dir":
    f"{NO}task.path is a file or a data set's name; names of dataset_info.json have to be replaced",
    "template": f"{NO}the tokenizer's own template, or task.chat_template=FILE",
    "cutoff_len": "max_length", "max_samples": "task.limit", "overwrite_cache": _LATER,
    "preprocessing_num_workers": "tokenise_processes", "plot_loss": f"{NO}report.html has it",
    "overwrite_output_dir": _LATER, "val_size": _fraction, "run_name": "name",
    "save_only_model": f"{NO}checkpoints hold what a resume needs", "use_dora":
    _when("adapter", "dora"), "use_rslora": _when("adapter", "rslora"), "flash_attn":
    f"{NO}base.attn_implementation=auto", "enable_liger_kernel": _when("fused", "liger"),
    "include_num_input_tokens_seen": _LOG, "adapter_name_or_path": "adapter.from",
    "double_quantization": "base.double_quant", "eval_dataset": "task.eval_path",
    "loraplus_lr_ratio": lambda v, a: {"adapter": "loraplus"}, "neat_packing": "packing",
    "pissa_init": _when("adapter", "pissa"), "additional_target": "adapter.train_modules",
}  # fmt: skip

TRL: dict[str, Rule] = COMMON | {
    "model_name_or_path": "base.path", "dataset_name": "task.path", "dataset_config":
    lambda v, a: {"task.path": f"{a.get('dataset_name')}:{v}"} if v else {},
    "dataset_train_split": "task.split", "dataset_test_split": "task.eval_split",
    "max_length": "max_length", "max_seq_length": "max_length", "use_peft": _adapter,
    "lora_r": "adapter.rank", "lora_target_modules": _targets, "use_dora": _when("adapter", "dora"),
    "use_rslora": _when("adapter", "rslora"), "load_in_4bit": _when("base.quantization", "nf4"),
    "load_in_8bit": _when("base.quantization", "int8"), "attn_implementation":
    "base.attn_implementation", "dtype": _precision, "torch_dtype": _precision,
    "model_revision": "base.revision", "run_name": "name", "lora_modules_to_save":
    "adapter.train_modules", "assistant_only_loss": _LATER, "completion_only_loss": _LATER,
    "dataset_text_field": f"{NO}task.columns maps columns", "use_liger_kernel":
    _when("fused", "liger"), "gradient_checkpointing_kwargs": _LATER, "do_eval": _LATER,
    "eos_token": _LATER, "dataset_num_proc": "tokenise_processes",
    "bnb_4bit_quant_type": f"{NO}nf4 is what base.quantization=nf4 takes",
    "use_bnb_nested_quant": "base.double_quant", "peft_type": lambda v, a: {"adapter": {
    "LORA": "lora", "IA3": "ia3", "ADALORA": "adalora", "PROMPT_TUNING": "prompt_tuning",
    "PREFIX_TUNING": "prefix_tuning", "SHIRA": "shira"}.get(str(v))} if str(v) in ("LORA", "IA3",
    "ADALORA", "PROMPT_TUNING", "PREFIX_TUNING", "SHIRA") else {}, "r": "adapter.rank",
    "target_modules": _targets, "base_model_name_or_path": "base.path", "task_type": _LATER,
    "inference_mode": _LATER, "bias": _LATER, "modules_to_save": "adapter.train_modules",
    "fan_in_fan_out": _LATER, "peft_version": _LATER, "revision": "base.revision",
}  # fmt: skip

LITGPT: dict[str, Rule] = {
    "checkpoint_dir": lambda v, a: {"base.path": re.sub(r"^(\./)?checkpoints/", "", str(v))},
    "out_dir": _LATER, "precision": _precision, "quantize": _bits, "devices": "lightning.devices",
    "num_nodes": "lightning.num_nodes", "lora_r": "adapter.rank", "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout", "seed": "seed", "logger_name": f"{NO}choose logger=...",
    "optimizer": lambda v, a: _optimizer(v if isinstance(v, str) else (v or {}).get("class_path"),
    a) | {f"optimizer.{key}": (v["init_args"])[key] for key in ("lr", "weight_decay")
    if isinstance(v, dict) and key in (v.get("init_args") or {})},
    "data": lambda v, a: {"task.path": ((v or {}).get("init_args") or {}).get("json_path", "???")}
    if isinstance(v, dict) else {}, "train.save_interval": _steps("callbacks.checkpoints.every"),
    "train.log_interval": _LOG, "train.micro_batch_size": "batch_size", "train.epochs":
    "max_epochs", "train.max_steps": _steps("max_steps"), "train.max_seq_length": "max_length",
    "train.lr_warmup_steps": "schedule.warmup", "train.max_norm": "objective.max_grad_norm",
    "train.min_lr": f"{NO}schedules end at their own floor", "train.global_batch_size":
    lambda v, a: {"accumulate": max(1, int(v) // int((a.get("train") or {}).get("micro_batch_size")
    or v))}, "train.max_tokens": "max_tokens", "train.tie_embeddings": _LATER,
    "eval.interval": _steps("callbacks.evaluation.every"), "eval.max_iters": f"{NO}all held-out"
    " rows are evaluated", "eval.max_new_tokens": "callbacks.evaluation.max_new_tokens",
    "eval.initial_validation": _LATER, "eval.final_validation": _LATER,
    "eval.evaluate_example": _LATER,
    **{f"lora_{part}": f"{NO}adapter.target_modules names the layers" for part in
       ("query", "key", "value", "projection", "mlp", "head")},
}  # fmt: skip
LITGPT["train.lr_warmup_fraction"] = "schedule.warmup"

TORCHTUNE: dict[str, Rule] = {
    "model.lora_rank": "adapter.rank", "model.lora_alpha": "adapter.alpha",
    "model.lora_dropout": "adapter.dropout", "model.lora_attn_modules": _targets,
    "model.apply_lora_to_mlp": f"{NO}adapter.target_modules names the layers",
    "model.apply_lora_to_output": f"{NO}adapter.target_modules names the layers",
    "model.use_dora": _when("adapter", "dora"), "model._component_": lambda v, a:
    {"base.quantization": "nf4"} if "qlora" in str(v) else {}, "tokenizer._component_": _LATER,
    "tokenizer.max_seq_len": lambda v, a: {"max_length": v} if v else {}, "tokenizer.path": _LATER,
    "tokenizer.merges_file": _LATER, "checkpointer.checkpoint_dir": "base.path",
    "checkpointer._component_": _LATER, "checkpointer.checkpoint_files": _LATER,
    "checkpointer.recipe_checkpoint": _LATER, "checkpointer.output_dir": _LATER,
    "checkpointer.model_type": _LATER, "checkpointer.adapter_checkpoint": "adapter.from",
    "resume_from_checkpoint": _when("resume", "auto"), "save_adapter_weights_only": _LATER,
    "dataset._component_": f"{NO}set task.path: the builders of torchtune name data sets in code",
    "dataset.source": "task.path", "dataset.split": "task.split", "dataset.packed": "packing",
    "dataset.train_on_input": _when("task.train_on", "everything"),
    "dataset.data_files": "task.data_files",
    "seed": "seed", "shuffle": _LATER, "batch_size": "batch_size", "epochs": "max_epochs",
    "max_steps_per_epoch": "max_steps", "gradient_accumulation_steps": "accumulate",
    "optimizer._component_": _optimizer, "optimizer.lr": "optimizer.lr", "optimizer.fused": _LATER,
    "optimizer.weight_decay": "optimizer.weight_decay", "lr_scheduler._component_": lambda v, a:
    _schedule("cosine" if "cosine" in str(v) else v, a), "lr_scheduler.num_warmup_steps":
    "schedule.warmup", "loss._component_": f"{NO}cross-entropy in chunks", "clip_grad_norm":
    "objective.max_grad_norm", "compile": "compile", "output_dir": _LATER, "device":
    lambda v, a: {"lightning": "cpu"} if v == "cpu" else {"lightning": "auto"},
    "dtype": _precision, "enable_activation_checkpointing": "objective.gradient_checkpointing",
    "enable_activation_offloading": f"{NO}no offloading", "metric_logger._component_":
    f"{NO}choose logger=wandb, tensorboard or none", "metric_logger.log_dir": _LOG,
    "metric_logger.project": _wandb("project"), "log_every_n_steps": _LOG, "log_level": _LOG,
    "log_peak_memory_stats": _LOG, "low_cpu_ram": _LATER,
    "profiler.*": f"{NO}no profiler; metrics.jsonl has the time of each step",
    "run_val_every_n_steps": _steps("callbacks.evaluation.every"),
    "batch_size_val": "callbacks.evaluation.batch_size",
    "dataset_val.*": f"{NO}set task.eval_path, task.eval_split or task.eval_fraction",
    "optimizer_in_bwd": f"{NO}the optimiser steps after the backward pass",
    "quantizer.*": f"{NO}base.quantization rounds the frozen base before training",
    "teacher_model.*": _DISTILLED, "teacher_checkpointer.*": _DISTILLED, "kd_loss.*": _DISTILLED,
    "kd_ratio": _DISTILLED, "model.decoder_trainable": _IMAGES, "model.encoder_trainable": _IMAGES,
    "model.fusion_trainable": _IMAGES, "model.image_size": _IMAGES, "tokenizer.image_size": _IMAGES,
    "collate_fn": f"{NO}batches are padded to their longest row",
}  # fmt: skip


def counterpart(key: str) -> str | None:
    """Return a sentence on a key of another trainer: its name here, or why there is none. None for
    a key that needs its value to be read, and for one that no trainer has."""
    for table in (COMMON, TRL, LLAMA_FACTORY, AXOLOTL, LITGPT, TORCHTUNE):
        rule = table.get(key)
        if isinstance(rule, str) and rule != _LATER:
            reason = rule.removeprefix(NO)
            return f"Here it is {rule}." if reason == rule else f"Here: {reason}."
    return None
