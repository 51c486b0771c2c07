"""Tokens a second of a run's model with its adapter merged while it writes, and without.

    python -m scripts.bench.merged_decoding run=FOLDER [heldout=16] [max_new_tokens=64] [repeats=2]

The first `heldout` held-out prompts are decoded greedily, one at a time, with the run's drafter if
it has one and without it. The ways are in turns, after a first round that does not count. Set
OMP_NUM_THREADS for the number of threads.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from typing import Any

from scripts.bench.options import parse

DEFAULTS: dict[str, Any] = {"run": None, "heldout": 16, "max_new_tokens": 64, "repeats": 2}


def main() -> int:
    """Decode and print the table."""
    options = parse(DEFAULTS, __doc__)
    if options["run"] is None:
        print(__doc__, file=sys.stderr)
        return 2
    import torch

    from trainer.assembly import quiet
    from trainer.assembly.trained import load_trained
    from trainer.decoding import speculative
    from trainer.decoding.merged import merged
    from trainer.drafters import Target
    from trainer.evaluation import questions

    quiet.quiet()
    run = load_trained(options["run"], torch.device("cpu"))
    prompts, stops = questions.prompt_ids(run, options["heldout"], [])
    drafters: dict[str, Any] = {"plain": None}
    if run.drafter is not None:  # in the target's dtype, as the commands have it
        drafters["drafter"] = run.drafter.to(run.model.get_input_embeddings().weight.dtype)
    ways: dict[str, Any] = {"un-merged": contextlib.nullcontext, "merged": merged}
    sums: dict[tuple[str, str], list[float]] = {}
    for turn in range(1 + options["repeats"]):
        for way, context in ways.items():
            with context(run.model):
                target = Target(run.model)
                for name, drafter in drafters.items():
                    pair = sums.setdefault((way, name), [0, 0.0])
                    for prompt in prompts:
                        ids, started = torch.tensor(prompt), time.perf_counter()
                        result = speculative.generate(
                            target, drafter, ids, options["max_new_tokens"], stops
                        )
                        if turn:
                            pair[0] += len(result.tokens)
                            pair[1] += time.perf_counter() - started
    for (way, name), (tokens, seconds) in sums.items():
        print(f"{way:>10} {name:>8} {tokens / seconds:6.1f} tokens/s")
    threads = torch.get_num_threads()
    print(f"{threads} threads of {os.cpu_count()} cores, {platform.machine()}, {torch.__version__}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
