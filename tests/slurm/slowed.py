"""As sitecustomize: a trainer whose micro-batches take $PAUSE seconds longer, and whose first
process takes $LATE longer to tell of an error, without use of the CPU, so that a test can interrupt
the one and have the other overtaken.

Nothing is imported before its turn, so that a signal finds each part of the start as it is.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time


class Slowed:
    """Finds a module, and has one of its functions wait before it begins when it is loaded."""

    def __init__(self, module, path, seconds):
        self.module, self.path, self.seconds = module, path, seconds

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def loaded(module):
            load(module)
            *owners, last = self.path.split(".")
            owner = module
            for part in owners:
                owner = getattr(owner, part)
            function = getattr(owner, last)

            def slowly(*arguments, **options):
                time.sleep(self.seconds)
                return function(*arguments, **options)

            setattr(owner, last, slowly)

        spec.loader.exec_module = loaded
        return spec


if "PAUSE" in os.environ:
    sys.meta_path.insert(
        0, Slowed("trainer.training.finetune", "FineTune.training_step", float(os.environ["PAUSE"]))
    )
if "LATE" in os.environ and os.environ.get("SLURM_PROCID") == "0":
    sys.meta_path.insert(
        0, Slowed("trainer.session.failures", "explained", float(os.environ["LATE"]))
    )
