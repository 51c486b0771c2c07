"""Results in the format of PEFT's board: method_comparison/MetaMathQA/results of its repository.

    run_info    {created_at, total_time, experiment_name, peft_branch, train_config, peft_config,
                error_msg}
    train_info  {accelerator_memory_reserved_avg, accelerator_memory_max,
                accelerator_memory_reserved_99th, train_time, file_size, num_trainable_params,
                num_total_params, status, metrics}
    meta_info   {model_info, dataset_info, package_info, system_info, pytorch_info}

The board's own code writes bytes, seconds, and `metrics` as a list of which the last entry has
"test accuracy". What is not measured here is null. The accuracy is graded as the board does.
"""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from tasks.metamath import accuracy
from trainer.config.errors import ConfigError
from trainer.config.limits import load_yaml
from trainer.storage import atomic, journal
from trainer.studies.pieces import UNTESTED, Piece, Results, chosen_rate
from trainer.studies.plan import Study
from trainer.studies.statistics import read_rows

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def write(study: Study, results: Results, folder: Path) -> list[Path]:
    """Write a file for each finished run with a chosen rate. Return their paths.

    Raises:
        ConfigError: no run has graded answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for result in results.values():
        piece = Piece(**result["piece"])
        chosen = chosen_rate(study, piece.data, piece.method, results)
        if {"failed", UNTESTED} & result.keys() or piece.searches or piece.rate != chosen:
            continue
        rows = read_rows(study.folder / "runs" / piece.key / "test_rows.jsonl")
        answers = [(row["answer"], row["expected"]) for row in rows if "answer" in row]
        if not answers:
            continue
        file = folder / f"{piece.method}--{study.name}-lr_{piece.rate:g}-seed{piece.seed}.json"
        text = json.dumps(of_run(study, piece, result, answers), indent=2)
        atomic.write_text(file, text + "\n")
        files.append(file)
    if not files:
        raise ConfigError(
            f"{study.folder} has no finished run with graded answers, which the board is about: set"
            " data.NAME.generate"
        )
    return files


def of_run(
    study: Study, piece: Piece, result: dict[str, Any], answers: list[tuple[str, str]]
) -> dict[str, Any]:
    """Return the board's record of a run."""
    run = study.folder / "runs" / piece.key
    record = load_yaml(run / "run.yaml")
    config = record["config"]
    steps = [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == "step"]
    last = steps[-250:]  # the board's eval_steps
    test_accuracy = accuracy(answers)
    return {
        "run_info": {
            "created_at": record["starts"][0]["time"],
            "total_time": result["seconds"],
            "experiment_name": f"{piece.method}/{study.name}-lr_{piece.rate:g}",
            "peft_branch": None,
            "train_config": _train_config(config),
            "peft_config": config["adapter"] | {"peft_type": piece.method.upper()},
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": result["peak_bytes"],
            "accelerator_memory_reserved_99th": None,
            "train_time": result["seconds"],
            "file_size": result["adapter_bytes"],
            "num_trainable_params": result["parameters"],
            "num_total_params": result["total_parameters"] + (result["parameters"] or 0),
            "status": "success",
            "metrics": [
                {
                    "step": result["steps"],
                    "test accuracy": test_accuracy,
                    "train loss": sum(row["loss"] for row in last) / max(1, len(last)),
                    "train samples": result["steps"] * config["batch_size"] * config["accumulate"],
                    "train total tokens": steps[-1]["tokens"] if steps else 0,
                }
            ],
        },
        "meta_info": _meta(config),
    }


def _train_config(config: dict[str, Any]) -> dict[str, Any]:
    optimizer = {key: value for key, value in config["optimizer"].items() if key[0] != "_"}
    return {
        "model_id": config["base"].get("path"),
        "dtype": config["precision"],
        "max_seq_length": config["max_length"],
        "batch_size": config["batch_size"] * config["accumulate"],
        "batch_size_eval": None,
        "max_steps": config["max_steps"],
        "eval_steps": None,
        "compile": config["compile"],
        "use_gc": bool(config["objective"]["gradient_checkpointing"]),
        "query_template": "Question: {query} Think step by step.\nAnswer:",
        "seed": config["seed"],
        "grad_norm_clip": config["objective"]["max_grad_norm"] or 0,
        "optimizer_type": config["optimizer"]["_target_"].rpartition(".")[2],
        "optimizer_kwargs": optimizer,
        "lr_scheduler": config["schedule"]["_target_"].rpartition(".")[2],
        "use_amp": False,
        "autocast_adapter_dtype": True,
        "generation_kwargs": {},
        "attn_implementation": config["base"].get("attn_implementation"),
        "init_kv_cache_prefix": None,
    }


def _meta(config: dict[str, Any]) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        packages |= {f"{name}-version": metadata.version(name), f"{name}-commit-hash": None}
    return {
        "model_info": {"sha": config["base"].get("revision"), "created_at": None},
        "dataset_info": {},
        "package_info": packages,
        "system_info": {
            "system": platform.system(),
            "release": platform.release(),
            "version": platform.version(),
            "machine": platform.machine(),
            "processor": platform.processor(),
            "accelerator": torch.cuda.get_device_name(0) if cuda else "cpu",
        },
        "pytorch_info": torch.__config__.show(),
    }
