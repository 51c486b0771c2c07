"""As sitecustomize: a trainer whose micro-batches take $PAUSE seconds longer, without use of the CPU, so that a test can interrupt it.

Nothing is imported before its turn, so that a signal finds each part of the start as it is.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time


class Slowed:
    """Finds trainer.finetune, and changes it when it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != "trainer.finetune":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def loaded(module):
            load(module)
            train = module.FineTune.training_step

            def slowly(*arguments, **options):
                time.sleep(float(os.environ["PAUSE"]))
                return train(*arguments, **options)

            module.FineTune.training_step = slowly

        spec.loader.exec_module = loaded
        return spec


if "PAUSE" in os.environ:
    sys.meta_path.insert(0, Slowed())
