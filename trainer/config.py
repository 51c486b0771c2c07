"""From a command line to a config that is known to be right, before torch is imported.

`install` hooks the checks into Hydra's composition, so that they see exactly what Hydra will use, its own node included,
before Hydra instantiates a callback or configures a logger from it.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, grammar_parser
from omegaconf.errors import OmegaConfBaseException

from trainer import schema

EXIT_BAD_INPUT = 2  # config or data; see README, exit codes


class ConfigError(ValueError):
    """The config cannot be run. The message lists every fault: what, where, how to mend it."""


def rewrite(argv: list[str]) -> list[str]:
    """Arguments as Hydra takes them: `experiment=x` works like `+experiment=x`, and an unknown key reaches our own check,
    which suggests the right one, instead of Hydra's."""
    result = []
    for argument in argv:
        key = argument.partition("=")[0]
        if "=" in argument and re.match(r"[A-Za-z_]", argument) and not key.startswith("hydra"):
            if key == "experiment":
                argument = "+" + argument
            elif "@" not in key and not (schema.CONF / key).is_dir():
                argument = "++" + argument
        result.append(argument)
    return result


def install(incomplete: bool = False) -> None:
    """Make every composition of this process pass through `check`.

    Raises:
        ConfigError: from within Hydra's composition.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    register_resolvers()
    compose = ConfigLoaderImpl.load_configuration
    if getattr(compose, "checked", False):
        return

    @functools.wraps(compose)
    def checked(self: Any, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any) -> DictConfig:
        for override in overrides:
            # A package on the search path is imported, before there is a config to check.
            if re.match(r"\W*hydra\.searchpath\b.*(pkg:|\$)", override, re.DOTALL):
                raise ConfigError(f"{override}: only folders can be searched for configs")
            group, _, value = override.partition("=")
            if value == "null" and (schema.CONF / group).is_dir():
                raise ConfigError(f"{override}: choose one of {', '.join(schema.options(group))}")
        config = compose(self, config_name, overrides, *args, **kwargs)
        noted = OmegaConf.to_container(config.hydra.overrides, resolve=False)
        if sorted(noted["hydra"] + noted["task"]) != sorted(overrides):  # type: ignore[index, call-overload]
            raise ConfigError("hydra.overrides is what the command line says, and is not taken from a config")
        check(config, incomplete=incomplete)
        return config

    checked.checked = True  # type: ignore[attr-defined]
    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]


def register_resolvers() -> None:
    """`${run_folder:RUNS,NAME,RESUME}` is where a run lives; see `run_folder`."""
    OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)


def run_folder(runs: str, name: str, resume: str) -> str:
    """RUNS/NAME, the first of NAME, NAME-2, NAME-3 ... that holds no run yet; with resume=auto the newest of them that
    does; with resume=FOLDER that folder."""
    if resume not in ("never", "auto"):
        if not any((Path(resume) / file).exists() for file in ("run.yaml", "multirun.yaml")):
            raise ConfigError(f"resume={resume}: that folder holds no run. Give one that does, or auto, or never")
        return resume
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(
            f"name is {name!r}. A run's name has at most 100 letters, digits, '.', '_' and '-', and starts with none of those three"
        )
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank != "0":  # started by torchrun or srun: the first process says where the run lives, see trainer.run
        return str(Path(tempfile.gettempdir()) / f"graft-{os.getpid()}-rank-{rank}")
    candidate, newest, number = Path(runs) / name, None, 2
    while (candidate / "run.yaml").exists() or (candidate / "multirun.yaml").exists():
        newest, candidate, number = candidate, Path(runs) / f"{name}-{number}", number + 1
    return str(newest if resume == "auto" and newest else candidate)


def check(config: DictConfig, choices: dict[str, Any] | None = None, incomplete: bool = False) -> None:
    """Refuse a composed config that cannot be run. Which file each group took stands in Hydra's node, or in `choices`.
    `incomplete` is for a config that is only shown: values may be missing.

    Raises:
        ConfigError: lists every fault found.
    """
    faults = [*_foreign_targets(config), *_looks_secret(config), *_remote_code(config)]
    composed = choices is None  # a run folder's config is only read: it asks for no package of its training
    if not faults and choices is None:
        if config.hydra.job.config_name is None:  # Hydra's own, for --hydra-help
            return
        choices = OmegaConf.to_container(config.hydra.runtime.choices)  # type: ignore[assignment]
    if not faults:
        plain = _plain(config)
        faults = schema.problems(plain, root_schema(choices or {}), "", incomplete)
        if not faults:
            faults = list(combinations(plain))
        if not faults and composed and schedule_free(plain) and importlib.util.find_spec("schedulefree") is None:
            faults = ["optimizer=schedulefree needs a package that is not installed: pip install schedulefree"]
    if faults:
        # An override stands in Hydra's node once more.
        raise ConfigError("\n".join([fault for fault in faults if not fault.startswith("hydra.overrides.")] or faults))


def root_schema(choices: dict[str, Any]) -> schema.Table:
    """The schema of the whole config, given which file each group took.

    Raises:
        ConfigError: a group took a file that is not in conf/.
    """
    root = schema.load("config")
    children = dict(root.children)
    for group in sorted(path.name for path in schema.CONF.iterdir() if any(path.glob("*.yaml"))):
        if group == "experiment":
            continue
        known, chosen = schema.options(group), choices.get(group)
        if chosen is not None and chosen not in known:
            raise ConfigError(f"{group}={chosen}: conf/{group} has {', '.join(known)}. To add one, put its file there")
        # Hydra does not say which files a list such as logger=[wandb,tensorboard] took.
        tables = [schema.load(f"{group}/{name}") for name in ([chosen] if chosen is not None else known)]
        if len({table.target for table in tables}) > 1:
            raise ConfigError(f"{group}: choose one of {', '.join(known)}")
        merged: dict[str, Any] = {}
        for table in tables:
            merged |= table.children
        children[group] = replace(tables[-1], children=merged)
    return schema.Table(children, None, root.file)


def _plain(config: DictConfig) -> dict[str, Any]:
    """The config without Hydra's node as plain containers; `???` stays."""
    bare = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        return OmegaConf.to_container(bare, resolve=True)  # type: ignore[return-value]
    except Exception as error:
        raise ConfigError(f"an interpolation of the config cannot be resolved: {error}") from None


