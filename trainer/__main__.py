"""Graft: parameter-efficient fine-tuning of language models from one config.

    graft experiment=NAME [GROUP=CHOICE ...] [KEY=VALUE ...]    train
    graft COMMAND [OPTIONS]                                     one of the commands below

`python -m trainer` is the same program, and `python -m trainer.COMMAND` the same command.
"""

from __future__ import annotations

import ast
import atexit
import difflib
import logging
import os
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.errors import EXIT_BAD_INPUT, PANIC, bad, panicked
from trainer.config.options import INTERRUPTED, exit_with
from trainer.config.shown import say

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from trainer.cluster.signals import Signals

HERE = Path(__file__).parent
_readings: list[Any] = []  # of the cores' use, when the command began
COMMANDS = sorted(path.stem for path in HERE.glob("[a-z]*.py") if path.stem != "run")
CONFIG = """\
A config is composed from the files of conf/: one file of each group, then single values.

    adapter=rosa               the group's choice, conf/adapter/rosa.yaml
    optimizer.lr=1e-4          one value; the files of conf/ name and explain all of them
    experiment=quickstart      conf/experiment/quickstart.yaml, which sets several of both
    --config-dir=FOLDER        your own experiments, FOLDER/experiment/NAME.yaml
    --multirun seed=0,1,2      one run for each value
    --cfg job                  print the composed config and stop

--hydra-help shows Hydra's own options. The groups of conf/ and their choices:
"""


def main() -> None:
    """Run what the command line says, and exit with its code."""
    exit_with(run_words)


def run_words(argv: list[str]) -> int:
    """Run a command, print help, or train."""
    first = argv[0] if argv else ""
    if first in COMMANDS:
        return import_module(f"trainer.{first}").main(argv[1:])  # type: ignore[no-any-return]
    if first == "help":
        return run_words([*argv[1:2], "--help"])
    if first.isidentifier():
        return bad(f"graft --help lists the commands\n{no_such_command(first)}")
    if "--help" in argv or "-h" in argv or not argv:
        say(help_text())
        return 0 if argv else EXIT_BAD_INPUT
    if "--version" in argv:
        say(f"graft {version()}")
        return 0
    return train(argv)


def no_such_command(word: str) -> str:
    """The message for a word that is no command."""
    if word in ("run", "train"):
        return f"{word}: training needs no command. Use: graft experiment=NAME"
    close = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.6)
    hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(COMMANDS)}."
    return f"{word}: there is no such command. {hint}"


def help_text() -> str:
    """The text of `graft --help`. The commands are read and not imported, which takes seconds."""
    from trainer.config import schema
    from trainer.config.overrides import groups

    trees = {name: ast.parse((HERE / f"{name}.py").read_text("utf-8")) for name in COMMANDS}
    commands = [
        f"    {name:<10} {(ast.get_docstring(tree) or '').partition(chr(10))[0]}"
        for name, tree in trees.items()
    ]
    choices = [f"    {name:<10} {', '.join(schema.options(name))}" for name in groups()]
    return "\n".join(
        [
            __doc__ or "",
            "Commands; graft COMMAND --help shows the options:\n",
            *commands,
            "",
            CONFIG,
            *choices,
        ]
    )


