"""The models that are served, by name: the base, and runs that trained on it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks.reading import DataError
from trainer.assembly.build import instantiate
from trainer.assembly.chosen_drafter import check_drafter, drafter_of
from trainer.assembly.trained import Trained, load_trained
from trainer.config.decoding_options import DrafterOptions
from trainer.data.render import Renderer
from trainer.data.stops import Stops
from trainer.decoding import speculative
from trainer.decoding.merged import merge_for_good
from trainer.decoding.speculative import Strategy
from trainer.drafters import Drafter, DrafterError, Target
from trainer.drafters.recycling import TokenRecycling
from trainer.models.base import Base
from trainer.models.cache_argument import rolls_back
from trainer.serving.shared_base import KEEP_THE_BASE, SharedBase
from trainer.serving.text import TokenTexts
from trainer.storage import run_folder

BASE = "base"  # the name under which the base alone is served
WARM_UP_TOKENS = 4


@dataclass
class Served:
    """One model: the base, or a run."""

    name: str
    of: str  # the base's name, without the folders above it
    kind: str  # chat, or text for a run of plain text
    step: int | None  # of the run's checkpoint; None for the base
    target: Target
    drafter: Callable[[bool], Drafter | None]  # takes whether a seed has to repeat the text
    drafts: bool
    strategy: Strategy
    renderer: Renderer
    tokenizer: Any
    texts: TokenTexts
    stops: Stops
    longest: int  # tokens of prompt and answer together

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.target.model.parameters()).device


def paths_of(run: str | None, runs: str | None) -> list[str]:
    """Return the runs that a command names: `run`, or those of `[A,B]`."""
    if run is not None:
        return [run]
    inner = (runs or "").strip().removeprefix("[").removesuffix("]")
    return [path.strip() for path in inner.split(",") if path.strip()]


def names_of(paths: list[str]) -> list[str]:
    """Return a name for each run: its folder's, with the checkpoint that was chosen. Runs of the
    same name are called by their whole paths."""
    short = [Path(path).name for path in paths]
    counts = Counter([BASE, *short])
    return [name if counts[name] == 1 else path for name, path in zip(short, paths, strict=True)]


def check(paths: list[str], options: DrafterOptions | None) -> None:
    """Check runs by their records, before a model is loaded.

    Raises:
        FolderError, DataError, DrafterError: a run cannot be served.
    """
    for path in paths:
        _, content, _ = run_folder.read(path)
        if content["identity"]["labels"] is not None:
            raise DataError(
                f"run={path} trained a classifier, which writes no text. Use: graft evaluate"
            )
        if options is not None and "+" in options.drafter:
            check_drafter(content["config"], path, options)
        if instantiate(content["config"]["base"]).decoder_start is not None:
            raise DrafterError(
                f"run={path} is of an encoder-decoder, which this server's decoder does not take."
                " Use: graft generate"
            )


class Loader:
    """Loads runs of one base. Without options nothing is drafted."""

    def __init__(self, options: DrafterOptions | None, strategy: Strategy):
        self.options, self.strategy = options, strategy
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.shared = SharedBase()
        self.small: list[Drafter | None] = []  # the small model that drafts for all runs

    def start(self, paths: list[str]) -> dict[str, Served]:
        """Load the base and the first runs, by their names.

        Raises:
            as load.
        """
        served = list[Served]()
        for path, name in zip(paths, names_of(paths), strict=True):
            run = self._run(path)
            if not served:
                alone = dataclasses.replace(run, model=self.shared.model, drafter=None)
                served.append(_served(BASE, alone, self._drafter, self.strategy, None))
            served.append(_served(name, run, self._drafter, self.strategy, run.step))
        for model in served:
            _warm_up(model)
        return {model.name: model for model in served}

    def load(self, path: str, name: str) -> Served:
        """Load one run, and decode a few tokens with it.

        Raises:
            as check, load_trained, SharedBase.load and drafter_of; DrafterError if a drafter cannot
            draft.
        """
        check([path], self.options)
        run = self._run(path)
        model = _served(name, run, self._drafter, self.strategy, run.step)
        _warm_up(model)
        return model

    def _run(self, path: str) -> Trained:
        _, content, _ = run_folder.read(path)
        trains_drafter = content["identity"].get("target") is not None
        adapter = content["config"]["adapter"]["_target_"]
        self.shared.copies = trains_drafter or adapter not in KEEP_THE_BASE
        try:
            run = load_trained(path, self.device, load_base=self.shared.load)
        finally:
            self.shared.share()
        # A merged run decodes about twice as fast, and takes the memory of its merged weights.
        merge_for_good(run.model)
        return run

    def _drafter(self, run: Trained) -> Drafter | None:
        if self.options is None or not rolls_back(run.model):
            return None
        if not self.options.drafter.startswith("small"):
            return drafter_of(run, self.options)
        if not self.small:
            self.small.append(drafter_of(run, self.options))
        return self.small[0]


def _served(
    name: str,
    run: Trained,
    make: Callable[[Trained], Drafter | None],
    strategy: Strategy,
    step: int | None,
) -> Served:
    base: Base = run.base
    model: nn.Module = run.model
    shared = make(run)
    # Recycling remembers earlier texts: a seed repeats a text only with a memory of its own.
    parts = () if shared is None else (shared, *vars(shared).values())
    remembers = any(isinstance(part, TokenRecycling) for part in parts)
    return Served(
        name,
        Path(base.path).name,
        "text" if run.task.kind == "text" else "chat",
        step,
        Target(model, drafted=shared is not None),
        lambda repeats: make(run) if repeats and remembers else shared,
        shared is not None,
        strategy,
        run.renderer,
        base.tokenizer,
        TokenTexts(base.tokenizer),
        run.stops,
        base.longest,
    )


def _warm_up(model: Served) -> None:
    """Decode a few tokens: what cannot draft fails here, and not at the first request."""
    ids = torch.tensor([model.stops[0] if model.stops else 0], device=model.device)
    speculative.generate(
        model.target, model.drafter(False), ids, WARM_UP_TOKENS, [], strategy=model.strategy
    )


def described(models: dict[str, Served]) -> Iterator[str]:
    """Yield a line for each model."""
    for model in models.values():
        step = "the base alone" if model.step is None else f"step {model.step}"
        yield f"{model.name}: {step}{', drafted' if model.drafts else ''}"
