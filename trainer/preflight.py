"""What can be known before weights are loaded: what becomes of the rows, what is trained, how long it takes, whether it fits.

    python -m trainer.preflight +experiment=NAME ... [--config-dir FOLDER] [--json FILE] [--samples N]

reads the whole data set and prints a table and a preview, trained tokens in one colour and masked ones in another. Errors make
the exit code 2. Training runs the same checks before it loads anything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from rich import get_console
from rich.text import Text
from torch import nn

from adapters.delta import Adapter, NeedsWeights, Start, features, targets
from adapters.full import Nothing
from trainer import assembly, folder, preview
from trainer.base import Base, BaseError, compute
from trainer.callbacks import every_steps
from trainer.data import special_text
from trainer.drafters import Drafter, DrafterError, io
from trainer.losses import positions
from trainer.penalties.deft import PenaltyError
from trainer.plan import Plan
from trainer.schedules import factor, length
from trainer.tokens import Refused

log = logging.getLogger("trainer")

SAMPLE = 200  # conversations whose prompt is rendered a second time, as it will be at inference


def inspect(
    config: dict[str, Any], base: Base, adapter: Adapter, found: assembly.Data, plan: Plan | None, steps: int, place: Path
) -> dict[str, Any]:
    """Everything that preflight reports, as plain data, with `errors` and `warnings` for people.

    Raises:
        AdapterError: the adapter does not fit the base.
    """
    errors: list[str] = []
    warnings: list[str] = []
    if config["max_length"] > base.longest:
        errors.append(
            f"max_length={config['max_length']} is more than the {base.longest} tokens that {base.path} was made for: set max_length={base.longest}"
        )
    result: dict[str, Any] = {"data": _data(config, found, warnings)}
    if plan is not None:
        result["run"] = _length(config, found, plan, steps)
    result["schedule"] = _rates(config, plan, steps, adapter.restart)
    planned = [
        length(schedule[key], steps) for key in ("warmup", "cooldown") if (schedule := config["schedule"]).get(key) is not None
    ]
    if steps and len(planned) > 1 and not config["branch"] and sum(planned) > steps:
        errors.append(
            f"a warm-up of {planned[0]} steps and a cooldown of {planned[1]} take more than the run's {steps} steps: give fewer, or "
            "fractions of the run"
        )
    _target(config, base, errors)
    result["model"] = _model(config, base, adapter, found, steps, place, errors, warnings)
    _check_names(config, found, errors)
    return result | {"errors": errors, "warnings": warnings}


def _data(config: dict[str, Any], found: assembly.Data, warnings: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    splits = {"train": found.train, "eval": found.held_out.sequences if found.held_out else None}
    digests: dict[str, set[bytes]] = {}
    for name, sequences in splits.items():
        if sequences is None:
            continue
        report = sequences.rows.report
        seen = list(sequences.rows.digests())
        digests[name] = set(seen)
        result[name] = {
            **{key: value for key, value in vars(report).items() if key != "bad"},
            "trained_share": report.trained_tokens / max(1, report.tokens),
            "duplicates": len(seen) - len(digests[name]),
            "bad": [f"{where}: {reason}" for where, reason in report.bad],
        }
        if found.renderer.kind == "conversation" and report.kept and report.ends_trained < report.kept:
            share = 1 - report.ends_trained / report.kept
            warnings.append(
                f"{name}: {share:.0%} of the answers end without a trained end token, so the model does not learn to stop after them"
            )
        lost = report.dropped + report.answers_lost + report.skipped
        if report.rows and lost / report.rows > 0.1:
            warnings.append(f"{name}: {lost} of {report.rows} rows are left out ({report.summary()})")
    if len(digests) == 2:
        shared = len(digests["train"] & digests["eval"])
        result["shared"] = shared
        if shared:
            warnings.append(f"{shared} rows of evaluation are in the training data too: its numbers are too good")
    if found.renderer.kind == "conversation" and not found.task.streaming:
        result["prompts"] = _prompts(found, warnings)
        result["special_text"] = special_text(found.task.examples("train"), found.renderer.tokenizer)
        if result["special_text"]:
            warnings.append(
                f"{result['special_text']} rows have the text of a special token in a message; it is read as that token"
            )
    return result


def _prompts(found: assembly.Data, warnings: list[str]) -> dict[str, int]:
    """Whether rows begin as the prompt that the model will be given at inference."""
    renderer = found.renderer
    tried = same = 0
    for example in itertools.islice(found.task.examples("train"), SAMPLE):
        try:
            row, prompt = renderer(example), renderer.prompt(example)
        except (Refused, AttributeError):
            continue
        tried += 1
        same += row.ids[: len(prompt)] == prompt
    if same < tried:
        warnings.append(
            f"in {tried - same} of {tried} rows the last answer is trained after other tokens than the generation prompt that the template "
            "writes at inference"
        )
    return {"tried": tried, "as_at_inference": same}


def _length(config: dict[str, Any], found: assembly.Data, plan: Plan, steps: int) -> dict[str, Any]:
    lengths = plan.lengths
    per_epoch = -(-len(lengths) // plan.per_step)
    padded = sum(
        max(lengths[pick.sequence] for pick in batch) * len(batch)
        for step in range(min(steps, 50))
        for batch in plan.micro_batches(step)
    )
    real: int = sum(
        lengths[pick.sequence] for step in range(min(steps, 50)) for batch in plan.micro_batches(step) for pick in batch
    )
    result = {
        "steps": steps,
        "steps_per_epoch": per_epoch,
        "epochs": plan.positions(steps) / max(1, len(lengths)),
        "sequences": len(lengths),
        "tokens_per_epoch": int(lengths.sum()),
        "trained_tokens_per_epoch": int(plan.trained.sum()),
        "padding_share": 1 - float(real) / float(padded) if padded else 0.0,
    }
    if config["packing"] and len(lengths):
        result["packing_efficiency"] = float(lengths.sum()) / (len(lengths) * config["max_length"])
    return result


def _rates(config: dict[str, Any], plan: Plan | None, steps: int, restart: int) -> dict[str, Any]:
    if not steps:
        return {}
    schedule, peak = assembly.schedule(config, plan), config["optimizer"]["lr"]
    points = sorted({round(i * (steps - 1) / 20) for i in range(21)})
    return {"peak": peak, "rates": [[step, peak * factor(schedule, step, steps, restart)] for step in points]}


def _model(
    config: dict[str, Any],
    base: Base,
    adapter: Adapter,
    found: assembly.Data,
    steps: int,
    place: Path,
    errors: list[str],
    warnings: list[str],
) -> dict[str, Any]:
    labels = found.task.labels if found.task.kind == "label" else None
    skeleton = base.skeleton(labels)
    total = sum(p.numel() for p in skeleton.parameters())
    linears = sum(math.prod(features(linear)) for _, linear in targets(skeleton, "all-linear"))
    drafted = _drafter(config, skeleton, found, errors)
    try:
        model = adapter.attach(skeleton, Start(assembly.new_modules(skeleton, labels), max(1, steps)))
        trainable = drafted + sum(p.numel() for p in model.parameters() if p.requires_grad)
    except NeedsWeights:
        model, trainable = skeleton, None
        warnings.append(
            "how many parameters are trained is known only when the base is loaded; memory and checkpoint leave them out"
        )
    if trainable == 0 and not isinstance(adapter, Nothing):
        errors.append("the adapter has no trainable parameter")
    _penalty(config, adapter, model, errors)
    cuda = torch.cuda.is_available() and config["lightning"]["accelerator"] != "cpu"
    trains_base, known = trainable == total, trainable or 0
    dtype, _, precision = compute(config["precision"], config["base"]["dtype"], trains_base, cuda)
    parts = _memory(config, base, dtype, total, linears, known, found)
    needed = sum(parts.values())
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    if needed > free:
        warnings.append(f"the run needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")
    checkpoint_bytes = known * (4 + 8 if not trains_base else dtype.itemsize * 3) if steps else 0
    keep = _checkpoints(config["callbacks"].get("checkpoints") or {}, steps)
    disk = shutil.disk_usage(_existing(place)).free
    if checkpoint_bytes * (keep + 2) > disk:
        errors.append(
            f"{keep + 2} checkpoints of about {checkpoint_bytes / 1e6:.3g} MB do not fit on the disk of {place}, "
            f"which has {disk / 1e6:.3g} MB free: free some space, or choose another place with runs=FOLDER"
        )
    return {
        "parameters": total, "trainable": trainable, "precision": precision, "dtype": str(dtype).removeprefix("torch."),
        "memory_bytes": parts, "memory_needed": needed, "memory_free": free, "checkpoint_bytes": checkpoint_bytes, "disk_free": disk,
    }  # fmt: skip


def _checkpoints(settings: dict[str, Any], steps: int) -> int:
    """How many checkpoints the run will hold, beside the best one."""
    if settings.get("keep", 1) is not None:
        return settings.get("keep", 1)
    return steps // (every_steps(settings["every"], steps) or max(1, steps))


def _penalty(config: dict[str, Any], adapter: Adapter, model: nn.Module, errors: list[str]) -> None:
    if not config["penalty"]:
        return
    if isinstance(adapter, Nothing):
        errors.append("adapter=none trains nothing, so that a penalty has no effect: set penalty=none")
        return
    if config["penalty"]["eps"] == "auto" and config["task"].get("streaming"):
        errors.append(
            "penalty.eps=auto is measured on training data beforehand, which task.streaming=true does not allow: set penalty.eps to a number"
        )
    try:
        assembly.instantiate(config["penalty"])(model=model)
    except PenaltyError as error:
        errors.append(str(error))


def _target(config: dict[str, Any], base: Base, errors: list[str]) -> None:
    """Whether the run and the drafter that this one builds on are of its base."""
    try:
        if (run := config["target"]["run"]) is not None and folder.read(run)[1]["identity"]["base"] != base.fingerprint:
            errors.append(
                f"target.run={run}: {base.path} is not the model that this run was trained on: its weights have changed"
            )
        if config["target"]["draft"] is not None and config["drafter"]:
            io.check(io.folder_of(config["target"]["draft"]), base, config["drafter"])
    except (folder.FolderError, DrafterError) as error:
        errors.append(str(error))


def _drafter(config: dict[str, Any], skeleton: nn.Module, found: assembly.Data, errors: list[str]) -> int:
    """The number of parameters that the drafter trains."""
    if not config["drafter"]:
        return 0
    if found.task.kind == "label":
        errors.append("a drafter predicts tokens, and this task gives one label to each row: set drafter=none")
        return 0
    try:
        drafter: Drafter = assembly.instantiate(config["drafter"])(model=skeleton)
    except DrafterError as error:
        errors.append(str(error))
        return 0
    longest = found.train.rows.report.longest if found.train is not None else config["max_length"]
    if longest < drafter.offsets + 2:
        errors.append(
            f"the longest row has {longest} tokens, and a drafter of {drafter.offsets} offsets needs {drafter.offsets + 2}: "
            f"set fewer drafter.{'d_max' if 'd_max' in config['drafter'] else 'offsets'}, or give longer rows"
        )
    return sum(p.numel() for p in drafter.parameters() if p.requires_grad)


def _memory(
    config: dict[str, Any], base: Base, dtype: torch.dtype, total: int, linears: int, trainable: int, found: assembly.Data
) -> dict[str, int]:
    """An estimate, in bytes. Activations of a decoder layer are near 30 d + 5 m numbers a token, fused ones 12 d + 3 m (SmolLM2 with
    LoRA, measured)."""
    text = base.config.get_text_config()
    width, inner = getattr(text, "hidden_size", 0), getattr(text, "intermediate_size", 0) or 0
    layers = getattr(text, "num_hidden_layers", 0)
    packed = {"none": dtype.itemsize, "nf4": 0.53, "int8": 1.0}[base.quantization]
    longest = min(config["max_length"], found.train.rows.report.longest) if found.train is not None else config["max_length"]
    tokens = config["batch_size"] * (config["max_length"] if config["packing"] else longest)
    per_layer = (12 * width + 3 * inner if config["fused"] else 30 * width + 5 * inner) * dtype.itemsize
    vocabulary, device = getattr(text, "vocab_size", 0), "cuda" if torch.cuda.is_available() else "cpu"
    if config["objective"]["_target_"] == "trainer.distill.Distill":  # the target keeps nothing for a backward pass
        kept = config["drafter"]["offsets"] * per_layer
    else:
        checkpointed = config["objective"]["gradient_checkpointing"]
        kept = layers * width * dtype.itemsize + per_layer if checkpointed else layers * per_layer
    moments = 2 if "8bit" in config["optimizer"]["_target_"] else 8
    return {
        "weights": int(linears * packed + (total - linears) * dtype.itemsize),
        "trained": trainable * (4 + 4 + moments),
        "activations": int(tokens * kept),
        "logits": (config["objective"]["logits_chunk"] or positions(vocabulary, device)) * vocabulary * 12,
    }


def _existing(place: Path) -> Path:
    while not place.exists():
        place = place.parent
    return place


def _check_names(config: dict[str, Any], found: assembly.Data, errors: list[str]) -> None:
    evaluation = config["callbacks"].get("evaluation")
    if not evaluation or found.held_out is None:
        return
    known = ["loss", "accuracy", "f1" if found.task.kind == "label" else "perplexity"]
    known = ["loss"] if config["objective"]["_target_"] == "trainer.distill.Distill" else known
    known += _drafted(config["drafter"])
    graded = found.task.metrics if evaluation["generate"] else []
    monitor, place = evaluation["monitor"], "callbacks.evaluation"
    if monitor not in known + graded:
        hint = f" (set {place}.generate)" if monitor in found.task.metrics else ""
        errors.append(f"{place}.monitor={monitor} is no metric of this task{hint}; there are: {', '.join(known + graded)}")
    elif monitor in graded and evaluation["generate_every"] is None:
        errors.append(f"{place}.monitor={monitor} is measured only where answers are generated: set {place}.generate_every=1")


def _drafted(drafter: dict[str, Any]) -> list[str]:
    """The names of what trainer.drafters.metrics finds."""
    if not drafter:
        return []
    distilled = drafter.get("loss", "labels") != "labels"  # taught by the target's distributions
    of_each = ["loss", "top1", "top5", *(["acceptance"] if distilled else [])]
    offsets = drafter["offsets"] if "offsets" in drafter else drafter["d_max"] - 1
    names = [f"offset{k}/{name}" for k in range(1, offsets + 1) for name in of_each]
    return ["accepted", *(["expected"] if distilled else []), *names]


def parameters(model: nn.Module) -> str:
    """How much of a model is trained, for people."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})"


