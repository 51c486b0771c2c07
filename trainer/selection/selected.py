"""Rows of a pool, chosen and written with a record of why.

ROWS.jsonl         the pool's own rows, in the order of choice
ROWS.select.json   how they were chosen: settings, digests, and of each row its file and line in
                   the pool, its score, and the target that it was taken for
ROWS.jsonl.work/   while it runs: the numbers of the rows that are done, from which the same
                   command continues
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.errors import AdapterError
from tasks.reading import Bad, DataError
from trainer.assembly.build import instantiate
from trainer.assembly.rows import Data, load_data
from trainer.assembly.trained import Trained, load_trained
from trainer.data.chat_template import use_day
from trainer.data.rows import Rows
from trainer.evaluation.run_metrics import task_settings
from trainer.selection import choose
from trainer.selection.choose import Choice
from trainer.selection.gradients import RowLoss, Sketch
from trainer.selection.store import Store
from trainer.selection.whiten import Whitening
from trainer.storage import atomic, door, run_folder
from trainer.storage.locks import locked

log = logging.getLogger("trainer")

WARM = 50  # steps after which gradients point somewhere
TARGETED = ("gradient", "transport")  # these choose for targets
GRADIENTS = (*TARGETED, "leverage")
UPDATES = (".B", ".lora_B.default.weight")  # the factors that start at zero


@dataclass(frozen=True)
class Plan:
    """The pool to choose from, the target, and the method."""

    run: str
    by: str
    keep: float  # a share of the pool below 1, else a number of rows
    to: Path
    target: str | None = None  # a file of rows, or `eval`: the run's held-out rows
    settings: tuple[str, ...] = ()  # words task.KEY=VALUE: the pool, if not the run's rows
    dims: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Selected:
    """The result of `select`."""

    to: Path
    record: Path
    rows: int
    pool: int
    tokens: int  # that are trained in the chosen rows
    pool_tokens: int
    removed: int  # rows of the pool that are targets, too
    targets: int


@dataclass(frozen=True)
class Pool:
    """The rows to choose from, without those that are targets."""

    data: Data
    rows: Rows
    members: np.ndarray  # the rows that can be chosen
    targets: Rows | None
    removed: int

    def row(self, place: int) -> Any:
        """Return the tokens of the member at a place."""
        return self.rows[int(self.members[place])]


def select(plan: Plan) -> Selected:
    """Choose rows, and write them with their record.

    Raises:
        FolderError: the output exists.
        DataError: there are no rows, no targets, or too few to choose from.
        AdapterError: the run has no adapter whose gradients say anything.
    """
    record = plan.to.with_suffix(".select.json")
    for path in (plan.to, record):
        door.refuse_existing(path, "to=FILE")
    work = plan.to.with_name(f"{plan.to.name}.work")
    folder, content, _ = run_folder.read(plan.run)
    if plan.by != "random":
        run = load_trained(plan.run, "cuda" if torch.cuda.is_available() else "cpu")
        base, config = run.base, run.config
    else:
        run, config = None, content["config"]
        base = instantiate(config["base"])
    pool = _pool(plan, folder, config, base)
    count = _count(plan.keep, len(pool.members))
    if run is None:
        choice = choose.at_random(len(pool.members), count, plan.seed)
    else:
        _refuse_cold(run, plan)
        work.mkdir(parents=True, exist_ok=True)
        with locked(work / ".lock", str(plan.to)):
            choice = _chosen(plan, run, pool, count, work)
    examples = np.asarray(pool.rows.examples())[pool.members]
    choice = once(choice, examples)
    _write(plan, pool, choice, record, content)
    shutil.rmtree(work, ignore_errors=True)
    trained = pool.rows.trained
    chosen = np.isin(examples, examples[choice.rows])  # with all texts of the rows that are written
    return Selected(
        plan.to,
        record,
        len(choice.rows),
        len(np.unique(examples)),
        int(trained[pool.members[chosen]].sum()),
        int(trained[pool.members].sum()),
        pool.removed,
        len(pool.targets) if pool.targets is not None else 0,
    )


def _pool(plan: Plan, folder: Path, config: dict[str, Any], base: Any) -> Pool:
    own = config["task"]
    config = config | {"packing": False, "task": own | task_settings(own, plan.settings)}
    task = _task(config, folder)
    if task.streaming or not hasattr(task, "splits"):
        raise DataError(
            f"the run's task {type(task).__name__} has no file of rows to choose from: rows are"
            " chosen from a task with task.path=FILE that does not stream"
        )
    data = load_data(config, base, task)
    assert data.train is not None
    rows, targets = data.train.rows, None
    members = np.arange(len(rows))
    if plan.target is not None:
        if plan.target == "eval":
            targets = _held_out(folder, config | {"task": own}, base)
        else:
            targets = _targets(plan.target, folder, config, base)
        same = {_ids(targets[row]) for row in range(len(targets))}
        members = np.array(
            [row for row in range(len(rows)) if _ids(rows[row]) not in same], np.int64
        )
    if not len(members):
        raise DataError(
            f"the pool {task.splits.train.name} has no row"
            + (" that is no target" if len(rows) else "")
        )
    return Pool(data, rows, members, targets, len(rows) - len(members))


def _task(config: dict[str, Any], folder: Path) -> Any:
    task = instantiate(config["task"])
    run_folder.use_template(folder, task)
    use_day(run_folder.read(str(folder))[1], task)
    return task


def _held_out(folder: Path, config: dict[str, Any], base: Any) -> Rows:
    """Return the rows that the run holds out."""
    held_out = load_data(config, base, _task(config, folder), train=False).held_out
    if held_out is None:
        raise DataError("target=eval: the run holds out no rows. Give a file: target=FILE")
    return held_out.sequences.rows


def _targets(target: str, folder: Path, config: dict[str, Any], base: Any) -> Rows:
    """Return the rows of a file, in the pool's format, that the choice is for."""
    settings = {"path": target, "eval_path": None, "eval_fraction": 0.0, "limit": None}
    own = {key: value for key, value in settings.items() if key in config["task"]}
    config = config | {"task": config["task"] | own}
    try:
        train = load_data(config, base, _task(config, folder)).train
    except DataError as error:
        raise DataError(f"target={target}: {error}") from None
    if train is None or not len(train.rows):
        raise DataError(f"target={target} has no row that can be used: nothing to choose for")
    return train.rows