def _strings(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All leaves with their paths; interpolations stay unresolved, since their text is what matters here."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _strings(value, (*path, str(key)))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _strings(value, (*path, str(index)))
    else:
        yield path, node


# What Hydra itself may make: its sweeper and launchers. What logging.config may make: the handlers that our files name.
_HYDRA_TARGETS = {
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
}
_LOGGING_CLASSES = {"logging.StreamHandler", "logging.FileHandler", "rich.logging.RichHandler"}
_LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_LOG_FILE = "${hydra.runtime.output_dir}/${hydra.job.name}.log"
_RESOLVERS = {"run_folder", "hydra", "now", "oc.select", "oc.env"}
_PUBLIC_VARIABLES = re.compile(r"(SLURM_\w+|USER|HOME|HOSTNAME|TMPDIR|SCRATCH|CUDA_VISIBLE_DEVICES)")


@functools.cache
def shipped_targets() -> frozenset[str]:
    """The exact `_target_` names in the YAML files of conf/: nothing else is ever instantiated."""
    pattern = re.compile(r"^\s*_target_:\s*([\w.]+)\s*(?:#.*)?$", re.MULTILINE)
    return frozenset(name for path in schema.CONF.rglob("*.yaml") for name in pattern.findall(path.read_text("utf-8")))


def _foreign_targets(config: DictConfig) -> Iterator[str]:
    """A config from a stranger runs nothing: every name that anything would import, over the whole composed config."""
    for path, value in _strings(OmegaConf.to_container(config, resolve=False)):
        place, key = ".".join(path), path[-1] if path else ""
        allowed = _HYDRA_TARGETS if path[:1] == ("hydra",) else shipped_targets()
        if "_target_" in path and value not in allowed:
            yield f"{place} is {value!r}. Only what the files of conf/ name may be made; to add a method, put its file there."
        elif "_args_" in path:
            yield f"{place}: positional arguments are not taken from a config."
        elif path[:1] == ("hydra",):
            yield from _hydra_faults(path[1:], place, key, value)
        if isinstance(value, str) and "${" in value:
            yield from _interpolation_faults(place, value)


def _hydra_faults(path: tuple[str, ...], place: str, key: str, value: Any) -> Iterator[str]:
    """What may not stand in Hydra's own node, whose settings reach beyond the run folder."""
    if path[:2] in (("job", "env_set"), ("job", "env_copy")):
        yield f"{place}: the environment is not set from a config, since it decides what other programs run. Export it instead."
    elif path == ("output_subdir",) and not (value is None or re.fullmatch(r"\.?\w+", str(value))):
        yield f"{place} is {value!r}. It is a folder's name within the run folder, or null."
    elif path == ("job", "name") and not re.fullmatch(r"\w+", str(value)):
        yield f"{place} is {value!r}. It names the log file, and has letters, digits and '_' only."
    elif path[:1] in (("job_logging",), ("hydra_logging",)):
        if (key == "class" and value not in _LOGGING_CLASSES) or "()" in path or "." in path:
            yield f"{place} is {value!r}. Log handlers are one of: {', '.join(sorted(_LOGGING_CLASSES))}."
        elif key == "filename" and value != _LOG_FILE:
            yield f"{place} is {value!r}, but the log is always {_LOG_FILE}."
        elif re.match(r"(ext|cfg)://", str(value)) and value not in _LOG_STREAMS:
            yield f"{place} is {value!r}. Only {' and '.join(_LOG_STREAMS)} may stand there."


def _interpolation_faults(place: str, text: str) -> Iterator[str]:
    """Resolvers that a config may not call, found by OmegaConf's own parser: their names can hold interpolations, too."""
    nodes: list[Any] = [grammar_parser.parse(text)]
    while nodes:
        node = nodes.pop()
        nodes += getattr(node, "children", None) or []
        if type(node).__name__ != "InterpolationResolverContext":
            continue
        name = node.resolverName().getText()
        first = re.split(r"[\s,]", node.sequence().getText().strip())[0] if node.sequence() else ""
        if name not in _RESOLVERS:
            yield f"{place} uses the resolver {name!r}; known: {', '.join(sorted(_RESOLVERS))}."
        elif name == "oc.env" and not _PUBLIC_VARIABLES.fullmatch(first):
            yield f"{place} reads the environment variable {first}, which would end up in logs. Export it where it is used."


def _remote_code(config: DictConfig) -> Iterator[str]:
    """A model's own code runs only where the person who starts the run says so, not where a file does."""
    asked = OmegaConf.select(config, "base.trust_remote_code")
    given = OmegaConf.select(config, "hydra.overrides.task")  # not there in a run.yaml
    if asked and given is not None and not any(re.fullmatch(r"(?i)\+*base\.trust_remote_code=true", o) for o in given):
        yield "base.trust_remote_code=true is taken from the command line only, since it lets the model's repository run code."


_SECRET_VALUE = re.compile(
    # 40 hex digits are a W&B key, but as a folder's name a commit in the hub's cache.
    r"(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|(?<![0-9a-f/])[0-9a-f]{40}(?![0-9a-f])|wandb_v\d_\w{20,}|gh[pousr]_\w{30,})"
)
_SECRET_KEY = re.compile(r"(^|_)((api|access|private|secret)_?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)


def _looks_secret(config: DictConfig) -> Iterator[str]:
    """Secrets come from the environment: what stands in a config is logged, stored and sent to dashboards."""
    for path, value in _strings(OmegaConf.to_container(config, resolve=False)):
        if path[:1] == ("hydra",) or not isinstance(value, str) or not value:
            continue
        if _SECRET_KEY.search(path[-1]) or (_SECRET_VALUE.search(value) and path[-1] not in ("sha256", "revision")):
            yield f"{'.'.join(path)} looks like a secret. Configs are logged: export it (WANDB_API_KEY, HF_TOKEN) instead."


def redact(text: str) -> str:
    """The text with everything that looks like a secret, and every secret of the environment, taken out."""
    for name, value in os.environ.items():
        if _SECRET_KEY.search(name) and len(value) >= 8:
            text = text.replace(value, "[redacted]")
    return _SECRET_VALUE.sub("[redacted]", text)


def combinations(c: dict[str, Any]) -> Iterator[str]:
    """Settings that are right one by one and wrong together. `c` is the plain config."""
    try:
        run_folder(c["runs"], c["name"], c["resume"])
    except ConfigError as error:
        yield str(error)
    adapter = c["adapter"]["_target_"]
    task = c["task"]["_target_"]
    quantized = c["base"].get("quantization", "none") != "none"
    trains = adapter != "adapters.full.Nothing"
    if trains and c["max_epochs"] is None and c["max_steps"] is None and c["max_tokens"] is None and c["max_time"] is None:
        yield "the run has no end: set one of max_epochs, max_steps, max_tokens, max_time"
    if adapter == "adapters.full.Full" and quantized:
        yield "adapter=full trains the base's own weights, which quantisation has rounded: set base.quantization=none, or use an adapter"
    if adapter == "adapters.spiel.SpIEL" and c["optimizer"]["_target_"] != "torch.optim.AdamW":
        yield "adapter=spiel keeps an age for each entry, or SM3's sums, which other optimisers do not: set optimizer=adamw"
    if c["packing"] and c["group_by_length"]:
        yield "packing=true already fills every sequence: set group_by_length=false"
    if c["packing"] and task.startswith("tasks.classification"):
        yield "packing=true cannot be used for classification, which reads one label per sequence: set packing=false"
    if c["task"].get("streaming"):
        if c["max_steps"] is None:
            yield "task.streaming=true has no known length: set max_steps (max_epochs and max_tokens may stay)"
        if c["max_epochs"] is not None and c["max_epochs"] % 1:
            yield f"task.streaming=true does not know where half an epoch ends: max_epochs={c['max_epochs']} must be whole, or null"
        for key in ("packing", "group_by_length"):
            if c[key]:
                yield f"task.streaming=true sees one row at a time, {key}=true needs them all: set {key}=false"
        if c["workers"]:
            yield "task.streaming=true reads its rows in order, in one process: set workers=0"
        if c["task"]["eval_path"] is None and c["task"]["eval_fraction"] > 0:
            yield "task.streaming=true cannot hold rows out: set task.eval_path, or task.eval_fraction=0"
    if c["precision"] == "16-mixed":
        if c["lightning"]["accelerator"] == "cpu":
            yield "precision=16-mixed needs a GPU: use precision=bf16-true or fp32 with lightning.accelerator=cpu"
        if c["optimizer"].get("fused"):
            yield "precision=16-mixed unscales gradients before they are clipped, which a fused optimiser does not allow: set optimizer.fused=false"
    yield from _peft_combinations(c, quantized)
    yield from _schedule_combinations(c)
    yield from _cooldown_combinations(c)
    drafter = (c.get("drafter") or {}).get("_target_", "")
    if drafter.endswith(".Registers") and c["penalty"]:
        yield "drafter=registers puts tokens behind the rows' own, which penalty=deft would measure in their place: set penalty=none"
    if drafter.endswith(".Registers") and not trains:
        yield "drafter=registers only shapes what an adapter learns, and adapter=none has none: choose an adapter"
    yield from _averaging_combinations(c)
    if schedule_free(c):
        yield from _schedule_free_combinations(c)


def _schedule_combinations(c: dict[str, Any]) -> Iterator[str]:
    falls = {"schedule": c["schedule"], "branch": c.get("branch"), "callbacks.cooldown": c["callbacks"].get("cooldown")}
    for place, node in falls.items():
        if node and node.get("shape") == "exponential" and node["final"] == 0:
            yield f"{place}.shape=exponential never reaches zero, and {place}.final is 0: set {place}.final=0.1, or another shape"
    if c["schedule"]["_target_"] != "trainer.schedules.multistep.multistep":
        return
    milestones, factors = c["schedule"]["milestones"], c["schedule"]["factors"]
    if len(milestones) != len(factors):
        yield (
            f"schedule.milestones has {len(milestones)} entries and schedule.factors {len(factors)}: each milestone needs the "
            "factor from there on"
        )
    if any(late <= early for early, late in itertools.pairwise(milestones)):
        yield f"schedule.milestones={milestones} do not rise: give them in their order"
    elif milestones and (milestones[0] < 1) != (milestones[-1] < 1):
        yield f"schedule.milestones={milestones} mix fractions of the run with steps: give all below 1, or all in steps"


def _cooldown_combinations(c: dict[str, Any]) -> Iterator[str]:
    branch, trigger = c.get("branch"), c["callbacks"].get("cooldown")
    if branch and c["max_steps"] != branch["step"] + branch["steps"]:
        yield (
            f"max_steps={c['max_steps']} is not branch.step + branch.steps = {branch['step'] + branch['steps']}, where the cooldown ends: "
            "python -m trainer.cooldown sets both"
        )
    if branch and trigger:
        yield "a branch cools down from its first step, so callbacks.cooldown has nothing to start: leave it out"
    if branch and c["task"].get("streaming"):
        yield "a branch needs rows whose order is known, which task.streaming=true does not give"
    if trigger and not c["schedule"]["_target_"].endswith((".constant", ".cooldown", ".inverse_sqrt")):
        yield "callbacks.cooldown starts a fall of the rate, and this schedule falls by itself: set schedule=constant"
    if trigger and trigger["patience"] is not None and not (c["callbacks"].get("evaluation") or {}).get("every"):
        yield "callbacks.cooldown.patience counts evaluations, and there are none during training: set callbacks.evaluation.every"
    if trigger and trigger["deadline"] == "max_time" and (c["max_time"] is None or c["max_time"] <= trigger["reserve"]):
        yield (
            f"callbacks.cooldown.deadline=max_time needs a max_time above callbacks.cooldown.reserve={trigger['reserve']:g} minutes; it is "
            f"{c['max_time'] or 'null'}"
        )
    schedule, steps = c["schedule"], c["max_steps"]
    if c["max_time"] is not None and steps is None and c["max_epochs"] is None and c["max_tokens"] is None:
        open_ended = schedule["_target_"].endswith((".constant", ".inverse_sqrt"))
        if not open_ended or 0 < schedule["warmup"] < 1:
            yield (
                "a run that ends by max_time alone has no known number of steps, which this schedule's rates are fractions of: set "
                "schedule=constant schedule.warmup=20 (in steps), and callbacks=[default,cooldown] callbacks.cooldown.deadline=max_time "
                "for a cooldown at its end"
            )
    planned = [schedule[key] for key in ("warmup", "cooldown") if schedule.get(key) is not None]
    if (
        not branch
        and steps is not None
        and sum(value if value >= 1 else value * steps for value in planned) > steps
        and len(planned) > 1
    ):
        yield (
            f"schedule.warmup={planned[0]} and schedule.cooldown={planned[1]} take more than the run's {steps} steps: give fewer, or "
            "fractions of the run"
        )


def _averaging_combinations(c: dict[str, Any]) -> Iterator[str]:
    averaging = c["callbacks"].get("averaging")
    if not averaging:
        return
    if c["adapter"]["_target_"] == "adapters.spiel.SpIEL":
        yield (
            "callbacks.averaging would average entries of adapter=spiel that stand for other positions from one selection to the "
            "next: leave it out"
        )
    if c["adapter"].get("peft_type") == "ADALORA":
        yield "callbacks.averaging would bring back ranks that adapter=adalora has taken away: leave it out"
    if schedule_free(c):
        yield "optimizer=schedulefree averages its weights itself: leave callbacks.averaging out"
    if c["max_steps"] is not None and averaging["start"] >= max(1, c["max_steps"]):
        yield (
            f"callbacks.averaging.start={averaging['start']} is not before the end of max_steps={c['max_steps']}: "
            "give fewer steps, or a fraction of the run"
        )


def schedule_free(c: dict[str, Any]) -> bool:
    """Whether a plain config's optimiser is one of the package schedulefree."""
    return c["optimizer"]["_target_"].startswith("schedulefree.")


def _schedule_free_combinations(c: dict[str, Any]) -> Iterator[str]:
    if c["schedule"]["_target_"] != "trainer.schedules.constant.constant":
        yield "optimizer=schedulefree averages its weights instead of lowering the rate: set schedule=constant"
    if c.get("branch"):
        yield "optimizer=schedulefree needs no cooldown, so there is nothing to branch off for: set branch=none"
    if c["callbacks"].get("cooldown"):
        yield "optimizer=schedulefree needs no cooldown: leave callbacks.cooldown out"
    adapter = c["adapter"]
    if adapter.get("peft_type") == "ADALORA":
        yield "adapter=adalora takes ranks away, which optimizer=schedulefree's average brings back: set optimizer=adamw"
    if adapter.get("restart_after_mask") and adapter["schedule"] == "wl" and adapter["mask"] == "gradient":
        yield (
            "adapter.restart_after_mask=true starts anew what optimizer=schedulefree averages over the whole run: set it to false, or "
            "optimizer=adamw"
        )
    full = adapter["_target_"] == "adapters.full.Full"
    low = [f"adapter.{key}" for key in ("dtype", "sparse_dtype") if adapter.get(key) == "bfloat16"]
    low += ["precision"] if full and c["precision"] == "bf16-true" else []
    low += ["base.dtype"] if full and c["base"]["dtype"] in ("bfloat16", "float16") else []
    for key in low:
        yield f"optimizer=schedulefree averages the trained weights in their own dtype, and {key} is too coarse for that: use fp32"


def _peft_combinations(c: dict[str, Any], quantized: bool) -> Iterator[str]:
    if c["adapter"]["_target_"] != "adapters.peft.Peft" or c["adapter"]["peft_type"] == "???":
        return
    from adapters import peft_fields

    classification = c["task"]["_target_"].startswith("tasks.classification")
    yield from peft_fields.problems(
        c["adapter"], quantized, c["packing"], classification, c["objective"]["gradient_checkpointing"]
    )


def compose(argv: list[str]) -> DictConfig:
    """Compose and check a config from command-line arguments without starting a run, for the other verbs."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    install()
    with initialize_config_dir(config_dir=str(schema.CONF), version_base="1.3", job_name="trainer"):
        config = hydra_compose("config", overrides=rewrite(argv), return_hydra_config=False)
    return config


def arguments(argv: list[str], known: dict[str, Any], usage: str) -> dict[str, Any]:
    """Parse the `key=value` arguments of a verb. `known` maps each key to its default; `...` marks a required one.

    Raises:
        SystemExit: 0 after `--help`; 2 on an unknown or missing key, with the usage.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(usage)
        raise SystemExit(0)
    given: dict[str, Any] = {}
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            fault = schema.nearest(key, known) if equals else "Arguments are written key=value."
            raise SystemExit(bad(f"{word}: not an argument. {fault}\n\n{usage}"))
        try:
            given[key] = _typed(value, known[key])
        except ValueError:
            raise SystemExit(bad(f"{word}: {key} takes {type(known[key]).__name__}\n\n{usage}")) from None
    missing = [key for key, default in known.items() if default is ... and key not in given]
    if missing:
        raise SystemExit(bad(f"missing: {', '.join(missing)}\n\n{usage}"))
    return {**known, **given}


def _typed(value: str, default: Any) -> Any:
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    return type(default)(value) if isinstance(default, int | float) else value


def told(error: Exception) -> str:
    """What is wrong, without a traceback, when composing a config or making the run folder fails."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename} cannot be written: {error.strerror}. Choose another place with runs=FOLDER"
    text = str(error).partition("\nConfig search path:")[0]
    override = getattr(error, "override", None)  # of an OverrideParseException, which does not always name it
    if override is not None and override not in text:
        text = f"{override}: {text}"
    return f"{text}\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else text


def bad(message: str) -> int:
    """Say what is wrong with what was asked for; returns the exit code."""
    print(message, file=sys.stderr)
    return EXIT_BAD_INPUT
