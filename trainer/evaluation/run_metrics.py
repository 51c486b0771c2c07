"""The metrics of a run's model over its held-out rows, with and without the adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from trainer import drafters
from trainer.assembly.build import instantiate
from trainer.assembly.rows import add_prompts, load_held_out
from trainer.assembly.trained import load_trained
from trainer.config import schema
from trainer.config.errors import ConfigError
from trainer.config.quoting import quoted
from trainer.data.batches import Pick
from trainer.data.held_out import HeldOut, to_device
from trainer.decoding.merged import merged
from trainer.evaluation.answers import answers, means
from trainer.evaluation.loss import losses, prefixed
from trainer.models.losses import CausalLoss, ClassLoss
from trainer.storage import run_folder


def run_metrics(
    run: str,
    compare: bool,
    generate: int,
    batch_size: int,
    max_new_tokens: int,
    settings: tuple[str, ...] = (),
    rows: list[dict[str, Any]] | None = None,
) -> dict[str, dict[str, float]]:
    """Return the metrics of the adapted model; with `compare` those of the base first. `generate`
    is the number of prompts whose answers are graded. `settings` are words task.KEY=VALUE that
    replace the run's; `rows` gets the adapted model's numbers of each row, and its `set` if that is
    one of task.eval_sets.

    Raises:
        DataError: the run holds out no rows. ConfigError: a setting is none of the run's task.
        Others: see load_trained.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(run, device)
    if settings:
        trained.config["task"] |= task_settings(trained.config["task"], settings)
        day = getattr(trained.task, "day", None)
        trained.task = instantiate(trained.config["task"])
        run_folder.use_template(trained.folder, trained.task)
        trained.task.day = day
    data = load_held_out(trained.config, trained.base, trained.task)
    if generate:
        add_prompts(data, generate, trained.stops)
    held_out: Any = data.held_out
    loss: Any
    if trained.task.kind == "label":
        loss = ClassLoss(trained.model)
    else:
        target = drafters.Target(trained.model) if trained.drafter is not None else None
        chunk = trained.config["objective"]["logits_chunk"]
        loss = CausalLoss(trained.model, chunk, trained.drafter, target)
    results: dict[str, dict[str, float]] = {}
    for name in ["base", "adapted"] if compare else ["adapted"]:
        base = trained.adapter.disabled(trained.model) if name == "base" else None
        with base or contextlib.nullcontext():
            results[name] = {}
            for of_set, part in [(None, held_out), *held_out.more.items()]:
                values = losses(loss, part, batch_size, device)
                graded = None
                if part.prompts:
                    with merged(trained.model):
                        graded = answers(trained.model, part, batch_size, max_new_tokens, device)
                    values |= means(graded or [])
                if rows is not None and name == "adapted":
                    named = {} if of_set is None else {"set": of_set}
                    numbers = row_numbers(loss, part, graded or [], device)
                    rows += [row | named for row in numbers]
                results[name] |= values if of_set is None else prefixed(of_set, values)
    return results


def task_settings(task: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """Read words task.KEY=VALUE, as settings of a recorded task.

    Raises:
        ConfigError: a word cannot be read, the task has no such key, or a value has another type.
    """
    files = [schema.load(f"task/{name}") for name in schema.options("task")]
    table = next(file for file in files if file.target == task["_target_"])
    values: dict[str, Any] = {}
    for word in words:
        key = word.partition("=")[0].removeprefix("task.")
        try:
            parsed = OverridesParser.create().parse_override(quoted(word))
            values[key] = parsed.value()
        except HydraException as error:
            raise ConfigError(f"{word}: {error}") from None
        if key not in table.children:
            hint = schema.nearest(key, table.children)
            raise ConfigError(f"task.{key}: there is no such key. {hint} ({table.file})")
    if faults := schema.problems(task | values, table, "task"):
        raise ConfigError("\n".join(faults))
    return values


@torch.no_grad()
def row_numbers(
    loss: Callable[[dict[str, Any]], Any],
    held_out: HeldOut,
    graded: list[dict[str, Any]],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Return where each row is, its loss per trained token, how many these are, and for rows whose
    answer was generated the answer and its scores. Rows are evaluated one by one."""
    answered = {row["where"]: row for row in graded}
    result = []
    for number in range(len(held_out.sequences)):
        batch = held_out.collate([held_out.sequences[Pick(number, True, 1)]])
        _, counts = loss(to_device(batch, device))
        tokens, where = float(counts["tokens"]), held_out.sequences.rows.where(number)
        answer = answered.get(where)
        result.append(
            {
                "where": where,
                "loss": float(counts["loss"]) / max(1.0, tokens),
                "tokens": tokens,
                "scores": answer["scores"] if answer else {},
                **({"answer": answer["answer"], "expected": answer["expected"]} if answer else {}),
            }
        )
    return result
