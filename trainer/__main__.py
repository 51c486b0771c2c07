"""Graft: parameter-efficient fine-tuning of language models from one config.

    graft experiment=NAME [GROUP=CHOICE ...] [KEY=VALUE ...]    train
    graft COMMAND [OPTIONS]                                     one of the commands below

`python -m trainer` is the same program, and `python -m trainer.COMMAND` the same command.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import commands
from trainer.config.errors import EXIT_BAD_INPUT, bad
from trainer.config.options import INTERRUPTED, exit_with
from trainer.config.shown import say

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from trainer.cluster.signals import Signals

_readings: list[Any] = []  # of the cores' use, when the command began


def main() -> None:
    """Run what the command line says, and exit with its code."""
    exit_with(run_words)


def run_words(argv: list[str]) -> int:
    """Run a command, print help, or train."""
    first = argv[0] if argv else ""
    if first in commands.NAMES:
        return import_module(f"trainer.{first}").main(argv[1:])  # type: ignore[no-any-return]
    if first == "help":
        return run_words([*argv[1:2], "--help"])
    if first.isidentifier():
        return bad(f"graft --help lists the commands\n{commands.no_such_command(first)}")
    if "--help" in argv or "-h" in argv or not argv:
        say(commands.help_text(__doc__ or ""))
        return 0 if argv else EXIT_BAD_INPUT
    if "--version" in argv:
        say(f"graft {commands.version()}")
        return 0
    return train(argv)


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

    slurm_job.exit_1_on_sigterm()
    traced = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        chosen = flags.parse(argv, commands.NAMES)
        sys.argv[1:] = compose.rewrite(argv, chosen.multirun)
        only_shown = bool(chosen.hydra_help or chosen.cfg or chosen.info)
        if not only_shown:
            from trainer.speed import cpu_load

            _readings.append(cpu_load.seconds())
        compose.install(only_shown, reads_files=not only_shown and not chosen.multirun)
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them
        hydra.main(config_path="../conf", config_name="config", version_base="1.3")(_job)()
    except SystemExit as end:
        slurm_job.wait_for_rank0(end.code)
        slurm_job.exit_with_process_group(end.code)
        raise
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    # Errors of composing a config and of creating the run folder; later ones end in _job.
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
    with fast_imports.without_gc():
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
        config: Any = OmegaConf.to_container(cfg)
        sys.exit(failures.log_and_exit_code(error, config))


if __name__ == "__main__":
    main()
