"""Where a step of speculative decoding spends its time: the target's forward passes, the drafter's,
and all the rest.

    python -m scripts.bench.decoding runs=[FOLDER,...] [untrained=[lookup]] [shapes=[chain,tree]]
    [dtypes=[run,fp32]] [chain=3] [tree=8]
                                     [top_k=4] [depth=4] [prompts=4] [max_new_tokens=48]
                                     [clock=wall] [profile=0] [json=FILE]

Each run's drafter, and those without training on the first run's base, draft a chain of `chain`
tokens and, where they can branch, EAGLE-2's tree of `tree` nodes for the run's first held-out
prompts, greedily, one sequence at a time; `plain` is the same loop without a
drafter. Medians over all steps but each text's first, in milliseconds:

    target     the model's forward, its output head, and its embedding and rotary embeddings where a drafter asks for them
    drafter    the forward of its modules
    rest       the step less both: growing trees, masks, verification, what is kept of caches, News, Python
    share      of each step the rest over the step

clock=processor counts processor instead of wall seconds: the same on a quiet machine with one
thread, and steady on a busy one. On a GPU each forward is waited for, so that the rest is what it
would be with nothing overlapping. profile=N prints the N functions in which most of the rest's time
goes, by cProfile.
"""

from __future__ import annotations

import cProfile
import functools
import json
import platform
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

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
    """Seconds by what they went into, step by step."""

    now: Callable[[], float]
    running: bool = False  # within a timed forward, whose inner ones are its own
    spent: dict[str, float] = field(default_factory=lambda: {"target": 0.0, "drafter": 0.0})
    began: float | None = None
    steps: list[dict[str, float]] = field(default_factory=list)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, counted to `name`."""

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
        """A text begins: what comes before its first step's end is of no step."""
        self.began = None

    def lap(self) -> None:
        """A step ends."""
        now = self.now()
        if self.began is not None:
            self.steps.append({"step": now - self.began, **self.spent})
        self.began, self.spent = now, dict.fromkeys(self.spent, 0.0)


def figures(steps: list[dict[str, float]]) -> dict[str, float]:
    """Medians over steps in milliseconds, and the median share of what is neither the target's nor
    the drafter's."""
    rest = [step["step"] - step["target"] - step["drafter"] for step in steps]
    found = {
        name: 1000 * statistics.median(step[name] for step in steps)
        for name in ("step", "target", "drafter")
    }
    found["rest"] = 1000 * statistics.median(rest)
    found["share"] = statistics.median(
        one / step["step"] for one, step in zip(rest, steps, strict=True)
    )
    return found | {"steps": len(steps)}


def measured(
    target: Any,
    drafter: Any,
    prompts: list[Any],
    shape: Any,
    stops: list[int],
    options: dict[str, Any],
) -> dict[str, Any]:
    """`figures` of decoding with one drafter in one shape, and its tokens a step; None for the
    drafter is plain decoding."""
    import torch

    from trainer.decoding import speculative
    from trainer.decoding.speculative import Strategy

    clock = time.process_time if options["clock"] == "processor" else time.perf_counter

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock()

    meter = Meter(now)
    undo: list[Callable[[], None]] = []

    def forward(module: Any, name: str) -> None:
        module.forward = meter.timed(name, module.forward)
        undo.append(lambda: module.__dict__.pop("forward"))

    for module in (
        target.model,
        target.model.get_output_embeddings(),
        target.model.get_input_embeddings(),
        target.decoder.rotary_emb,
    ):
        forward(module, "target")
    own = {id(module) for module in target.model.modules()}
    for module in drafter.modules() if drafter is not None else ():
        if (
            module is not drafter
            and id(module) not in own
            and type(module).forward is not torch.nn.Module.forward
        ):
            forward(module, "drafter")
    verify = speculative.Decoder.verify

    def timed_verify(*arguments: Any) -> None:
        verify(*arguments)
        meter.lap()

    speculative.Decoder.verify = timed_verify  # type: ignore[method-assign, assignment]
    profile = cProfile.Profile() if options["profile"] else None
    tokens = passes = 0
    try:
        for number, ids in enumerate([prompts[0], *prompts]):
            meter.restart()
            if profile is not None and number:
                profile.enable()
            # what happens once only is not measured
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
    finally:
        speculative.Decoder.verify = verify  # type: ignore[method-assign]
        for one in undo:
            one()
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(options["profile"])
        pstats.Stats(profile).sort_stats("cumtime").print_stats(options["profile"])
    return figures(meter.steps) | {"tokens": tokens / max(1, passes)}


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each drafter, shape and dtype."""
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


def main() -> int:
    """Each run in each dtype, with each drafter and shape."""
    given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(sys.argv[1:]))
    options: dict[str, Any] = {**DEFAULTS, **given}
    if given.keys() - DEFAULTS.keys() or not options["runs"]:
        print(__doc__, file=sys.stderr)
        return 2
    import torch

    from trainer.assembly import quiet
    from trainer.assembly.chosen_drafter import drafter_of
    from trainer.assembly.trained import load_trained
    from trainer.decoding import trees
    from trainer.drafters import Drafter, Target
    from trainer.evaluation.questions import held_out_prompts

    quiet.quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = {
        "chain": trees.chain(options["chain"]),
        "tree": trees.eagle2(options["top_k"], options["depth"], options["tree"]),
    }
    rows: list[dict[str, Any]] = []
    for place, path in enumerate(options["runs"]):
        for dtype in options["dtypes"]:
            found = load_trained(path, device, fp32=dtype == "fp32")
            prompts, stops = held_out_prompts(found, options["prompts"])
            ids, target = (
                [torch.tensor(prompt, device=device) for prompt in prompts],
                Target(found.model),
            )
            names = ["run", *(["plain", *options["untrained"]] if place == 0 else [])]
            for name in names:
                drafter = (
                    None if name == "plain" else drafter_of(found, {"drafter": name, "small": None})
                )
                for shape in options["shapes"]:
                    # no shape is asked for
                    own = drafter is None or type(drafter).propose is not Drafter.propose
                    if own and shape != options["shapes"][0]:
                        continue
                    result = measured(target, drafter, ids, shapes[shape], stops, options)
                    rows.append(
                        result
                        | {
                            "drafter_ms": result["drafter"],
                            "drafter": type(drafter).__name__ if drafter is not None else "plain",
                            "shape": "own" if own else shape,
                            "dtype": str(found.model.dtype).removeprefix("torch."),
                        }
                    )
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
            del found, target
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
