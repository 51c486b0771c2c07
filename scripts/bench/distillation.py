"""Training a draft head on a frozen target: ours against a straightforward implementation with all
logits.

    python -m scripts.bench.distillation [drafters=[eagle3,medusa]] [supervised=[1.0,0.5]]
        [batch_size=2] [length=512] [steps=3] [repeats=3] [base=smollm2_135m] [precision=auto]
        [extra=[drafter.draft_vocab_size=8192]] [threads=1] [device=cpu] [json=FILE]

Both start from the same weights and train on the same batches of random tokens with the same AdamW.
`supervised` is the share of each row, at its end, that is trained. Each side runs in a new process,
in turn; the ratios are of pairs. Sides:

    ours    objective=distill: trainer.training.distill.DraftLoss with the program's settings
    plain   the same forward passes, then softmax over the teacher's logits of all positions
            (eagle3), logits of all positions for each offset, and the loss by autograd:
            cross-entropy with the teacher's distribution renormalised over the draft vocabulary
            (eagle3), or with the tokens (medusa)
    kept    plain with the program's setting of malloc (trainer.speed.malloc), which is not part of
            the method

plain only counts correct best guesses; ours also counts the five best, acceptance and runs of
correct guesses. A step is forward, backward and optimiser; the first one is not counted. The loss
is the mean over all steps, which must agree.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.options import parse
from scripts.bench.processes import worker, worker_arguments

DEFAULTS: dict[str, Any] = {
    "drafters": ["eagle3", "medusa"],
    "supervised": [1.0, 0.5],
    "batch_size": 2,
    "length": 512,
    "steps": 3,
    "repeats": 3,
    "base": "smollm2_135m",
    "precision": "auto",
    "extra": [],
    "threads": 1,
    "device": "cpu",
    "json": None,
    "sides": ["plain", "ours"],
    "profile": False,
}


def prepared(options: dict[str, Any], drafter: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return (model, drafter, config) with the frozen target on its device."""
    import torch

    from trainer.assembly import quiet
    from trainer.assembly.build import instantiate
    from trainer.config import compose
    from trainer.models import precision

    quiet.quiet()
    own = [
        word for word in options["extra"] if not word.startswith("drafter.") or drafter == "eagle3"
    ]
    words = [
        f"base={options['base']}",
        "adapter=none",
        f"drafter={drafter}",
        "objective=distill",
        f"precision={options['precision']}",
    ]
    plain: Any = OmegaConf.to_container(
        compose.compose([*words, "task.path=x", *own]), resolve=True
    )
    device = torch.device(options["device"])
    dtype, _, _ = precision.compute(
        plain["precision"], plain["base"]["dtype"], False, device.type == "cuda"
    )
    torch.manual_seed(plain["seed"])
    model = instantiate(plain["base"]).load(dtype, None, device).eval().requires_grad_(False)
    head = instantiate(plain["drafter"])(model=model).to(device).train()
    vocabulary = model.get_output_embeddings().weight.shape[0]
    # the draft vocabulary is of the smallest ids
    head.calibrate(lambda: 10**12 // torch.arange(1, vocabulary + 1) ** 2)
    return model, head, plain


def batches(options: dict[str, Any], vocabulary: int, share: float) -> list[dict[str, Any]]:
    """Return the steps' batches."""
    import torch

    draw = torch.Generator().manual_seed(1)
    picks = []
    for _ in range(options["steps"] + 1):
        ids = torch.randint(
            10, vocabulary, (options["batch_size"], options["length"]), generator=draw
        )
        labels = ids.clone()
        labels[:, : masked(options["length"], share)] = -100
        picks.append(
            {"input_ids": ids.to(options["device"]), "labels": labels.to(options["device"])}
        )
    return picks


def masked(length: int, share: float) -> int:
    """Count the positions at a row's start that are not trained; the first token never is."""
    return max(1, length - round(length * share))


class Plain:
    """The drafter's loss with all logits."""

    def __init__(self, model: Any, drafter: Any):
        from trainer.drafters import Target
        from trainer.training.distill import DraftLoss

        self.target = Target(model)
        self.drafter = drafter
        self.forward = DraftLoss(model, 512, drafter, self.target).forward

    def __call__(self, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        import torch
        from torch.nn import functional as F

        from trainer.drafters.distilled import Distilled

        drafter, target = self.drafter, self.target
        with torch.no_grad():
            hidden, features, extra = self.forward(batch)
            positions = torch.arange(hidden.shape[1], device=hidden.device).expand_as(
                batch["input_ids"]
            )
            teacher = (
                target.head(hidden).float().softmax(-1) if isinstance(drafter, Distilled) else None
            )
        output = drafter.output_type(
            hidden, batch["input_ids"], batch["labels"], positions, extra, features
        )
        total, right = hidden.new_zeros((), dtype=torch.float32), 0
        if teacher is not None:
            best, vocabulary = teacher.argmax(-1), drafter.vocabulary
            inside = (
                torch.ones_like(best, dtype=torch.bool)
                if vocabulary is None
                else torch.isin(best, vocabulary)
            )
            if vocabulary is not None:
                teacher = teacher[..., vocabulary]
                teacher = teacher / teacher.sum(-1, keepdim=True)
        for k, states in enumerate(drafter.states(output, target), 1):
            # of the token that offset k predicts
            labels = F.pad(batch["labels"][:, k + 1 :], (0, k + 1), value=-100)
            counted = labels != -100
            if teacher is None:
                logits = drafter.head_of(k, target)[0](states).float()
                each = F.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
                ).view_as(labels)
                right = right + ((logits.argmax(-1) == labels) & counted).sum()
            else:
                log_q = drafter.draft_heads(target)[0](states).float().log_softmax(-1)
                p = F.pad(teacher[:, k:], (0, 0, 0, k))
                each = -(p * log_q).sum(-1)
                counted = counted & F.pad(inside[:, k:], (0, k))
                guesses = log_q.argmax(-1)
                guesses = guesses if vocabulary is None else vocabulary[guesses]
                right = right + ((guesses == F.pad(best[:, k:], (0, k))) & counted).sum()
            total = total + drafter.weights[k - 1] * (each * counted).sum()
        return total, {"loss": total.detach(), "right": right}


def case(options: dict[str, Any], side: str, drafter: str, share: float) -> dict[str, Any]:
    """Measure one side in this process."""
    import torch

    from scripts.bench.growth import memory

    torch.set_num_threads(options["threads"])
    if side != "plain":
        from trainer.speed.malloc import keep_freed

        keep_freed()  # as the program does
    model, head, plain = prepared(options, drafter)
    if side == "ours":
        from trainer.drafters import Target
        from trainer.training.distill import DraftLoss

        loss_of: Any = DraftLoss(model, plain["objective"]["logits_chunk"], head, Target(model))
    else:
        loss_of = Plain(model, head)
    trained = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step(batch: dict[str, Any]) -> tuple[float, int]:
        loss, _ = loss_of(batch)
        count = int((batch["labels"][:, 1:] != -100).sum())
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()) / count, batch["labels"].numel()

    made_batches = batches(options, model.get_output_embeddings().weight.shape[0], share)
    before = memory(options["device"], reset=True)
    times, losses = [], []
    for batch in made_batches:
        started = time.perf_counter(), time.process_time()
        loss, tokens = step(batch)
        if options["device"] != "cpu":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        losses.append(loss)
    peak = memory(options["device"], reset=False) - before
    if options["profile"]:
        with torch.profiler.profile() as profile:
            step(made_batches[0])
        print(
            profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25),
            file=sys.stderr,
        )
    wall, processor = (statistics.median(values) for values in zip(*times[1:], strict=True))
    return {
        "seconds": wall,
        "cpu_seconds": processor,
        "tokens": tokens,
        "peak_bytes": peak,
        "losses": losses,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return for each drafter and share the ratios of ours over the other sides, and the
    differences of the losses."""
    lines = []
    for key in dict.fromkeys((row["drafter"], row["supervised"]) for row in rows):
        sides: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if (row["drafter"], row["supervised"]) == key:
                sides.setdefault(row["side"], []).append(row)
        for other in (side for side in sides if side != "ours"):
            pairs = list(zip(sides.get("ours", []), sides[other], strict=False))
            if not pairs:
                continue
            speed = [b["cpu_seconds"] / a["cpu_seconds"] for a, b in pairs]
            wall = [b["seconds"] / a["seconds"] for a, b in pairs]
            peak = [a["peak_bytes"] / b["peak_bytes"] for a, b in pairs]
            apart = max(
                abs(x / y - 1)
                for a, b in pairs
                for x, y in zip(a["losses"], b["losses"], strict=True)
            )
            lines.append(
                f"{key[0]}, {key[1]:.0%} supervised: ours / {other}, tokens a second"
                f" {statistics.median(speed):.2f} by processor time"
                f" ({', '.join(f'{ratio:.2f}' for ratio in speed)}), {statistics.median(wall):.2f}"
                f" by wall clock; peak {statistics.median(peak):.2f}; losses apart by at most"
                f" {apart:.1e}"
            )
    return lines


def main() -> int:
    """Measure each case in turn, and print a table."""
    options = parse(DEFAULTS, __doc__)
    if arguments := worker_arguments():
        side, drafter, share, file = arguments
        Path(file).write_text(json.dumps(case(options, side, drafter, float(share))))
        return 0
    rows: list[dict[str, Any]] = []
    print(
        f"{options['threads']} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f},"
        f" {options['device']}\n"
    )
    print(
        f"{'drafter':8}{'supervised':>11} "
        f" {'side':6}{'cpu s/step':>11}{'s/step':>8}{'tokens/s':>10}{'peak MB':>9}  {'losses'}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for _, drafter, share, side in itertools.product(
            range(options["repeats"]), options["drafters"], options["supervised"], options["sides"]
        ):
            words = side, drafter, str(share), f"{folder}/case.json"
            done = worker("scripts.bench.distillation", *words)
            row = {"drafter": drafter, "supervised": share, "side": side} | json.loads(
                Path(folder, "case.json").read_text()
            )
            rows.append(row)
            print(
                f"{drafter:8}{share:11.0%}  {side:6}{row['cpu_seconds']:11.2f}{row['seconds']:8.2f}"
                f"{row['tokens'] / row['cpu_seconds']:10.1f}{row['peak_bytes'] / 1e6:9.0f}"
                f"  {' '.join(f'{loss:.5f}' for loss in row['losses'])}",
                flush=True,
            )
            if options["profile"]:
                print(done.stderr)
    print("\n" + "\n".join(summary(rows)) + f"\n{rows[-1]['dtype']}; tokens/s by processor time")
    if options["json"] is not None:
        Path(options["json"]).write_text(
            json.dumps({"options": options, "rows": rows}, indent=1) + "\n", "utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
