"""The ageing of a draft head: an old head on its old model, on the new one, and after re-alignment.

Each stage decodes the same prompts greedily. tau is the tokens of a target pass, with the target's
own; `first` is how often the first drafted token was accepted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.assembly.trained import Trained, load_recorded_target, load_trained
from trainer.decoding.sampling import Sampling
from trainer.decoding.speculative import Result, generate, position_counts
from trainer.drafters import Drafter, Target, io
from trainer.evaluation import questions
from trainer.evaluation.questions import Question
from trainer.storage.checkpoints import CheckpointError
from trainer.storage.progress import Progress
from trainer.storage.run_folder import FolderError

STAGES = ("old head, old model", "old head, new model", "re-aligned head, new model")


def measure(
    run: str, draft: str, file: str | None, each: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Return a row for each of STAGES: its categories' tau and acceptance of the first drafted
    token, or why it was not measured. `run` trained the head further that `draft` names.

    Raises:
        FolderError, DrafterError, DataError: the run or the head cannot be read, or there are no
        questions.
    """
    chosen = None if file is None else questions.read_questions(file, each or None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    new = load_trained(run, device)
    chosen = questions.held_out_questions(new, each or 16) if chosen is None else chosen
    assert new.drafter is not None
    head = io.folder_of(draft)
    before = io.read(head)[1].get("adapter")
    dtype = next(new.model.parameters()).dtype
    rows: list[dict[str, Any]] = []
    for stage in STAGES:
        row: dict[str, Any] = {"stage": stage}
        rows.append(row)
        if stage == STAGES[2]:
            row["categories"] = _by_category(new, new.drafter, chosen, max_new_tokens)
            continue
        try:
            record = before if stage == STAGES[0] else new.adapted
            tuned = None if record is None else load_recorded_target(record, _neighbour(head, run))
        except (FolderError, CheckpointError) as error:
            row["not_measured"] = str(error)
            continue
        with Progress(f"loading {new.base.path}"):
            model = new.base.load(dtype, None, torch.device(device))
        drafter = io.load(head, model, new.base.fingerprint)
        model = model if tuned is None else tuned.attach(model)
        row["categories"] = _by_category(replace(new, model=model), drafter, chosen, max_new_tokens)
    return rows


def _neighbour(head: Path, run: str) -> Path:
    return head.parent if (head.parent / "run.yaml").exists() else Path(run)


def _by_category(
    run: Trained, drafter: Drafter, chosen: list[Question], max_new_tokens: int
) -> dict[str, dict[str, float]]:
    reader, target = questions.Prompts(run), Target(run.model)
    drafter = drafter.to(run.model.get_input_embeddings().weight.dtype)  # type: ignore[operator]
    device = next(run.model.parameters()).device
    results: dict[str, list[Result]] = {}
    with Progress("decoding", len(chosen), "questions") as progress:
        for question in progress.each(chosen):
            ids = torch.tensor(reader.ids(question), device=device)
            if len(ids) + max_new_tokens > run.base.longest:
                continue
            result = generate(target, drafter, ids, max_new_tokens, reader.stops, Sampling(0.0))
            results.setdefault(question.category, []).append(result)
    return {name: _summary(answers) for name, answers in results.items()}


def _summary(results: list[Result]) -> dict[str, float]:
    steps = sum(result.steps for result in results)
    first = next(iter(position_counts(results)), None)
    return {
        "questions": len(results),
        "tau": sum(len(result.tokens) - 1 for result in results) / steps if steps else 1.0,
        "first": first.taken / first.reached if first is not None and first.reached else 0.0,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of `measure` as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("categories", {})))
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for row in rows:
        cells = [row.get("categories", {}).get(name) for name in names]
        texts = ["" if one is None else f"{one['tau']:.2f} ({one['first']:.0%})" for one in cells]
        lines.append(f"| {row['stage']} | " + " | ".join(texts) + " |")
    lines += [
        f"\n{row['stage']}: not measured, since {row['not_measured']}"
        for row in rows
        if "not_measured" in row
    ]
    return "\n".join(lines) + "\n"
