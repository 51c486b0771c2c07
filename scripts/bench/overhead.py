"""The cost of our fit over a bare PyTorch loop, and compared with Hugging Face's Trainer with stock
PEFT. All have the same model, rows, batches, adapter, optimiser and precision. Each runs in a new
process, in turn.

    python -m scripts.bench.overhead [steps=14] [warm=4] [repeats=3] [batch_size=8] [precision=auto]
    [experiment=quickstart]

Prints the median step of each and the ratios pair by pair. The rows are the quickstart's, whose
prompts are long and answers short. ours: the program, with its journal and progress. bare: our
model and loss in a plain loop. hf: Trainer + LoraConfig.
"""

from __future__ import annotations

import itertools
import json
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
    "steps": 14,
    "warm": 4,
    "repeats": 3,
    "batch_size": 8,
    "precision": "auto",
    "experiment": "quickstart",
    "extra": [],
}


def overrides(options: dict[str, Any]) -> list[str]:
    """Return the overrides of the measured run: training only."""
    return [
        f"+experiment={options['experiment']}",
        f"max_steps={options['steps']}",
        f"batch_size={options['batch_size']}",
        f"precision={options['precision']}",
        "callbacks.evaluation=null",
        "callbacks.checkpoints=null",
        "logger=none",
        *options["extra"],
    ]


def ours(options: dict[str, Any]) -> dict[str, Any]:
    """Run the program in this process. Return step times from its journal."""
    with tempfile.TemporaryDirectory() as runs:
        words = [*overrides(options), f"runs={runs}"]
        sys.argv = ["trainer", *words]
        from trainer.__main__ import run_words

        if code := run_words(words):
            sys.exit(code)
        rows = [
            json.loads(line)
            for line in (
                (Path(runs) / options["experiment"] / "metrics.jsonl").read_text().splitlines()
            )
        ]
    rows = [row for row in rows if row["kind"] == "step"]
    seconds = [row["seconds"] for row in rows]
    return {
        "steps": [after - before for before, after in itertools.pairwise(seconds)],
        "losses": [row["loss"] for row in rows],
    }


def prepared(
    options: dict[str, Any], masks: bool = False
) -> tuple[dict[str, Any], Any, Any, list[dict[str, Any]]]:
    """Return (config, base, dtype, the run's batches) for the other loops."""
    from trainer.assembly import quiet
    from trainer.assembly import rows as rows_module
    from trainer.assembly.build import instantiate
    from trainer.config import compose
    from trainer.models.precision import compute

    quiet.quiet()
    plain: dict[str, Any] = OmegaConf.to_container(
        compose.compose(overrides(options)), resolve=True
    )  # type: ignore[assignment]
    base = instantiate(plain["base"])
    data = rows_module.load_data(plain, base, instantiate(plain["task"]))
    plan = rows_module.batch_order(plain, data, 1)
    data.collate.labelled = masks  # which makes attention masks too
    assert data.train is not None
    picks = [batch for step in range(options["steps"]) for batch in plan.micro_batches(step)]
    batches = [data.collate([data.train[pick] for pick in batch]) for batch in picks]
    dtype, _, _ = compute(plain["precision"], plain["base"]["dtype"], False, False)
    return plain, base, dtype, batches


def bare(options: dict[str, Any]) -> dict[str, Any]:
    """Train the same model with the same loss in a plain loop."""
    import torch

    from adapters.delta import Start
    from trainer.assembly.build import instantiate
    from trainer.models.losses import CausalLoss

    plain, base, dtype, batches = prepared(options)
    torch.manual_seed(plain["seed"])
    model = instantiate(plain["adapter"]).attach(base.load(dtype), Start()).train()
    loss_of = CausalLoss(model, plain["objective"]["logits_chunk"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=plain["optimizer"]["lr"], weight_decay=0.0, fused=True
    )
    times, losses = [], []
    for batch in batches:
        started = time.perf_counter()
        summed, sums = loss_of(batch)
        (summed / batch["window_tokens"]).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(sums["loss"]) / int(sums["tokens"]))
        times.append(time.perf_counter() - started)
    return {"steps": times[1:], "losses": losses}


def hf(options: dict[str, Any]) -> dict[str, Any]:
    """Train with Hugging Face's Trainer and stock PEFT's LoRA, on the same batches."""
    import peft
    import torch
    import transformers

    plain, base, dtype, batches = prepared(options, masks=True)
    torch.manual_seed(plain["seed"])
    lora = plain["adapter"]
    settings = peft.LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base.load(dtype), settings)
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - self.started)

    rows = [
        {key: batch[key] for key in ("input_ids", "labels", "attention_mask")} for batch in batches
    ]
    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(
            out,
            per_device_train_batch_size=1,
            max_steps=len(rows),
            learning_rate=plain["optimizer"]["lr"],
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_num_workers=0,
        )
        trainer_ = transformers.Trainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=lambda items: items[0],
            callbacks=[Clock()],
        )
        trainer_.get_train_dataloader = lambda: torch.utils.data.DataLoader(rows, batch_size=None)  # type: ignore[method-assign]
        trainer_.train()
        losses = [entry["loss"] for entry in trainer_.state.log_history if "loss" in entry]
    return {"steps": times[1:], "losses": losses}


CONTESTANTS = {"ours": ours, "bare": bare, "hf": hf}


def main() -> int:
    """Run each contestant `repeats` times in turn, and print medians and ratios."""
    options = parse(DEFAULTS, __doc__)
    if words := worker_arguments():
        name, out = words
        import resource

        result = CONTESTANTS[name](options)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        Path(out).write_text(json.dumps(result | {"peak_mb": peak}))
        return 0
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for repeat in range(options["repeats"]):
        for name in CONTESTANTS:
            with tempfile.NamedTemporaryFile(suffix=".json") as out:
                worker("scripts.bench.overhead", name, out.name)
                results[name].append(json.loads(Path(out.name).read_text()))
            median = statistics.median(results[name][-1]["steps"][options["warm"] - 1 :])
            print(
                f"round {repeat + 1} {name}: {median:.3f} s a step, last loss"
                f" {results[name][-1]['losses'][-1]:.4f}",
                flush=True,
            )
    medians = {
        n: [statistics.median(r["steps"][options["warm"] - 1 :]) for r in runs]
        for n, runs in results.items()
    }
    print(f"\n{'':6}{'step s':>9}{'min':>9}{'max':>9}{'peak MB':>10}{'last loss':>11}")
    for name, values in medians.items():
        peak = statistics.median(r["peak_mb"] for r in results[name])
        loss = results[name][-1]["losses"][-1]
        print(
            f"{name:6}{statistics.median(values):9.3f}{min(values):9.3f}{max(values):9.3f}{peak:10.0f}{loss:11.4f}"
        )
    for other in ("bare", "hf"):
        ratios = [a / b for a, b in zip(medians["ours"], medians[other], strict=True)]
        print(
            f"ours / {other}: {statistics.median(ratios):.3f} "
            f" ({', '.join(f'{ratio:.3f}' for ratio in ratios)})"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