@torch.no_grad()
def refuse_contamination(model: nn.Module, base: Base) -> None:
    """Try on a few tokens whether packed rows see only themselves in this model: what stands behind another row does not change with
    that row, and is what it is alone. The second is held for most positions only: in bf16 rounding alone, which differs between lengths,
    can turn a token's logits over.

    Raises:
        BaseError: they do not.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    row = torch.arange(5, 12, device=device)
    firsts = [torch.arange(start, start + 8, device=device) for start in (3, 13)]
    places = torch.cat([torch.arange(len(part), device=device) for part in (firsts[0], row)])
    behind = [
        model(input_ids=torch.cat([first, row])[None], position_ids=places[None], use_cache=False)
        .logits[0, -len(row) :]
        .float()
        for first in firsts
    ]
    alone = model(input_ids=row[None], use_cache=False).logits[0].float()
    model.train(was_training)
    scale = max(float(alone.abs().max()), 1e-6)
    apart = (behind[0] - alone).abs().amax(-1).median()
    difference = max(float((behind[0] - behind[1]).abs().max()), float(apart))
    if difference > (0.05 if next(model.parameters()).dtype != torch.float32 else 1e-3) * scale:
        raise BaseError(
            f"in {base.path} packed rows see each other (logits differ by {difference:.3g} of {scale:.3g}): it carries state that attention masks "
            "do not cut. Set packing=false"
        )


def quick(
    config: dict[str, Any], base: Base, adapter: Adapter, found: assembly.Data, plan: Plan | None, steps: int, place: Path
) -> dict[str, Any]:
    """`inspect` for a run that is about to start: warnings are said, errors end it.

    Raises:
        BaseError: with the errors.
    """
    result = inspect(config, base, adapter, found, plan, steps, place)
    for warning in result["warnings"]:
        log.warning("%s", warning)
    if result["errors"]:
        raise BaseError("\n".join(result["errors"]))
    return result


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from omegaconf import OmegaConf

    from trainer import config as configs
    from trainer import failures

    parser = argparse.ArgumentParser("python -m trainer.preflight", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config-dir", metavar="FOLDER")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--samples", metavar="N", type=int, default=2)
    options, arguments = parser.parse_known_args(argv)
    if options.help:
        print(__doc__)
        return 0
    if options.json and not Path(options.json).parent.is_dir():
        return configs.bad(f"--json {options.json}: there is no such folder")
    if options.config_dir:
        arguments.append(f"hydra.searchpath=['file://{Path(options.config_dir).resolve()}']")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        config: dict[str, Any] = OmegaConf.to_container(configs.compose(arguments), resolve=True)  # type: ignore[assignment]
    except Exception as error:  # a ConfigError, or Hydra's own: an unknown group or experiment
        return configs.bad(configs.told(error))
    assembly.quiet()
    try:
        base: Base = assembly.instantiate(config["base"])
        task = assembly.instantiate(config["task"])
        adapter = assembly.instantiate(config["adapter"])
        found = assembly.tokenised(config, base, task)
        devices = config["lightning"]["devices"]
        plan = (
            assembly.plan(config, found, (devices if isinstance(devices, int) else 1) * config["lightning"]["num_nodes"])
            if found.train
            else None
        )
        steps = plan.steps(config["max_steps"], config["max_tokens"]) if plan else config["max_steps"]
        steps = 0 if isinstance(adapter, Nothing) and not config["drafter"] else steps
        result = inspect(config, base, adapter, found, plan, steps, Path(config["runs"]) / config["name"])
    except Exception as error:
        explained = failures.explained(error, config)
        if explained is None:
            raise
        print(explained[0], file=sys.stderr)
        return explained[1]
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    console = get_console()
    console.print(preview.table(result))
    for text in preview.samples(found, options.samples):
        console.print(text)
    for kind, style in (("warnings", "yellow"), ("errors", "red")):
        for line in result[kind]:
            console.print(Text.assemble((kind[:-1], style), f": {line}"))
    return configs.EXIT_BAD_INPUT if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
