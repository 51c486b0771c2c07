"""`python -m trainer +experiment=NAME`: Hydra's entry. Everything heavy is imported inside `_job`,
after the checks."""

import atexit
import logging
import os
import sys

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.cluster import slurm_job
from trainer.cluster.signals import Signals
from trainer.config import compose
from trainer.config.errors import bad, told
from trainer.speed import fast_imports

# What composing a config and making the run folder raise; what comes later ends in _job.
_BAD_INPUT = (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError)


@hydra.main(config_path="../conf", config_name="config", version_base="1.3")
def _job(cfg: DictConfig) -> float | None:
    from hydra.core.hydra_config import HydraConfig

    # Again: a launcher's worker has not passed through config.install.
    compose.check(cfg, OmegaConf.to_container(HydraConfig.get().runtime.choices))  # type: ignore[arg-type]
    if (fault := slurm_job.other_tasks(OmegaConf.to_container(cfg.lightning))) is not None:  # type: ignore[arg-type]
        sys.exit(bad(fault))
    with Signals() as signals:
        number, folder, step = None, None, None
        try:
            last = _run(cfg, signals)
            # all is done: what comes while the interpreter ends must not make a failure of it
            signals.ignore()
            return last
        except slurm_job.Stopped as stop:
            logging.getLogger("trainer").warning("%s", stop)
            number, folder, step = stop.number, stop.folder, stop.step
        except SystemExit as end:
            if signals.received is None or end.code != 128 + signals.received:
                raise
            number = signals.received  # before there was a folder
        signals.ignore()
        settings = {"requeue": cfg.requeue, "max_requeues": cfg.max_requeues}
        sys.exit(slurm_job.exit_code(settings, number, folder, step))


def _run(cfg: DictConfig, signals: Signals) -> float | None:
    """The run, with what goes wrong told in one message and an exit code."""
    with fast_imports.without_gc():
        from trainer.run import run
        from trainer.session import failures
        from trainer.session.session import Unfinished

    try:
        with fast_imports.lazy_compile():
            return run(cfg, signals)
    except slurm_job.Stopped:
        raise
    except Exception as error:
        log = logging.getLogger("trainer")
        if isinstance(error, Unfinished):
            log.warning("%s", error)
            sys.exit(error.code)
        explained = failures.explained(error, OmegaConf.to_container(cfg))  # type: ignore[arg-type]
        if explained is None:
            log.exception(
                "an error that Graft has no explanation for; please report it with this traceback"
            )
            sys.exit(1)
        log.error("%s", explained[0])
        log.debug("", exc_info=error)
        sys.exit(explained[1])


def _leave_the_group(code: object) -> None:
    """Exit now where a group of processes has not been ended: one of them is gone, and torch, which
    ends the group as the interpreter goes, can wait for it for ever."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def main() -> None:
    """Run, or with Hydra's flags print the config (--cfg job), sweep (--multirun) or help."""
    slurm_job.yield_to_the_error()
    flags = get_args_parser().parse_args()
    if flags.experimental_rerun is not None:
        sys.exit(
            bad(
                "--experimental-rerun loads a pickle, which could run anything. Use"
                " resume=RUN_FOLDER."
            )
        )
    if flags.config_path is not None or flags.config_name is not None:
        sys.exit(
            bad(
                "conf/ is the schema of all configs. Add your own with --config-dir=FOLDER, as"
                " FOLDER/experiment/NAME.yaml"
            )
        )
    launcher = next(
        (word for word in flags.overrides if word.startswith("hydra/launcher=")),
        "hydra/launcher=basic",
    )
    if launcher != "hydra/launcher=basic" and not flags.multirun:
        sys.exit(
            bad(
                f"{launcher} starts the runs of a sweep: add --multirun. One run as a SLURM job:"
                " python -m trainer.submit"
            )
        )
    sys.argv[1:] = compose.rewrite(sys.argv[1:])
    compose.install(incomplete=bool(flags.help or flags.hydra_help or flags.cfg or flags.info))
    traced = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on then, and prints none itself
    try:
        _job()
    except SystemExit as end:
        slurm_job.leave_after_the_first(end.code)
        _leave_the_group(end.code)
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except _BAD_INPUT as error:
        if traced:
            raise
        sys.exit(bad(told(error)))


if __name__ == "__main__":
    main()
