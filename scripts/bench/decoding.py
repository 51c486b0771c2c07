"""The parts of a step of speculative decoding: the target's forward passes, the drafter's, and the
rest.

    python -m scripts.bench.decoding runs=[FOLDER,...] [untrained=[lookup]] [shapes=[chain,tree]]
        [dtypes=[run,fp32]] [chain=3] [tree=8] [top_k=4] [depth=4] [prompts=4] [max_new_tokens=48]
        [clock=wall] [profile=0] [json=FILE]

Each run's drafter drafts for the run's first held-out prompts, greedily, one sequence at a time: a
chain of `chain` tokens and, if the drafter can branch, EAGLE-2's tree of `tree` nodes. The drafters
without training use the first run's base. `plain` is the same loop without a drafter. The table has
medians over all steps but each text's first, in milliseconds:

    target     the model's forward, its output head, and its embedding and rotary embeddings where
               a drafter calls them
    drafter    the forward of its modules
    rest       the step minus both: growing trees, masks, verification, caches, Python
    share      the rest over the step, for each step

clock=processor counts processor seconds instead of wall seconds. They are the same on a quiet
machine with one thread, and reproducible on a busy one. On a GPU each forward is synchronised, so
nothing overlaps in the rest. profile=N prints the N functions with most of the rest's time, by
cProfile.
"""

from __future__ import annotations

import contextlib
import cProfile
import functools
import json
import platform
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.bench.options import parse

DEFAULTS: dict[str, Any] = {
    "runs": [],
    "untrained": ["lookup"],
    "shapes": ["chain", "tree"],
    "dtypes": ["run", "fp32"],
    "chain": 3,
    "tree": 8,
    "top_k": 4,
    "depth": 4,
    "prompts": 4,
    "max_new_tokens": 48,
    "clock": "wall",
    "profile": 0,
    "json": None,
}


