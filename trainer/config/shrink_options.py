"""Options of a smaller base (graft shrink), and the config they need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config import paths
from trainer.config.options import option, rest

# the options that each method takes
SEARCHING = ("search", "generations", "offspring")
PRUNING = ("pattern", "density", "part", *SEARCHING, "step")
SETTINGS = {
    "magnitude": PRUNING,
    "wanda": PRUNING,
    "sparsegpt": PRUNING,
    "drop_layers": ("layers", "score", *SEARCHING),
    "narrow": ("ffn", "multiple", "score"),
    "slice": ("width", "multiple"),
}
NEEDED = {"drop_layers": "layers", "narrow": "ffn", "slice": "width"}
MULTIPLES = {"narrow": 128, "slice": 32}
# the first is the default
SCORES = {"drop_layers": ("angular", "cosine"), "narrow": ("activation_weight", "activation")}
TAKEN = ("base", "task", "max_length", "overlong", "batch_size", "tokenise_processes")


@dataclass(frozen=True)
class ShrinkOptions:
    """The options of graft shrink."""

    to: Path = option("the folder to write, which must not exist", value="FOLDER", writes="folder")
    method: Literal["magnitude", "wanda", "sparsegpt", "drop_layers", "narrow", "slice"] = option(
        "how to shrink", value="METHOD"
    )
    pattern: Literal["2:4", "4:8", "unstructured"] | None = option(
        "pruning: the entries that stay, 2:4 by default", None
    )
    density: float | None = option(
        "pruning, pattern=unstructured: share of each row that stays, 0.5 by default",
        None,
        value="0.5",
        above=0,
        below=1,
    )
    part: Literal["all", "mlp", "attention"] | None = option(
        "pruning: which linears of the decoder layers, all by default", None
    )
    layers: int | None = option("drop_layers: how many go", None, value="4", at_least=1)
    ffn: float | None = option(
        "narrow: share of the MLP's neurons that stays", None, value="0.75", above=0, below=1
    )
    width: float | None = option(
        "slice: share of a state's numbers that stays", None, value="0.9", above=0, below=1
    )
    multiple: int | None = option(
        "narrow, slice: what stays is a multiple of this, 128 or 32 by default", None, at_least=1
    )
    search: Literal["evolution"] | None = option(
        "drop_layers: search for the layers that go, from those of least influence on; pruning,"
        " pattern=unstructured: search for the share of each linear",
        None,
    )
    generations: int | None = option(
        "search: layers x (those that stay) / 1.5 by default, 400 for shares", None, at_least=1
    )
    offspring: int | None = option(
        "search: candidates of a generation, 32 by default, 64 for shares", None, at_least=2
    )
    step: float | None = option(
        "pruning, search: how far shares are apart, 0.05 by default", None, value="0.05", above=0
    )
    score: Literal["angular", "cosine", "activation_weight", "activation"] | None = option(
        "what says which parts matter: angular or cosine for layers, activation_weight or"
        " activation for neurons; the first by default",
        None,
    )
    rows: int = option("calibration rows, drawn from the training rows", 128, at_least=1)
    seed: int = option("seed of the draw", 0, at_least=0)
    evaluate: bool = option("measure the held-out loss before and after", True)
    settings: tuple[str, ...] = rest(
        "settings of the base and the rows",
        "base.path=... task.path=... max_length=...",
        lambda key: key.partition(".")[0] in TAKEN or key == "lightning.accelerator",
    )

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        if self.to.exists() or self.to.is_symlink():
            yield f"to={self.to} exists. Remove it, or choose another folder"
        takes = SETTINGS[self.method]
        for key in dict.fromkeys(name for names in SETTINGS.values() for name in names):
            if getattr(self, key) is not None and key not in takes:
                yield (
                    f"{key}={getattr(self, key)} has no effect with method={self.method}, which"
                    f" takes {', '.join(takes)}"
                )
        needed = NEEDED.get(self.method)
        if needed is not None and getattr(self, needed) is None:
            yield f"missing: {needed}= of method={self.method}"
        if self.density is not None and self.pattern != "unstructured" and "density" in takes:
            pattern = self.pattern or "2:4"
            yield f"density={self.density:g} needs pattern=unstructured, not {pattern}"
        if self.search is not None and self.pattern != "unstructured" and "pattern" in takes:
            yield (
                f"search={self.search} needs pattern=unstructured: each linear of the pattern"
                f" {self.pattern or '2:4'} keeps the same share"
            )
        for key in ("generations", "offspring", "step"):
            if getattr(self, key) is not None and self.search is None and key in takes:
                yield f"{key}={getattr(self, key)} has no effect without search=evolution"
        scores = SCORES.get(self.method)
        if scores is not None and self.score is not None and self.score not in scores:
            yield f"score={self.score}: method={self.method} takes {' or '.join(scores)}"

    @property
    def described(self) -> dict[str, Any]:
        """The method's settings, with its defaults."""
        values = {key: getattr(self, key) for key in SETTINGS[self.method]}
        defaults: dict[str, Any] = {"pattern": "2:4", "part": "all"}
        defaults["multiple"] = MULTIPLES.get(self.method)
        if self.search is not None:
            defaults |= {"offspring": 32 if self.method == "drop_layers" else 64, "step": 0.05}
        if self.pattern == "unstructured":
            defaults["density"] = 0.5
        defaults["score"] = SCORES.get(self.method, (None,))[0]
        values = {
            key: defaults.get(key) if value is None else value for key, value in values.items()
        }
        return {key: value for key, value in values.items() if value is not None}


def composed(options: ShrinkOptions) -> dict[str, Any]:
    """Return the settings of base and task.

    Raises:
        ConfigError, or an error of Hydra: an unknown base or task, or a path that does not exist.
    """
    from omegaconf import OmegaConf

    from trainer.config import compose

    words = list(options.settings)
    if not any(word.startswith("base=") for word in words):
        words.insert(0, "base=hf")
    config: Any = OmegaConf.to_container(compose.compose(words), resolve=True)
    paths.check(config)
    return config
