"""The tokenised rows of a task, and their order."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tasks.reading import DataError
from tasks.task import Text
from trainer.config.errors import ConfigError
from trainer.data import ends
from trainer.data.batches import BatchOrder, Collate, Sequences
from trainer.data.cache_key import source_key
from trainer.data.encoding import plain_ids
from trainer.data.held_out import HeldOut
from trainer.data.identity import of_rows, of_stream
from trainer.data.packing import pack
from trainer.data.render import Renderer
from trainer.data.rows import Rows, tokenise
from trainer.data.stops import Stops
from trainer.data.subset import Subset
from trainer.models.base import Base
from trainer.storage.progress import Progress

log = logging.getLogger(__name__)

DEFAULT_LENGTH = 1024  # tokens of the longest row where the base allows them


@dataclass
class Data:
    """The tokenised rows of a task."""

    task: Any
    renderer: Renderer
    train: Sequences | None  # None where it streams
    held_out: HeldOut | None
    collate: Collate
    identity: dict[str, dict[str, Any]]  # of each split's rows; see trainer.data.identity

    # of the run that this one resumes or branches off
    earlier_ends: list[int] = field(default_factory=list)

    @functools.cached_property
    def ends(self) -> list[int]:
        """The tokens that trained answers end in, the most frequent one first. Of a stream the
        first rows are read."""
        measured = None if self.train is None else ends.of_rows(self.train.rows, self.renderer)
        if measured is None:
            measured = ends.of_examples(self.task.examples("train"), self.renderer)
        return list(dict.fromkeys([*measured, *self.earlier_ends]))

    def rows_of(self, sequences: list[Any]) -> list[str]:
        """Return the file and line of each row of some sequences."""
        if self.train is None:
            return sequences  # a stream names its sequences like this already
        return [
            self.train.rows.where(row)
            for sequence in sequences
            for row in self.train.members(sequence)
        ]


def resolve_length(config: dict[str, Any], base: Base) -> None:
    """Set `max_length` to what the base allows, at most DEFAULT_LENGTH, if the config has none. It
    is set in place, so that run.yaml records a number."""
    if config["max_length"] is None:
        config["max_length"] = min(DEFAULT_LENGTH, base.longest)


def _refuse_packed_pairs(config: dict[str, Any], base: Base) -> None:
    if base.decoder_start is not None and config["packing"]:
        raise ConfigError(
            f"packing=true puts several rows into one sequence, and {base.path} is an"
            " encoder-decoder, whose decoder would see the prompts of all of them: set"
            " packing=false"
        )


def load_data(config: dict[str, Any], base: Base, task: Any, train: bool = True) -> Data:
    """Load the tokenised rows from the cache, or tokenise them. Without `train` only the held-out
    rows are loaded.

    Raises:
        DataError: see trainer.data.rows.tokenise.
    """
    resolve_length(config, base)
    _refuse_packed_pairs(config, base)
    renderer = Renderer(base.tokenizer, task, base.decoder_start)
    start = base.decoder_start if task.kind != "label" else None
    settings = {key: config[key] for key in ("max_length", "overlong")}
    settings["processes"] = config["tokenise_processes"]
    labelled = task.kind == "label"
    weighted = getattr(task, "weight_column", None) is not None
    collate = Collate(
        base.tokenizer.pad_token_id, config["packing"], labelled, start, weighted=weighted
    )
    training, identity = None, {}
    if train and task.streaming:
        key = source_key(task, "train", renderer, config["max_length"], config["overlong"])
        identity["train"] = of_stream(key)
    elif train:
        with Progress("tokenising the training rows", _count(task, "train"), "rows"):
            rows = tokenise(task, "train", renderer, **settings)
        log.info("train: %s", rows.report.summary())
        identity["train"] = of_rows(rows)
        packs = None
        if config["packing"]:
            packs = pack(rows.lengths, config["max_length"], config["seed"])
        training = Sequences(rows, packs)
    with Progress("tokenising the held-out rows", _count(task, "eval"), "rows"):
        rows = tokenise(task, "eval", renderer, **settings)
    identity["eval"] = of_rows(rows)
    if len(rows):
        log.info("eval: %s", rows.report.summary())
    # Evaluation is never packed and has no weights: its numbers should not depend on how rows share
    # sequences, and should be comparable under other weights.
    evaluation = Collate(base.tokenizer.pad_token_id, False, labelled, start)
    held_out = (
        HeldOut(
            Sequences(rows), evaluation, task.labels if labelled else None, tokenizer=base.tokenizer
        )
        if len(rows)
        else None
    )
    for name in getattr(task, "eval_sets", ()):
        if held_out is None:
            break
        split = f"eval/{name}"
        with Progress(f"tokenising the rows of {split}", unit="rows"):
            rows = tokenise(task, split, renderer, **settings)
        if not len(rows):
            raise DataError(f"task.eval_sets.{name} has no row: give other rows, or leave it out")
        identity[split] = of_rows(rows)
        log.info("%s: %s", split, rows.report.summary())
        held_out.more[name] = replace(held_out, sequences=Sequences(rows), prompts=[], more={})
    return Data(task, renderer, training, held_out, collate, identity)


def _count(task: Any, split: str) -> int | None:
    """Return the number of rows of a split, None if it is not known yet."""
    splits = getattr(task, "splits", None)
    return splits.count(split) if splits is not None else None


def load_held_out(config: dict[str, Any], base: Base, task: Any) -> Data:
    """Load the task's held-out rows as tokens.

    Raises:
        DataError: there are none.
    """
    data = load_data(config, base, task, train=False)
    if data.held_out is None:
        raise DataError(
            "this run's task has no held-out rows: it has task.eval_fraction=0 and no"
            " task.eval_path. Measure other rows with graft evaluate task.eval_path=FILE"
        )
    return data


def add_prompts(data: Data, count: int, stops: Stops) -> None:
    """Render the prompts of the first `count` conversations, or texts that are continued, of each
    set of evaluation. Answers to them end in the `stops` of trainer.data.ends.stop_set."""
    held_out = data.held_out
    continued = getattr(data.task, "prompt_tokens", None) is not None
    if held_out is None or not (data.task.kind == "conversation" or continued) or not count:
        return
    _add_prompts(data, "eval", held_out, count, stops)
    for name, further in held_out.more.items():
        _add_prompts(data, f"eval/{name}", further, count, stops)


def _add_prompts(data: Data, split: str, held_out: HeldOut, count: int, stops: Stops) -> None:
    rows: Rows = held_out.sequences.rows
    kept_rows = set(rows.examples())
    for index, example in enumerate(data.task.examples(split)):
        if len(held_out.prompts) >= count:
            break
        if index in kept_rows and (prompt := _prompt(data, example)):
            held_out.prompts.append((example, prompt))
    held_out.grade = data.task.grade
    held_out.stops = stops


def _prompt(data: Data, example: Any) -> list[int] | None:
    """Return the ids that the model continues; None of a text that ends in them."""
    if not isinstance(example, Text):
        return data.renderer.prompt(example)
    ids = plain_ids(data.renderer.tokenizer, example.text)
    count = data.task.prompt_tokens
    return ids[:count] if len(ids) > count else None


def batch_order(config: dict[str, Any], data: Data, ranks: int) -> BatchOrder:
    """Make the run's order of sequences."""
    assert data.train is not None
    lengths, trained_tokens = data.train.sizes()
    if data.task.kind == "label":  # each row has one label, whatever its length
        weights = data.train.rows.weights
        trained_tokens = np.ones_like(trained_tokens) if weights is None else weights
    return BatchOrder(
        lengths,
        trained_tokens,
        config["seed"],
        config["batch_size"],
        config["accumulate"],
        ranks,
        config["group_by_length"],
        config["max_epochs"],
        _subset(config, data, len(lengths)),
    )


def _subset(config: dict[str, Any], data: Data, count: int) -> Subset | None:
    """Return the share of the rows that an epoch sees, None if it sees all.

    Raises:
        ConfigError: there are no classes by which to draw.
    """
    share, strata = config["repeat_random"], None
    if share is None:
        return None
    if config["repeat_random_stratified"]:
        problem = getattr(data.task, "problem", "single_label_classification")
        if data.task.kind != "label" or problem != "single_label_classification":
            raise ConfigError(
                "repeat_random_stratified=true draws equally from classes, and this task's rows"
                " have none: set repeat_random_stratified=false"
            )
        assert data.train is not None
        strata = np.array([data.train.rows[row].label for row in range(count)])
    return Subset(count, share, config["seed"], config["repeat_random_draw"], strata)


def token_counts(data: Data, vocabulary: int) -> torch.Tensor:
    """Count how often each token is trained in the training rows, (V,) int64.

    Raises:
        ConfigError: the rows are not known before training.
    """
    if data.train is None:
        raise ConfigError(
            "this drafter counts the training data's tokens beforehand, which task.streaming=true"
            " does not allow"
        )
    return torch.from_numpy(data.train.rows.counts(vocabulary))
