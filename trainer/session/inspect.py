"""Checks of a run before its weights are loaded."""

from __future__ import annotations

import contextlib
import itertools
import logging
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tasks.reading import Bad
from trainer.assembly.build import schedule
from trainer.assembly.recipe import Recipe
from trainer.assembly.rows import Data
from trainer.config.rates import recommended
from trainer.data import ends
from trainer.data.batches import BatchOrder
from trainer.data.chat_template import Refused, template
from trainer.data.render import Renderer
from trainer.data.rendering import special_text
from trainer.evaluation import class_metrics
from trainer.models.base import BaseError
from trainer.schedules import factor, length
from trainer.session.footprint import estimate
from trainer.storage import run_folder

log = logging.getLogger("trainer")

LOWER = frozenset({"loss", "perplexity", "mse"})  # metrics that are better when lower

SAMPLE = 200  # conversations whose prompt is rendered a second time, as it will be at inference


def inspect(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return everything that preflight reports as plain data, with messages for the user under
    `errors` and `warnings`. `folder` is where the run will be.

    Raises:
        AdapterError: the adapter does not fit the base.
    """
    config, steps = recipe.config, recipe.steps
    errors: list[str] = []
    warnings: list[str] = []
    result: dict[str, Any] = {"data": _data(recipe.data, warnings)}
    if recipe.order is not None:
        result["run"] = _length(config, recipe.order, steps)
        rows = recipe.order.per_step
    else:
        rows = config["batch_size"] * config["accumulate"] * recipe.ranks
    if (plan := recipe.adapter.plan_text(steps)) is not None:
        result["plan"] = plan
    warnings += recipe.adapter.plan_warnings(steps, rows)
    result["schedule"] = _rates(recipe)
    if steps and (advice := recommended(config)) is not None:
        result["recommended_rate"] = {"rate": advice[0], "source": advice[1]}
    ramps = [
        length(config["schedule"][key], steps)
        for key in ("warmup", "cooldown")
        if config["schedule"].get(key) is not None
    ]
    if steps and len(ramps) > 1 and not config["branch"] and sum(ramps) > steps:
        errors.append(
            f"a warm-up of {ramps[0]} steps and a cooldown of {ramps[1]} take more than the run's"
            f" {steps} steps: give fewer, or fractions of the run"
        )
    _template_of_target(config, recipe.data.renderer, warnings)
    footprint = estimate(recipe, folder)
    result["model"] = footprint.as_record()
    errors += footprint.errors
    warnings += footprint.warnings
    return result | {"errors": errors, "warnings": warnings}


def _data(data: Data, warnings: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    splits = {"train": data.train, "eval": data.held_out.sequences if data.held_out else None}
    if data.held_out is not None:
        splits |= {f"eval/{name}": part.sequences for name, part in data.held_out.more.items()}
    digests: dict[str, set[bytes]] = {}
    for name, sequences in splits.items():
        if sequences is None:
            continue
        report = sequences.rows.report
        row_digests = list(sequences.rows.digests())
        digests[name] = set(row_digests)
        result[name] = {
            **{key: value for key, value in vars(report).items() if key != "bad"},
            "trained_share": report.trained_tokens / max(1, report.tokens),
            "duplicates": len(row_digests) - len(digests[name]),
            "bad": [f"{where}: {reason}" for where, reason in report.bad],
        }
        if (
            data.renderer.kind == "conversation"
            and report.kept
            and report.ends_trained < report.kept
        ):
            share = 1 - report.ends_trained / report.kept
            warnings.append(
                f"{name}: {share:.0%} of the answers end without a trained end token, so the model"
                f" does not learn to stop after them{_end_in_pieces(data.renderer)}"
            )
        lost = report.dropped + report.answers_lost + report.skipped + report.weightless
        total = report.rows + report.further
        if total and lost / total > 0.1:
            what = "sequences" if report.further else "rows"
            warnings.append(f"{name}: {lost} of {total} {what} are left out ({report.summary()})")
        warnings += [f"{name}: {note}" for note in report.notes()]
    if "train" in digests:
        _shared(digests, result, warnings)
    if data.renderer.kind == "conversation" and not data.task.streaming:
        result["prompts"] = _prompts(data, warnings)
        warnings += _blank(data.renderer)
        result["special_text"] = special_text(data.task.examples("train"), data.renderer.tokenizer)
        if result["special_text"]:
            warnings.append(
                f"{result['special_text']} rows have the text of a special token in a message; the"
                " tokeniser reads it as that token"
            )
    return result


def _blank(renderer: Renderer) -> list[str]:
    """Say that prompt and answer are joined by a blank, where the tokenizer begins each text with
    one, as Llama 2's does, and no chat template stands between them."""
    if renderer.template is not None or renderer.decoder_start is not None:
        return []
    tokenizer = renderer.tokenizer
    twice = 2 * tokenizer("1", add_special_tokens=False)["input_ids"]
    if tokenizer.decode(twice).strip() == "11":
        return []
    return [
        "this tokenizer begins each text with a blank, so with task.chat_template=none each answer"
        " begins with one, in training and when the model answers"
    ]


def _end_in_pieces(renderer: Renderer) -> str:
    """Say that the tokenizer splits the text that the template writes after an answer, if it
    does."""
    texts = ends.of_pieces(renderer)
    if not texts:
        return ""
    pieces = renderer.tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    return (
        f". The chat template writes {texts[0]!r} after an answer, for which this tokenizer has no"
        f" special token ({len(pieces)} tokens). The commands of this program stop at that text."
        " Other programs need it as a stop string, or choose a template that ends answers in one"
        f" token, such as {renderer.tokenizer.eos_token} (task.chat_template)"
    )


def _shared(digests: dict[str, set[bytes]], result: dict[str, Any], warnings: list[str]) -> None:
    """Count the rows of each set of evaluation that the training data has too."""
    for name in [name for name in digests if name != "train"]:
        shared = len(digests["train"] & digests[name])
        if name == "eval":
            result["shared"] = shared
        if shared:
            what = "evaluation" if name == "eval" else name
            warnings.append(
                f"{shared} rows of {what} are in the training data too: its numbers will be too"
                " good"
            )


def _prompts(data: Data, warnings: list[str]) -> dict[str, int]:
    """Count the rows that begin with the prompt that the model gets at inference."""
    renderer = data.renderer
    tried = same = 0
    for example in itertools.islice(data.task.examples("train"), SAMPLE):
        if isinstance(example, Bad):
            continue
        try:
            row, prompt = renderer(example), renderer.prompt(example)
        except Refused:
            continue
        if len(example.messages) - 1 in example.untrained:
            continue
        tried += 1
        same += row.ids[: len(prompt)] == prompt
    if same < tried:
        warnings.append(
            f"in {tried - same} of {tried} rows the last answer is trained after other tokens than"
            " the generation prompt that the template writes at inference"
        )
    return {"tried": tried, "as_at_inference": same}


def _length(config: dict[str, Any], order: BatchOrder, steps: int) -> dict[str, Any]:
    seen = order.members(0)
    lengths = order.lengths[seen]
    per_epoch = -(-len(lengths) // order.per_step)
    sizes = [
        [order.lengths[pick.sequence] for pick in batch]
        for step in range(min(steps, 50))
        for batch in order.micro_batches(step)
    ]
    padded = sum(max(batch) * len(batch) for batch in sizes)
    real: int = sum(sum(batch) for batch in sizes)
    result = {
        "steps": steps,
        "steps_per_epoch": per_epoch,
        "epochs": order.positions(steps) / max(1, len(lengths)),
        "sequences": len(lengths),
        "tokens_per_epoch": int(lengths.sum()),
        "trained_tokens_per_epoch": int(order.trained[seen].sum()),
        "padding_share": 1 - float(real) / float(padded) if padded else 0.0,
    }
    if order.subset is not None:
        result["drawn_from"] = order.subset.count
    if config["packing"] and len(lengths):
        result["packing_efficiency"] = float(lengths.sum()) / (len(lengths) * config["max_length"])
    return result


def _rates(recipe: Recipe) -> dict[str, Any]:
    """Return the peak rate, and the rate at up to 21 steps of the run."""
    steps = recipe.steps
    if not steps:
        return {}
    factors = schedule(recipe.config, recipe.order)
    peak, restart = recipe.config["optimizer"]["lr"], recipe.adapter.restart
    points = sorted({round(i * (steps - 1) / 20) for i in range(21)})
    return {
        "peak": peak,
        "rates": [[step, peak * factor(factors, step, steps, restart)] for step in points],
    }


def _template_of_target(config: dict[str, Any], renderer: Renderer, warnings: list[str]) -> None:
    """Warn if a drafter's rows are rendered by another template than those of its target."""
    run = config["target"]["run"]
    if run is None or renderer.template is None:
        return
    with contextlib.suppress(run_folder.FolderError, OSError):  # reported before
        file = run_folder.read(run)[0] / run_folder.TEMPLATE
        if file.is_file() and template(str(file), None) != renderer.template:
            warnings.append(
                f"target.run={run} was trained with another chat template than these rows, so the"
                " drafter would learn other texts than the target writes: set"
                f" task.chat_template={file}"
            )


def refuse_monitor(config: dict[str, Any], task: Any) -> None:
    """Check the metric that chooses the best checkpoint.

    Raises:
        BaseError: the task has no such metric, or does not measure it.
    """
    evaluation = config["callbacks"].get("evaluation")
    if not evaluation or not _evaluates(config["task"]):
        return
    labelled = task.kind == "label"
    more = class_metrics.NAMES[task.problem] if labelled else ("accuracy", "perplexity")
    metrics = ["loss", *more]
    if config["objective"]["_target_"] == "trainer.training.distill.Distill":
        metrics = ["loss"]
    metrics += _drafter_metrics(config["drafter"])
    scores = list(task.metrics) if evaluation["generate"] else []
    further = getattr(task, "eval_sets", [])
    metrics += [f"{name}/{metric}" for name in further for metric in list(metrics)]
    scores += [f"{name}/{metric}" for name in further for metric in list(scores)]
    monitor, key = evaluation["monitor"], "callbacks.evaluation"
    benchmark = monitor.rpartition("/")[0]
    if benchmark and any(fnmatch(benchmark, name) for name in evaluation.get("harness", ())):
        if evaluation["harness_every"] is None:
            raise BaseError(
                f"{key}.monitor={monitor} is measured only where lm-eval is asked: set"
                f" {key}.harness_every=1"
            )
        return
    if monitor not in metrics + scores:
        hint = f" (set {key}.generate)" if monitor in task.metrics else ""
        raise BaseError(
            f"{key}.monitor={monitor} is no metric of this task{hint}; the metrics are:"
            f" {', '.join(metrics + scores)}"
        )
    if monitor in scores and evaluation["generate_every"] is None:
        raise BaseError(
            f"{key}.monitor={monitor} is measured only where answers are generated: set"
            f" {key}.generate_every=1"
        )
    if fault := wrong_mode(monitor, evaluation.get("mode", "min"), task):
        log.warning("%s.monitor=%s", key, fault)


def wrong_mode(metric: str, mode: str, task: Any) -> str | None:
    """Say that a metric is better the other way, if its name tells."""
    name = metric.rpartition("/")[2]
    higher = {"accuracy", *task.metrics, *itertools.chain(*class_metrics.NAMES.values())}
    if name in LOWER and mode == "max":
        return f"{metric} is better when lower, and mode=max takes the highest: set mode=min"
    if name in higher - LOWER - {"ttr"} and mode == "min":
        return f"{metric} is better when higher, and mode=min takes the lowest: set mode=max"
    return None


def _evaluates(task: dict[str, Any]) -> bool:
    """Return whether a task's settings give it rows of evaluation."""
    return (
        bool(task.get("eval_path"))
        or bool(task.get("eval_fraction"))
        or "eval_fraction" not in task
    )


def _drafter_metrics(drafter: dict[str, Any]) -> list[str]:
    """Name the metrics that trainer.drafters.metrics returns."""
    if not drafter:
        return []
    # taught by the target's distributions; l1 is a block drafter's distance to them
    distilled = drafter.get("loss", "labels") != "labels" or "l1" in drafter
    per_offset = ["loss", "top1", "top5", *(["acceptance"] if distilled else [])]
    offsets = drafter["offsets"] if "offsets" in drafter else drafter["d_max"] - 1
    names = [f"offset{k}/{name}" for k in range(1, offsets + 1) for name in per_offset]
    return ["accepted", *(["expected"] if distilled else []), *names]


def check_before_start(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """`inspect` a run that is about to start, and log the warnings.

    Raises:
        BaseError: there are errors; its text has all of them.
    """
    result = inspect(recipe, folder)
    if "plan" in result:
        log.info("%s", result["plan"])
    for warning in result["warnings"]:
        log.warning("%s", warning)
    if result["errors"]:
        raise BaseError("\n".join(result["errors"]))
    return result
