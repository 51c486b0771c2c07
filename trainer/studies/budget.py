"""Ranks and densities that give each method the same number of trained parameters.

Parameters are counted on the meta device, as preflight does: no weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from omegaconf import OmegaConf

from adapters.delta import AdapterError, NeedsWeights, Start
from adapters.full import Full, Nothing
from trainer.assembly.build import instantiate, new_modules, new_tokens
from trainer.config import compose, paths
from trainer.config.errors import ConfigError, explain
from trainer.session.inspect import refuse_monitor, wrong_mode
from trainer.studies.plan import Data, Study

TOLERANCE = 0.05  # of the budget, that a whole rank may miss it by
RANKS = ("adapter.rank", "adapter.r")
DENSITY = "adapter.density"


def solve(study: Study) -> Study:
    """Check every method with every data set, and return the study with ranks and densities for its
    budget.

    Raises:
        ConfigError: lists every fault.
    """
    faults: list[str] = []
    solved: dict[str, list[str]] = {}
    counts: dict[str, int | None] = {}
    first = next(iter(study.data.values()))
    for data_name, data in study.data.items():
        if fault := _data_fault(study, data):
            faults.append(f"data.{data_name}: {fault}")
    for name in study.methods if not faults else ():
        try:
            solved[name], counts[name] = _method(study, name, first)
            for data in study.data.values():
                _refuse_unmeasured(_composed(study, name, data, solved[name]))
        except NeedsWeights:
            faults.append(
                f"methods.{name}: its parameters are known only with the base's weights: set"
                f" methods.{name}.solve=false, and its size among its overrides"
            )
        except (AdapterError, ConfigError, ValueError, OSError) as error:
            faults.append(f"methods.{name}: {explain(error)}")
    if faults:
        raise ConfigError("\n".join(faults))
    return replace(study, solved=solved, counts=counts)


def words_of(study: Study, method: str, data: Data) -> list[str]:
    """Return the overrides of a method on a data set, without rate, seed and name."""
    own = study.methods[method].overrides
    words = [*DEFAULTS, *study.overrides, *data.overrides, *own, *study.solved.get(method, [])]
    return last_of_each(words)


def last_of_each(words: list[str]) -> list[str]:
    """Return the last word for each key: Hydra refuses a group that is chosen twice."""
    keys = [word.lstrip("+").partition("=")[0] for word in words]
    last = {key: at for at, key in enumerate(keys)}
    return [words[at] for at in sorted(last.values())]


# A study evaluates and reports by itself; any of these may be set again in its file.
DEFAULTS = [
    "logger=none",
    "report=false",
    "check_export=false",
    "callbacks.evaluation.every=null",
    "callbacks.evaluation.samples=0",
    "callbacks.evaluation.harness=[]",
    "callbacks.checkpoints.every=null",
    "callbacks.checkpoints.keep=1",
]


def _composed(study: Study, method: str, data: Data, solved: list[str]) -> dict[str, Any]:
    """Compose and check the config of a run."""
    words = last_of_each([*words_of(study, method, data), *solved, "name=x"])
    plain: Any = OmegaConf.to_container(compose.compose(words), resolve=True)
    paths.check(plain)
    return plain  # type: ignore[no-any-return]


def _data_fault(study: Study, data: Data) -> str | None:
    """Say what is wrong with a data set, if anything is."""
    try:
        config = _composed(study, next(iter(study.methods)), data, [])
    except Exception as error:  # a ConfigError, or Hydra's own
        return explain(error)
    task = config["task"]
    try:
        paths.check(_composed(study, next(iter(study.methods)), data, data.test))
    except Exception as error:
        return f"test: {explain(error)}"
    if not task.get("eval_path") and not task.get("eval_fraction", 1):
        return (
            "there are no validation rows to choose by: set task.eval_path, or task.eval_fraction"
            " above 0"
        )
    try:
        _refuse_unmeasured(config)
    except ConfigError as error:
        return explain(error)
    return _choice_fault(study, data)


def _refuse_unmeasured(config: dict[str, Any]) -> None:
    if not config["callbacks"].get("evaluation"):
        raise ConfigError("callbacks.evaluation is null, so nothing chooses the rate: leave it out")


def _choice_fault(study: Study, data: Data) -> str | None:
    """Say why no rate can be chosen by the study's metric: the rules are those of a run's best
    checkpoint."""
    key = "callbacks.evaluation"
    words = [f"{key}.monitor={study.choose}", f"{key}.mode={study.mode}"]
    try:
        config = _composed(study, next(iter(study.methods)), data, words)
        task = instantiate(config["task"])
        refuse_monitor(config, task)
        if fault := wrong_mode(study.choose, study.mode, task):
            return f"choose={fault}"
    except (ConfigError, ValueError) as error:
        return explain(error).replace(f"{key}.monitor", "choose").replace(f"{key}.mode", "mode")
    return None


def _method(study: Study, name: str, data: Data) -> tuple[list[str], int | None]:
    """Return the overrides that give a method its budget, and its trained parameters."""
    config = _composed(study, name, data, [])
    if isinstance(instantiate(config["adapter"]), Nothing) and not config["drafter"]:
        raise ConfigError("adapter=none trains nothing")
    base = instantiate(config["base"])
    task = instantiate(config["task"])
    labels = task.labels if task.kind == "label" else None

    def count(words: list[str]) -> int:
        # Composing takes longer than all the rest; the schema sees the solved words at the end.
        values = (word.removeprefix("adapter.").partition("=") for word in words)
        changed = {key: _number(value) for key, _, value in values}
        adapter = instantiate(config["adapter"] | changed)
        skeleton = base.skeleton(labels)
        if config["adapter"].get("peft_type") == "SHIRA":
            # PEFT looks for the mask's entries, which needs memory, though not what is in it.
            skeleton = skeleton.to(torch.bfloat16).to_empty(device="cpu")
        start = Start(new_modules(skeleton, labels), 1 << 30, new_tokens=new_tokens(skeleton))
        model = adapter.attach(skeleton, start)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    budget, settings = study.parameters, study.methods[name]
    if budget is None or not settings.solve:
        if settings.share is not None:
            raise ConfigError(
                f"share={settings.share:g} is for methods whose size is solved for parameters:"
                " leave it out"
            )
        try:
            return [], count([])
        except NeedsWeights:
            return [], None
    if isinstance(instantiate(config["adapter"]), Full):
        raise ConfigError(
            f"adapter=full trains all weights, not parameters={budget:,}: set"
            f" methods.{name}.solve=false"
        )
    words, total = _solve(config["adapter"], count, budget, settings.share, name)
    own = {word.partition("=")[0]: word for word in settings.overrides}
    if both := own.keys() & {word.partition("=")[0] for word in words}:
        raise ConfigError(
            f"{', '.join(own[key] for key in sorted(both))} is solved for parameters={budget:,}:"
            f" leave it out, or set methods.{name}.solve=false"
        )
    return words, total


def _solve(
    adapter: dict[str, Any],
    count: Callable[[list[str]], int],
    budget: int,
    share: float | None,
    name: str,
) -> tuple[list[str], int]:
    """Return the overrides of rank and density, and the count."""
    schedule = adapter.get("schedule")
    rank = next((key for key in RANKS if adapter.get(key.partition(".")[2]) is not None), None)
    dense = DENSITY if "density" in adapter and schedule != "lora_only" else None
    if schedule == "spa_only":
        rank = None
    if rank is None and dense is None:
        raise ConfigError(
            f"it has neither rank nor density to solve for parameters={budget:,}: set"
            f" methods.{name}.solve=false"
        )
    if share is not None and (rank is None or dense is None):
        raise ConfigError(
            f"share={share:g} divides parameters between a low rank and a sparse"
            f" part, and it has only {rank or dense}: leave share out"
        )
    words: list[str] = []
    if rank is not None:
        low = budget if dense is None else round((0.5 if share is None else share) * budget)
        # of rank alone: the smallest density is as good as none
        tiny = [f"{DENSITY}=1e-9"] if dense is not None else []
        only = [f"{key}={value}" for key, value in (("adapter.schedule", "lora_only"),) if tiny]
        words = [f"{rank}={_rank(lambda r: count([*only, f'{rank}={r}']), low, rank)}"]
    if dense is not None:
        words.append(f"{dense}={_density(lambda d: count([*words, f'{dense}={d!r}']), budget)!r}")
    total = count(words)
    if abs(total - budget) > TOLERANCE * budget:
        raise ConfigError(
            f"parameters={budget:,} cannot be met: {' '.join(words)} gives {total:,}, and no other"
            " value comes nearer. Choose another number, or fewer layers with"
            " adapter.target_modules"
        )
    return words, total


def _rank(count: Callable[[int], int], budget: int, key: str) -> int:
    """Return the rank whose count is nearest to the budget. Counts grow with the rank."""
    if (smallest := count(1)) > budget * (1 + TOLERANCE):
        raise ConfigError(
            f"{key}=1 has {smallest:,} trained parameters already, more than {budget:,}: choose a"
            " larger number, or fewer layers with adapter.target_modules"
        )
    step = count(2) - smallest
    if step <= 0:
        raise ConfigError(f"{key} does not change the number of trained parameters")
    # Each rank adds as many, except where a method has others on top of some of them.
    guess = 1 + max(0, round((budget - smallest) / step))
    distances = {}
    for rank in range(max(1, guess - 1), guess + 2):
        try:
            distances[rank] = abs(count(rank) - budget)
        except AdapterError:  # too high for the smallest layer
            if not distances:
                raise
    return min(distances, key=distances.__getitem__)


def _number(value: str) -> Any:
    try:
        return int(value)
    except ValueError:
        return float(value) if value[:1].isdigit() else value


def _density(count: Callable[[float], int], budget: int) -> float:
    """Return the density whose count is nearest to the budget."""
    low, high = 0.0, 1.0
    if (most := count(1.0)) < budget:
        raise ConfigError(
            f"adapter.density=1 has {most:,} trained parameters, fewer than {budget:,}: choose a"
            " smaller number"
        )
    density = 0.01
    for _ in range(30):
        try:
            parameters = count(density)
        except AdapterError as error:  # less than one entry of some layer
            if low or density < 1e-7:
                raise
            low, fault = density, error
            density = (low + high) / 2
            if high - low < 1e-7:
                raise fault from None
            continue
        if abs(parameters - budget) <= max(64, budget // 2000):
            break
        low, high = (density, high) if parameters < budget else (low, density)
        guess = density * budget / max(1, parameters)
        density = guess if low < guess < high else (low + high) / 2
    return float(f"{density:.6g}")