def _ids(row: Any) -> tuple[int, ...]:
    return tuple(row.ids)


def _count(keep: float, pool: int) -> int:
    count = max(1, round(keep * pool)) if keep < 1 else int(keep)
    if count > pool:
        raise DataError(f"keep={keep:g}: the pool has {pool} rows")
    return count


def _refuse_cold(run: Trained, plan: Plan) -> None:
    """Refuse a run whose gradients say nothing."""
    trained = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
    if plan.by not in GRADIENTS:
        return
    factors = [p for name, p in trained if name.endswith(UPDATES)]
    if not trained or (factors and not any(bool(p.any()) for p in factors)):
        raise AdapterError(
            f"{plan.run} has {'no trained part' if not trained else 'B = 0'}: gradients of an"
            f" adapter say something after some {WARM} steps. Train it first, as graft"
            f" adapter=lora max_steps={WARM} name=warm"
        )
    if run.step < WARM:
        log.warning(
            "%s has %d steps: after some %d, gradients of an adapter say more",
            plan.run,
            run.step,
            WARM,
        )


def _chosen(plan: Plan, run: Trained, pool: Pool, count: int, work: Path) -> Choice:
    loss = RowLoss(run, replace(pool.data.collate, packed=False, weighted=False))
    identity = {
        "checkpoint": (run.adapted or {}).get("sha256"),
        "pool": pool.data.identity["train"],
        "removed": pool.removed,
        "seed": plan.seed,
    }
    if plan.by == "perplexity":
        store = Store(work / "loss", len(pool.members), 1, identity)
        store.fill("losses of the pool", lambda place: loss.value(pool.row(place)))
        values = np.concatenate([block[:, 0] for _, block in store.blocks()])
        return choose.by_loss(values, count)
    dims = plan.dims or dimensions(len(pool.members))
    sketch = Sketch(sum(p.numel() for p in loss.parameters), dims, plan.seed, loss.device)
    store = Store(work / "pool", len(pool.members), dims, identity)
    store.fill("gradients of the pool", lambda place: sketch(loss.gradient(pool.row(place))))
    if plan.by == "leverage":
        return choose.by_leverage(_whitened(store).leverage(store), count, plan.seed)
    targets = pool.targets
    assert targets is not None
    aims = Store(work / "targets", len(targets), dims, identity | {"target": targets.digest})
    aims.fill("gradients of the targets", lambda row: sketch(loss.gradient(targets[row])))
    whitening = _whitened(store, aims)
    directions = np.concatenate([block for _, block in whitening.directions(aims)])
    way = choose.transport if plan.by == "transport" else choose.round_robin
    return way(lambda: whitening.directions(store), directions, count, len(pool.members))


def dimensions(rows: int) -> int:
    """Return the default size of a sketch: a power of two, some eight rows for each dimension."""
    size = 64
    while size < 1024 and 16 * size <= rows:
        size *= 2
    return size


def once(choice: Choice, examples: np.ndarray) -> Choice:
    """Return a choice without the places whose example was chosen before: some templates give one
    text for each answer of a conversation, and the file has the conversation once."""
    _, first = np.unique(examples[choice.rows], return_index=True)
    places = np.sort(first)
    targets = None if choice.targets is None else choice.targets[places]
    return Choice(choice.rows[places], choice.scores[places], targets)


def _whitened(*stores: Store) -> Whitening:
    try:
        return Whitening(*stores)
    except ValueError as error:
        raise DataError(f"{error}: there is nothing to choose by") from None


def _write(plan: Plan, pool: Pool, choice: Choice, record: Path, content: dict[str, Any]) -> None:
    chosen = pool.members[choice.rows]
    examples = pool.rows.examples()
    needed = {examples[row]: None for row in chosen.tolist()}
    texts: dict[int, str] = {}
    for number, (_, row) in enumerate(pool.data.task.splits.rows("train")):
        if number in needed and not isinstance(row, Bad):
            texts[number] = json.dumps(row, ensure_ascii=False, default=str)
    with atomic.file(plan.to) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in chosen.tolist():
            stream.write(texts[examples[row]] + "\n")
    entries = [
        {
            "where": pool.rows.where(row),
            "score": float(score),
            **({} if choice.targets is None else {"target": int(choice.targets[place])}),
        }
        for place, (row, score) in enumerate(zip(chosen.tolist(), choice.scores, strict=True))
    ]
    settings = asdict(plan) | {"to": str(plan.to), "settings": list(plan.settings)}
    about = {
        "format": 1,
        **settings,
        "run_id": content["id"],
        "base": content["identity"]["base"],
        "pool": {"rows": len(pool.members), **pool.data.identity["train"]},
        "targets": None
        if pool.targets is None
        else {"rows": len(pool.targets), "sha256": pool.targets.digest},
        "removed_as_targets": pool.removed,
        "rows": entries,
    }
    atomic.write_text(record, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
