"""Go back to a good checkpoint when the loss explodes, and skip the rows that it exploded on.

A step is bad if its loss or gradient is not finite, or if its loss is above `factor` times the
median of the last `window` good steps. After `steps` bad steps in a row the run goes back to the
newest checkpoint from before the first of them. The rows that it has read since then are skipped,
as PaLM did (Chowdhery et al. 2022, arXiv 2204.02311, 5.1). PaLM found that the same rows do no harm
from another state, so they are not removed: they come again in the next epoch. A new order would
put the same rows next to others, and could bring them back at once. The rates and the number of
steps stay as planned.

Going back is a resume in the same process, from what is on the disk. So a run that is killed
afterwards resumes with the same bits.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from statistics import median
from typing import Any

import lightning

from trainer.callbacks import RunState
from trainer.config.secrets import redact
from trainer.models.losses import NonFinite
from trainer.storage import checkpoints

log = logging.getLogger("trainer")


class Exploded(NonFinite):
    """The loss was far above its median for several steps in a row."""


class RolledBack(RuntimeError):
    """The run has gone back to a checkpoint, and has to resume from it."""

    code = 0  # of the process, for dashboards: nothing has failed


class Rollback(lightning.Callback):
    """Finds bad steps, and goes back at most `times` times in a run."""

    judges_steps = True  # at once, before anything of them is saved

    def __init__(
        self, run_state: RunState, factor: float | None, window: int, steps: int, times: int
    ):
        self.run_state, self.factor, self.steps, self.times = run_state, factor, steps, times
        self.losses: deque[float] = deque(maxlen=window)  # of good steps
        self.bad = 0  # bad steps in a row

    def check(self, module: Any) -> None:
        """Judge the current step.

        Raises:
            Exploded: it is the last of `steps` bad ones in a row.
        """
        loss = float(module.sums["loss"]) / max(1, int(module.sums["tokens"]))
        limit = self._limit()
        if not module.skipped_in_a_row and math.isfinite(loss) and loss <= limit:
            self.bad = 0
            self.losses.append(loss)
        else:
            self.bad += 1
        self.run_state.doubtful = self.bad > 0
        if self.bad >= self.steps:
            raise Exploded(
                f"{self.bad} steps in a row, up to step {module.step}, had a loss that is not"
                f" finite or above {self.factor or math.inf:g} times its median of"
                f" {median(self.losses) if self.losses else math.nan:.4g} (the last one is"
                f" {loss:.4g}, callbacks.rollback.factor={self.factor}). Lower optimizer.lr, raise"
                f" the warm-up, or look at the rows of the last one: {self._rows(module)}"
            )

    def _limit(self) -> float:
        """Return the largest loss of a good step."""
        if self.factor is None or len(self.losses) < (self.losses.maxlen or 0):
            return math.inf
        return self.factor * median(self.losses)

    def _rows(self, module: Any) -> list[str]:
        return self.run_state.rows_of(module.sums["sequences"])[:16]

    def go_back(self, error: NonFinite, module: Any) -> None:
        """Remove the checkpoints after the newest good one, and record which steps are skipped.

        Raises:
            RolledBack: it is done. NonFinite: there is nothing to go back to, or it was done
            `times` times already.
        """
        # FineTune raises before `check` has seen the last step
        bad = self.bad if isinstance(error, Exploded) else self.bad + 1
        good = module.step - bad
        folder, journal = self.run_state.folder, self.run_state.journal
        earlier = (folder.earlier() or {}).get("rollbacks", [])
        if len(earlier) >= self.times:
            raise NonFinite(
                f"{error}. The run has gone back {len(earlier)} times already"
                f" (callbacks.rollback.times={self.times})"
            )
        saved = [each for each in checkpoints.complete(folder.checkpoints) if each.step <= good]
        target = next((each for each in reversed(saved) if checkpoints.fault(each) is None), None)
        if target is None:
            raise NonFinite(
                f"{error}. There is no checkpoint from before step {good + 1} to go back to: set"
                " callbacks.checkpoints.every lower"
            )
        skipped = module.step - target.step
        text = redact(str(error))
        # The record is last: killed before it, the run explodes again, and goes back again.
        checkpoints.remove_after(folder.checkpoints, target.step)
        journal.write(
            "rollback",
            target.step,
            {"from": module.step, "skipped_steps": skipped, "reason": text},
        )
        folder.add_rollback({"at": target.step, "steps": skipped, "reason": text})
        raise RolledBack(
            f"{text}\nGoing back to step {target.step}. The rows of the {skipped} steps since then"
            f" are skipped (rollback {len(earlier) + 1} of at most {self.times})"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "bad": self.bad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.clear()
        self.losses.extend(state_dict["losses"])
        self.bad = state_dict["bad"]
