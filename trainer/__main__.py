"""`python -m trainer +experiment=NAME`: Hydra's entry. Everything heavy is imported inside `_job`, after the checks."""

import logging
import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from trainer import config


@hydra.main(config_path="../conf", config_name="config", version_base="1.3")
def _job(cfg: DictConfig) -> float | None:
    from hydra.core.hydra_config import HydraConfig

    # Again: a launcher's worker has not passed through config.install.
    config.check(cfg, OmegaConf.to_container(HydraConfig.get().runtime.choices))  # type: ignore[arg-type]
    try:
        from trainer import failures
        from trainer.run import Unfinished, run

        return run(cfg)
    except KeyboardInterrupt:
        sys.exit(130)
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
    if any(argument.startswith("--experimental-rerun") for argument in sys.argv):
        sys.exit("--experimental-rerun loads a pickle, which could run anything. Use resume=RUN_FOLDER.")
    sys.argv[1:] = config.rewrite(sys.argv[1:])
    config.install(exit_on_fault=True)
    _job()


if __name__ == "__main__":
    main()
