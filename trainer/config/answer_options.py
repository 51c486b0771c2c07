"""Options of answers that a model writes to prompts (graft respond), and the config they need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config import paths
from trainer.config.decoding_options import SamplingOptions
from trainer.config.options import option, rest
from trainer.config.quoting import in_quotes

# settings of conf/task/sft that have a meaning for the prompts of a file
FILE_SETTINGS = ("system", "columns", "format", "chat_template")


@dataclass(frozen=True)
class TargetOptions:
    """The model that answers."""

    base: str | None = option("the target: a base of conf/base", None, value="NAME")
    run: str | None = option(
        "or a run", None, value="FOLDER[@last|best|STEP]", reads=paths.saved_fault
    )

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        if (self.base is None) == (self.run is None):
            yield "give the target: either base=NAME, of conf/base, or run=FOLDER"


@dataclass(frozen=True)
class PromptOptions:
    """The conversations that are answered."""

    prompts: str | None = option("a file of prompts", None, value="FILE")
    task: str | None = option("or a task of conf/task", None, value="NAME")
    split: Literal["train", "eval"] = option("split of the task", "train")
    field: str | None = option("the column of the file that holds the prompt", None, value="NAME")
    answers: Literal["last", "all"] = option("which answers to write again", "last")
    skip: int = option("rows of the file to skip", 0, at_least=0)
    rows: int | None = option("rows of the file to answer", None, value="N", at_least=1)

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        if (self.prompts is None) == (self.task is None):
            yield "give what is answered: either prompts=FILE or task=NAME, of conf/task"
        if self.prompts is not None:
            yield from paths.rows_problems(self.prompts, "prompts")
        elif self.field is not None:
            yield "field= names a column of prompts=FILE"


@dataclass(frozen=True)
class DrawingOptions(SamplingOptions):
    """The way an answer is drawn, and its use."""

    max_new_tokens: int = option("most tokens of an answer", 512, at_least=1)
    top_k: int = option("draw from the k likeliest tokens; 0 takes all", 0, at_least=0)
    cut: Literal["keep", "drop"] = option("answers that meet max_new_tokens", "keep")
    per: Literal["conversation", "answer"] = option("what a row holds", "conversation")

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            yield "top_p and top_k do nothing with temperature=0, which is greedy"


@dataclass(frozen=True)
class AnswerOptions(DrawingOptions, PromptOptions, TargetOptions):
    """The options of graft respond."""

    out: Path = option("the folder to write", value="FOLDER", writes="folder")
    batch_size: int = option("conversations at once", 16, at_least=1)
    template: tuple[str, ...] = rest(
        "options of the chat template",
        "template.OPTION=VALUE",
        lambda key: key.startswith("template."),
    )
    settings: tuple[str, ...] = rest(
        "settings of the base and the task",
        "base.KEY=VALUE task.KEY=VALUE precision=...",
        lambda key: key.startswith(("task.", "base.")) or key == "precision",
    )

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        yield from TargetOptions.faults(self)
        yield from PromptOptions.faults(self)
        for word in self.settings:
            key = word.partition("=")[0]
            if self.run is not None and not key.startswith("task."):
                yield f"{word}: a run brings its base and precision along"
            if (
                self.prompts is not None
                and key.startswith("task.")
                and key[5:] not in FILE_SETTINGS
            ):
                yield f"{key} does nothing to prompts={self.prompts}"
        yield from DrawingOptions.faults(self)

    @property
    def template_variables(self) -> dict[str, Any]:
        """The options of the chat template, by name."""
        import yaml

        words = [word.partition("=") for word in self.template]
        return {key.removeprefix("template."): yaml.safe_load(value) for key, _, value in words}

    @property
    def names_template(self) -> bool:
        """Return whether the chat template is that of the task, and not that of the run."""
        return any(word.startswith("task.chat_template=") for word in self.settings)


def composed(options: AnswerOptions) -> dict[str, Any]:
    """Return the settings of base, task and precision.

    Raises:
        ConfigError, or an error of Hydra: an unknown base or task, or a path that does not exist.
    """
    from omegaconf import OmegaConf

    from trainer.config import compose

    words = [f"base={options.base}"] if options.base is not None else []
    words += [f"task={options.task or 'sft'}", *options.settings]
    if options.prompts is not None:
        words += [f"task.path={in_quotes(options.prompts)}", "task.eval_fraction=0"]
    config: Any = OmegaConf.to_container(compose.compose(words), resolve=True)
    paths.check(config)
    return config
