"""`python -m trainer +experiment=NAME`: Hydra's entry. Everything heavy is imported inside `_job`, after the checks."""

import logging
import os
import sys

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer import config

# What composing a config and making the run folder raise; what comes later ends in _job.
_BAD_INPUT = (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError)


@hydra.main(config_path="../conf", config_name="config", version_base="1.3")
def _job(cfg: DictConfig) -> float | None:
    from hydra.core.hydra_config import HydraConfig

    # Again: a launcher's worker has not passed through config.install.
    config.check(cfg, OmegaConf.to_container(HydraConfig.get().runtime.choices))  # type: ignore[arg-type]
    from trainer import failures
    from trainer.run import Unfinished, run

    try:
        return run(cfg)
    except Exception as error:
        log = logging.getLogger("trainer")
        if isinstance(error, Unfinished):
            log.warning("%s", error)
            sys.exit(error.code)
        explained = failures.explained(error, OmegaConf.to_container(cfg))  # type: ignore[arg-type]
        if explained is None:
            log.exception("an error that Graft has no explanation for; please report it with this traceback")
            sys.exit(1)
        log.error("%s", explained[0])
        log.debug("", exc_info=error)
        sys.exit(explained[1])


def main() -> None:
    """Run, or with Hydra's flags print the config (--cfg job), sweep (--multirun) or help."""
    flags = get_args_parser().parse_args()
    if flags.experimental_rerun is not None:
        sys.exit(config.bad("--experimental-rerun loads a pickle, which could run anything. Use resume=RUN_FOLDER."))
    if flags.config_path is not None or flags.config_name is not None:
        sys.exit(
            config.bad(
                "conf/ is the schema of all configs. Add your own with --config-dir=FOLDER, as FOLDER/experiment/NAME.yaml"
            )
        )
    sys.argv[1:] = config.rewrite(sys.argv[1:])
    config.install(incomplete=bool(flags.help or flags.hydra_help or flags.cfg or flags.info))
    traced = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on then, and prints none itself
    try:
        _job()
    except KeyboardInterrupt:
        sys.exit(130)
    except _BAD_INPUT as error:
        if traced:
            raise
        sys.exit(config.bad(config.told(error)))


if __name__ == "__main__":
    main()