@dataclass
class Meter:
    """Counts the seconds of each part, step by step."""

    now: Callable[[], float]
    running: bool = False  # within a timed forward pass, which includes the inner ones
    spent: dict[str, float] = field(default_factory=lambda: {"target": 0.0, "drafter": 0.0})
    began: float | None = None
    steps: list[dict[str, float]] = field(default_factory=list)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call`, with its time counted as `name`."""

        @functools.wraps(call)
        def counted(*arguments: Any, **more: Any) -> Any:
            if self.running:
                return call(*arguments, **more)
            self.running, started = True, self.now()
            try:
                return call(*arguments, **more)
            finally:
                self.spent[name] += self.now() - started
                self.running = False

        return counted

    def restart(self) -> None:
        """Start a text. The time until the end of its first step belongs to no step."""
        self.began = None

    def lap(self) -> None:
        """End a step."""
        now = self.now()
        if self.began is not None:
            self.steps.append({"step": now - self.began, **self.spent})
        self.began, self.spent = now, dict.fromkeys(self.spent, 0.0)


def figures(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return medians over steps in milliseconds, and the median share of the rest."""
    rest = [step["step"] - step["target"] - step["drafter"] for step in steps]
    medians = {
        name: 1000 * statistics.median(step[name] for step in steps)
        for name in ("step", "target", "drafter")
    }
    medians["rest"] = 1000 * statistics.median(rest)
    medians["share"] = statistics.median(
        one / step["step"] for one, step in zip(rest, steps, strict=True)
    )
    return medians | {"steps": len(steps)}


@contextlib.contextmanager
def watched(meter: Meter, target: Any, drafter: Any) -> Iterator[None]:
    """Time the forward passes of the target and of the drafter, and each decoding step."""
    import torch

    from trainer.decoding import speculative

    model = target.model
    modules = {
        model: "target",
        model.get_output_embeddings(): "target",
        model.get_input_embeddings(): "target",
        target.decoder.rotary_emb: "target",
    }
    of_target = {id(module) for module in model.modules()}
    for module in drafter.modules() if drafter is not None else ():
        has_forward = type(module).forward is not torch.nn.Module.forward
        if module is not drafter and id(module) not in of_target and has_forward:
            modules[module] = "drafter"
    verify = speculative.Decoder.verify

    def timed_verify(*arguments: Any) -> None:
        verify(*arguments)
        meter.lap()

    before = {module: vars(module).get("forward") for module in modules}
    for module, name in modules.items():
        module.forward = meter.timed(name, module.forward)
    speculative.Decoder.verify = timed_verify  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        speculative.Decoder.verify = verify  # type: ignore[method-assign]
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


def measured(
    target: Any,
    drafter: Any,
    prompts: list[Any],
    shape: Any,
    stops: list[int],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return the `figures` of decoding with one drafter in one shape, and its tokens per step.
    Without a drafter (None) it is plain decoding."""
    import torch

    from trainer.decoding import speculative
    from trainer.decoding.speculative import Strategy
    from trainer.speed.quick_passes import quick

    clock = time.process_time if options["clock"] == "processor" else time.perf_counter

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock()

    meter = Meter(now)
    profile = cProfile.Profile() if options["profile"] else None
    tokens = passes = 0
    with quick(target.model, drafter), watched(meter, target, drafter):
        for number, ids in enumerate([prompts[0], *prompts]):
            meter.restart()
            if profile is not None and number:
                profile.enable()
            # the first text is a warm-up
            limit = options["max_new_tokens"] if number else 8
            result = speculative.generate(
                target, drafter, ids, limit, stops, strategy=Strategy(shape)
            )
            if profile is not None:
                profile.disable()
            if not number:
                meter.steps.clear()
                continue
            tokens, passes = tokens + len(result.tokens) - 1, passes + result.steps
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(options["profile"])
        pstats.Stats(profile).sort_stats("cumtime").print_stats(options["profile"])
    return figures(meter.steps) | {"tokens": tokens / max(1, passes)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table with a line for each drafter, shape and dtype."""
    lines = [
        (
            "| drafter | draft | dtype | steps | tokens a step | step ms | target ms | drafter ms |"
            " rest ms | share |"
        ),
        "|---" * 10 + "|",
    ]
    lines += [
        f"| {row['drafter']} | {row['shape']} | {row['dtype']} | {row['steps']} |"
        f" {row['tokens']:.2f} | {row['step']:.2f} | {row['target']:.2f} | {row['drafter_ms']:.2f}"
        f" | {row['rest']:.2f} | {row['share']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def measured_run(
    path: str,
    device: Any,
    fp32: bool,
    names: list[str],
    shapes: dict[str, Any],
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yield the table's rows of one run in one dtype."""
    import torch

    from trainer.assembly.chosen_drafter import drafter_of
    from trainer.assembly.trained import load_trained
    from trainer.config.decoding_options import DrafterOptions
    from trainer.drafters import Drafter, Target
    from trainer.evaluation.questions import held_out_prompts

    run = load_trained(path, device, fp32=fp32)
    prompts, stops = held_out_prompts(run, options["prompts"])
    ids = [torch.tensor(prompt, device=device) for prompt in prompts]
    target = Target(run.model)
    for name in names:
        drafter = None if name == "plain" else drafter_of(run, DrafterOptions(drafter=name))
        # such a drafter chooses the shape itself
        own_shape = drafter is None or type(drafter).propose is not Drafter.propose
        for shape in options["shapes"][: 1 if own_shape else None]:
            result = measured(target, drafter, ids, shapes[shape], stops, options)
            yield result | {
                "drafter_ms": result["drafter"],
                "drafter": type(drafter).__name__ if drafter is not None else "plain",
                "shape": "own" if own_shape else shape,
                "dtype": str(run.model.dtype).removeprefix("torch."),
            }


def main() -> int:
    """Measure each run in each dtype, with each drafter and shape."""
    options = parse(DEFAULTS, __doc__)
    if not options["runs"]:
        print(__doc__, file=sys.stderr)
        return 2
    import torch

    from trainer.assembly import quiet
    from trainer.decoding import trees

    quiet.quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = {
        "chain": trees.chain(options["chain"]),
        "tree": trees.eagle2(options["top_k"], options["depth"], options["tree"]),
    }
    rows: list[dict[str, Any]] = []
    for number, path in enumerate(options["runs"]):
        names = ["run", *(["plain", *options["untrained"]] if number == 0 else [])]
        for dtype in options["dtypes"]:
            for row in measured_run(path, device, dtype == "fp32", names, shapes, options):
                rows.append(row)
                print(table([row]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}\n")
    print(
        f"{options['clock']} time, {platform.machine()}, {torch.get_num_threads()} threads,"
        f" {device.type}, torch {torch.__version__}"
    )
    if options["json"]:
        Path(options["json"]).write_text(json.dumps({"options": options, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
