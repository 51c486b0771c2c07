"""The Hub's metadata of every result, and the file README.md that has it.

Most of it follows from the sources of a result: the base with its licence and languages, and the
data sets. All of it is read on this machine; nothing is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError

from trainer.config import files, paths
from trainer.config.secrets import redact
from trainer.config.shown import shown
from trainer.storage import atomic

FILE = "README.md"
MARK = "<!-- written by graft -->"
LARGEST = 1 << 20  # bytes of a base's own card


@dataclass(frozen=True)
class Origin:
    """The sources of a result: the base's name on the Hub, if it has one, and the settings of each
    run, flat."""

    base: str | None
    settings: Sequence[dict[str, Any]]

    @classmethod
    def of(cls, *settings: dict[str, Any]) -> Origin:
        """Return the sources of a result that was made with these settings, of one base."""
        path = settings[0].get("base.path")
        return cls(path if on_hub(path) else None, settings)

    @property
    def datasets(self) -> list[str]:
        """The names of the data sets on the Hub."""
        return sorted({name for path in self._paths() if (name := dataset(path))})

    @property
    def data(self) -> str:
        """The names of the data sets and files of rows."""
        names = [dataset(path) or Path(str(path)).name for path in self._paths()]
        return ", ".join(dict.fromkeys(names))

    def _paths(self) -> list[Any]:
        return [path for settings in self.settings for path in task_paths(settings)]

    def results(self, task: str, values: dict[str, Any], otherwise: str = "") -> list[EvalResult]:
        """Return numbers of the held-out rows; `otherwise` names rows that have no path."""
        return [
            EvalResult(
                task_type=task,
                dataset_type=next(iter(self.datasets), "custom"),
                dataset_name=f"{word(self.data or otherwise)}, held out",
                metric_type=word(name),
                metric_value=round(float(value), 6),
            )
            for name, value in values.items()
            if value is not None
        ]

    def metadata(
        self,
        library: str,
        task: str,
        tags: list[str],
        relation: str | None,
        name: str,
        results: list[EvalResult],
    ) -> ModelCardData:
        """Return the metadata. The Hub reads `results` under the model's `name`."""
        own = self._card_of_base()
        more: dict[str, Any] = {}
        if self.base is not None:
            more = {"base_model": self.base, "base_model_relation": relation}
        if results:
            more |= {"model_name": word(name), "eval_results": results}
        return ModelCardData(
            license=getattr(own, "license", None),
            language=getattr(own, "language", None),
            library_name=library,
            pipeline_tag=task,
            datasets=self.datasets or None,
            tags=["graft", *dict.fromkeys(tag for tag in tags if tag not in ("None", "none"))],
            **{key: value for key, value in more.items() if value is not None},
        )

    def inherited(self) -> Origin:
        """Return the sources of a whole model. A base in a folder is called by the base_model that
        its card names."""
        name = getattr(self._card_of_base(), "base_model", None)
        return replace(self, base=name) if self.base is None and on_hub(name) else self

    def _card_of_base(self) -> Any:
        """The metadata of the base's own card, if it is on this machine; nothing is fetched."""
        path = self.settings[0].get("base.path")
        file: Any = None
        if isinstance(path, str) and Path(path).is_dir():
            file = Path(path) / FILE
        elif self.base is not None:
            revision = self.settings[0].get("base.revision")
            file = huggingface_hub.try_to_load_from_cache(self.base, FILE, revision=revision)
        if not isinstance(file, str | Path) or not Path(file).is_file():
            return None
        try:
            card = ModelCard(files.read_text(Path(file), LARGEST), ignore_metadata_errors=True)
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            return None
        return card.data if _plain_words(card.data) else None


def put(folder: Path, data: ModelCardData, body: str) -> None:
    """Write README.md without secrets and control characters."""
    text = f"---\n{data.to_yaml()}\n---\n\n{MARK}{body}"
    atomic.write_text(folder / FILE, redact(shown(text)))


def ours(file: Path) -> bool:
    """Return whether a card is missing, or was written by Graft."""
    try:
        return MARK in files.read_text(file, LARGEST)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def on_hub(path: Any) -> bool:
    """Return whether a path is written as a name on the Hub, ORG/NAME."""
    if not isinstance(path, str) or path.count("/") != 1 or paths.looks_local(path):
        return False
    try:
        huggingface_hub.utils.validate_repo_id(path)
    except HFValidationError:
        return False
    return not Path(path).exists() and not path.endswith(".gguf")


def task_paths(settings: dict[str, Any]) -> list[Any]:
    """Return the files and data sets of a run's task, and of the parts of a mixture."""
    values = []
    for key, value in settings.items():
        if key.startswith("task.") and key.rpartition(".")[2] == "path":
            values += value if isinstance(value, list) else [value]
    return [value for value in values if value is not None]


def dataset(path: Any) -> str | None:
    """Return a data set's name on the Hub, without its configuration; None for a file."""
    name = str(path).partition(":")[0]
    return name if on_hub(name) and not re.search(r"\.\w{2,7}$", name) else None


def base_text(settings: dict[str, Any], base: str | None, choice: Any) -> str:
    """Return the base as Markdown: a link if it is on the Hub. `choice` names it otherwise."""
    if base is not None:
        return f"[{base}](https://huggingface.co/{base})"
    if settings.get("base.package"):
        return f"{word(settings['base.member'])} of the package {word(settings['base.package'])}"
    code = str(settings.get("base._target_", "")).rpartition(".")[2]  # tiny has no path
    return f"the base {word(Path(str(settings.get('base.path') or choice or code)).name)}"


def word(value: Any) -> str:
    """Return text of a run as Markdown that stays in its line."""
    return re.sub(r"([`<>\[\]*])", r"\\\1", " ".join(str(value).split()))


def _plain_words(data: Any) -> bool:
    """Return whether licence and language are words, as the Hub demands of them."""
    language = getattr(data, "language", None) or []
    words = [
        getattr(data, "license", None) or "x",
        *([language] if isinstance(language, str) else language),
    ]
    return all(isinstance(each, str) and re.fullmatch(r"[\w.-]{1,40}", each) for each in words)