def version() -> str:
    """The installed version of Graft."""
    try:
        return metadata.version("graft-trainer")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def train(argv: list[str]) -> int:
    """Train as the config says; or, with Hydra's options, print the config (--cfg job) or sweep
    (--multirun)."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from trainer.cluster import slurm_job
    from trainer.config import compose, flags
    from trainer.config.errors import explain
    from trainer.speed import cpu_load

    slurm_job.exit_1_on_sigterm()
    _readings.append(cpu_load.seconds())
    traced = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        chosen = flags.parse(argv, COMMANDS)
        sys.argv[1:] = compose.rewrite(argv, chosen.multirun)
        compose.install(incomplete=bool(chosen.hydra_help or chosen.cfg or chosen.info))
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them
        hydra.main(config_path="../conf", config_name="config", version_base="1.3")(_job)()
    except SystemExit as end:
        slurm_job.wait_for_rank0(end.code)
        _exit_with_process_group(end.code)
        raise
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    # What composing a config and creating the run folder raise; later errors end in _job.
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        if traced:
            raise
        return bad(explain(error))
    return 0


def _job(cfg: DictConfig) -> float | None:
    """One run of a checked config. One that cannot start leaves no folder."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from trainer.storage import run_folder

    try:
        return _run_with_signals(cfg)
    except SystemExit as end:
        if end.code in (EXIT_BAD_INPUT, INTERRUPTED):
            hydra: Any = HydraConfig.get()
            folder = OmegaConf.select(hydra, "runtime.output_dir")
            if folder is not None:
                run_folder.remove_unused(Path(folder))
        raise


def _run_with_signals(cfg: DictConfig) -> float | None:
    """One run of a checked config, with its signals and exit codes."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from trainer.cluster import slurm_job
    from trainer.cluster.signals import Signals
    from trainer.config import compose, paths

    # Again, because a launcher's worker has not passed the hook into Hydra.
    choices: Any = OmegaConf.to_container(HydraConfig.get().runtime.choices)
    compose.check(cfg, choices)
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    settings: Any = OmegaConf.to_container(own, resolve=True)
    if (fault := slurm_job.task_mismatch(settings["lightning"])) is not None:
        sys.exit(bad(fault))
    if missing := list(paths.problems(settings)):
        sys.exit(bad("\n".join(missing)))
    with Signals() as signals:
        number, folder, step = None, None, None
        try:
            last = _run(cfg, signals)
            signals.ignore()  # a signal while the interpreter ends must not change the exit code
            return last
        except slurm_job.Stopped as stop:
            logging.getLogger("trainer").warning("%s", stop)
            number, folder, step = stop.number, stop.folder, stop.step
        except SystemExit as end:
            if signals.received is None or end.code != 128 + signals.received:
                raise
            number = signals.received  # it came before the run had a folder
        signals.ignore()
        again = {"requeue": cfg.requeue, "max_requeues": cfg.max_requeues}
        sys.exit(slurm_job.exit_code(again, number, folder, step))


def _run(cfg: DictConfig, signals: Signals) -> float | None:
    """Run the training; an error becomes one message and an exit code."""
    from omegaconf import OmegaConf

    from trainer.cluster import slurm_job
    from trainer.speed import fast_imports, threads

    if cfg.threads == "auto" and _readings and threads.let_waiting_yield(_readings[0]):
        logging.getLogger("trainer").info(
            "other processes are busy: waiting threads yield (%s)",
            ", ".join(f"{name}={value}" for name, value in threads.SHORT_SPIN.items()),
        )
    with fast_imports.without_gc(), fast_imports.without_torchmetrics():
        from trainer.run import run
        from trainer.session import failures
        from trainer.session.session import Unfinished

    log = logging.getLogger("trainer")
    try:
        with fast_imports.lazy_compile():
            return run(cfg, signals)
    except slurm_job.Stopped:
        raise
    except Unfinished as error:
        log.warning("%s", error)
        sys.exit(error.code)
    except BaseException as error:
        if type(error).__name__ == PANIC:
            log.error("%s", panicked(error))
            sys.exit(EXIT_BAD_INPUT)
        if not isinstance(error, Exception):
            raise
        config: Any = OmegaConf.to_container(cfg)
        explained = failures.explained(error, config)
        if explained is None:
            log.exception(
                "an error that Graft has no explanation for; please report it with this traceback"
            )
            sys.exit(1)
        log.error("%s", explained[0])
        log.debug("", exc_info=error)
        sys.exit(explained[1])


def _exit_with_process_group(code: object) -> None:
    """Exit immediately if the process group still exists: a rank has died, and torch, which
    destroys the group as the interpreter ends, could wait for it forever."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
