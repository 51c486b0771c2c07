"""Settings that are right one by one and wrong together: each fault a line that says how to mend
it, found before torch is imported."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any


def combinations(c: dict[str, Any]) -> Iterator[str]:
    """Settings that are right one by one and wrong together. `c` is the plain config."""
    adapter = c["adapter"]["_target_"]
    task = c["task"]["_target_"]
    quantized = c["base"].get("quantization", "none") != "none"
    trains = adapter != "adapters.full.Nothing"
    if (
        (trains or c.get("drafter"))
        and c["max_epochs"] is None
        and c["max_steps"] is None
        and c["max_tokens"] is None
        and c["max_time"] is None
    ):
        yield "the run has no end: set one of max_epochs, max_steps, max_tokens, max_time"
    if adapter == "adapters.full.Full" and quantized:
        yield (
            "adapter=full trains the base's own weights, which quantisation has rounded: set"
            " base.quantization=none, or use an adapter"
        )
    if adapter == "adapters.spiel.SpIEL" and c["optimizer"]["_target_"] != "torch.optim.AdamW":
        yield (
            "adapter=spiel keeps an age for each entry, or SM3's sums, which other optimisers do"
            " not: set optimizer=adamw"
        )
    if c["packing"] and c["group_by_length"]:
        yield "packing=true already fills every sequence: set group_by_length=false"
    if c["packing"] and task.startswith("tasks.classification"):
        yield (
            "packing=true cannot be used for classification, which reads one label per sequence:"
            " set packing=false"
        )
    if c["task"].get("streaming"):
        if c["max_steps"] is None:
            yield (
                "task.streaming=true has no known length: set max_steps (max_epochs and max_tokens"
                " may stay)"
            )
        if c["max_epochs"] is not None and c["max_epochs"] % 1:
            yield (
                "task.streaming=true does not know where half an epoch ends:"
                f" max_epochs={c['max_epochs']} must be whole, or null"
            )
        for key in ("packing", "group_by_length"):
            if c[key]:
                yield (
                    f"task.streaming=true sees one row at a time, {key}=true needs them all: set"
                    f" {key}=false"
                )
        if c["workers"]:
            yield "task.streaming=true reads its rows in order, in one process: set workers=0"
        if c["task"]["eval_path"] is None and c["task"]["eval_fraction"] > 0:
            yield (
                "task.streaming=true cannot hold rows out: set task.eval_path, or"
                " task.eval_fraction=0"
            )
    if c["precision"] == "16-mixed":
        if c["lightning"]["accelerator"] == "cpu":
            yield (
                "precision=16-mixed needs a GPU: use precision=bf16-true or fp32 with"
                " lightning.accelerator=cpu"
            )
        if c["optimizer"].get("fused"):
            yield (
                "precision=16-mixed unscales gradients before they are clipped, which a fused"
                " optimiser does not allow: set optimizer.fused=false"
            )
    if c["fused"] == "liger" and c["lightning"]["accelerator"] == "cpu":
        yield "fused=liger is for a GPU with CUDA: set fused=true with lightning.accelerator=cpu"
    if c["compile"]:
        yield from _compile_combinations(c, trains, quantized)
    yield from _peft_combinations(c, quantized)
    yield from _schedule_combinations(c)
    yield from _cooldown_combinations(c)
    yield from _drafter_combinations(c, trains)
    drafter = (c.get("drafter") or {}).get("_target_", "")
    if drafter.endswith(".Registers") and c["penalty"]:
        yield (
            "drafter=registers puts tokens behind the rows' own, which penalty=deft would measure"
            " in their place: set penalty=none"
        )
    if drafter.endswith(".Registers") and not trains:
        yield (
            "drafter=registers only shapes what an adapter learns, and adapter=none has none:"
            " choose an adapter"
        )
    yield from _averaging_combinations(c)
    yield from _process_combinations(c, quantized)
    if schedule_free(c):
        yield from _schedule_free_combinations(c)


def _compile_combinations(c: dict[str, Any], trains: bool, quantized: bool) -> Iterator[str]:
    if not trains:
        yield (
            "compile=true compiles the layers that are trained, and adapter=none trains none: set"
            " compile=false"
        )
    if quantized:
        yield (
            "compile=true cannot compile the layers of a base with"
            f" base.quantization={c['base']['quantization']}: set compile=false"
        )
    if c["penalty"]:
        yield (
            "compile=true would hide the activations that penalty=deft measures: set compile=false"
        )
    if c["fused"] == "liger":
        yield "compile=true has not been tried with fused=liger: set fused=true, or compile=false"


def _drafter_combinations(c: dict[str, Any], trains: bool) -> Iterator[str]:
    drafter, target = c.get("drafter"), c.get("target") or {}
    if c["objective"]["_target_"] == "trainer.training.distill.Distill":
        if not drafter:
            yield (
                "objective=distill trains a drafter, and drafter=none is none: choose one, as in"
                " drafter=eagle3"
            )
        if trains:
            yield (
                "objective=distill trains the drafter only: set adapter=none (target.run=FOLDER is"
                " for the adapter of another run), or objective=finetune to train an adapter"
                " beside it"
            )
        if c["objective"]["gradient_checkpointing"]:
            yield (
                "objective=distill sends no gradient through the target: set"
                " objective.gradient_checkpointing=false"
            )
    if target.get("run") is not None and trains:
        yield f"target.run={target['run']} brings that run's adapter, frozen: set adapter=none"
    if target.get("draft") is not None and not drafter:
        yield (
            f"target.draft={target['draft']} is what a drafter starts from, and drafter=none is"
            " none: choose that drafter's own file"
        )
    if target.get("features") is not None:
        if c["objective"]["_target_"] != "trainer.training.distill.Distill":
            yield (
                "target.features holds the states of a frozen target, which only objective=distill"
                " trains on: set it, or leave them out"
            )
        if c["task"].get("streaming"):
            yield (
                "target.features holds the states of all rows, which task.streaming=true does not"
                " know: leave one of them out"
            )
        if c["precision"].endswith("-mixed"):
            yield (
                "target.features holds states in the target's own dtype, not in that of"
                f" precision={c['precision']}: use bf16-true or fp32"
            )
    evaluation = c["callbacks"].get("evaluation") or {}
    monitor, better = (
        str(evaluation.get("monitor")),
        ("accepted", "expected", "/top1", "/top5", "/acceptance"),
    )
    if drafter and monitor.endswith(better) and evaluation["mode"] == "min":
        yield (
            f"callbacks.evaluation.monitor={monitor} is better the more it is: set"
            " callbacks.evaluation.mode=max"
        )


def _schedule_combinations(c: dict[str, Any]) -> Iterator[str]:
    falls = {
        "schedule": c["schedule"],
        "branch": c.get("branch"),
        "callbacks.cooldown": c["callbacks"].get("cooldown"),
    }
    for place, node in falls.items():
        if node and node.get("shape") == "exponential" and node["final"] == 0:
            yield (
                f"{place}.shape=exponential never reaches zero, and {place}.final is 0: set"
                f" {place}.final=0.1, or another shape"
            )
    if c["schedule"]["_target_"] != "trainer.schedules.multistep.multistep":
        return
    milestones, factors = c["schedule"]["milestones"], c["schedule"]["factors"]
    if len(milestones) != len(factors):
        yield (
            f"schedule.milestones has {len(milestones)} entries and schedule.factors"
            f" {len(factors)}: each milestone needs the factor from there on"
        )
    if any(late <= early for early, late in itertools.pairwise(milestones)):
        yield f"schedule.milestones={milestones} do not rise: give them in their order"
    elif milestones and (milestones[0] < 1) != (milestones[-1] < 1):
        yield (
            f"schedule.milestones={milestones} mix fractions of the run with steps: give all below"
            " 1, or all in steps"
        )


def _cooldown_combinations(c: dict[str, Any]) -> Iterator[str]:
    branch, trigger = c.get("branch"), c["callbacks"].get("cooldown")
    if branch and c["max_steps"] != branch["step"] + branch["steps"]:
        yield (
            f"max_steps={c['max_steps']} is not branch.step + branch.steps ="
            f" {branch['step'] + branch['steps']}, where the cooldown ends: python -m"
            " trainer.cooldown sets both"
        )
    if branch and trigger:
        yield (
            "a branch cools down from its first step, so callbacks.cooldown has nothing to start:"
            " leave it out"
        )
    if branch and c["task"].get("streaming"):
        yield "a branch needs rows whose order is known, which task.streaming=true does not give"
    if trigger and not c["schedule"]["_target_"].endswith(
        (".constant", ".cooldown", ".inverse_sqrt")
    ):
        yield (
            "callbacks.cooldown starts a fall of the rate, and this schedule falls by itself: set"
            " schedule=constant"
        )
    if (
        trigger
        and trigger["patience"] is not None
        and not (c["callbacks"].get("evaluation") or {}).get("every")
    ):
        yield (
            "callbacks.cooldown.patience counts evaluations, and there are none during training:"
            " set callbacks.evaluation.every"
        )
    if (
        trigger
        and trigger["deadline"] == "max_time"
        and (c["max_time"] is None or c["max_time"] <= trigger["reserve"])
    ):
        yield (
            "callbacks.cooldown.deadline=max_time needs a max_time above"
            f" callbacks.cooldown.reserve={trigger['reserve']:g} minutes; it is"
            f" {c['max_time'] or 'null'}"
        )
    schedule, steps = c["schedule"], c["max_steps"]
    if (
        c["max_time"] is not None
        and steps is None
        and c["max_epochs"] is None
        and c["max_tokens"] is None
    ):
        open_ended = schedule["_target_"].endswith((".constant", ".inverse_sqrt"))
        if not open_ended or 0 < schedule["warmup"] < 1:
            yield (
                "a run that ends by max_time alone has no known number of steps, which this"
                " schedule's rates are fractions of: set schedule=constant schedule.warmup=20 (in"
                " steps), and callbacks=[default,cooldown] callbacks.cooldown.deadline=max_time for"
                " a cooldown at its end"
            )
    planned = [schedule[key] for key in ("warmup", "cooldown") if schedule.get(key) is not None]
    if (
        not branch
        and steps is not None
        and sum(value if value >= 1 else value * steps for value in planned) > steps
        and len(planned) > 1
    ):
        yield (
            f"schedule.warmup={planned[0]} and schedule.cooldown={planned[1]} take more than the"
            f" run's {steps} steps: give fewer, or fractions of the run"
        )


def _averaging_combinations(c: dict[str, Any]) -> Iterator[str]:
    averaging = c["callbacks"].get("averaging")
    if not averaging:
        return
    if c["adapter"]["_target_"] == "adapters.spiel.SpIEL":
        yield (
            "callbacks.averaging would average entries of adapter=spiel that stand for other"
            " positions from one selection to the next: leave it out"
        )
    if c["adapter"].get("peft_type") == "ADALORA":
        yield (
            "callbacks.averaging would bring back ranks that adapter=adalora has taken away: leave"
            " it out"
        )
    if schedule_free(c):
        yield "optimizer=schedulefree averages its weights itself: leave callbacks.averaging out"
    if c["max_steps"] is not None and averaging["start"] >= max(1, c["max_steps"]):
        yield (
            f"callbacks.averaging.start={averaging['start']} is not before the end of"
            f" max_steps={c['max_steps']}: give fewer steps, or a fraction of the run"
        )


def several(lightning: dict[str, Any]) -> bool:
    """Whether conf/lightning's settings ask for several processes, as far as they say so by
    themselves."""
    devices = lightning["devices"]
    count = (
        devices if isinstance(devices, int) else len(devices) if isinstance(devices, list) else 0
    )
    return (
        lightning["num_nodes"] > 1
        or count > 1
        or (isinstance(devices, str) and devices not in ("1", "auto"))
    )


def _process_combinations(c: dict[str, Any], quantized: bool) -> Iterator[str]:
    adapter, strategy = c["adapter"], c["lightning"]["strategy"]
    if strategy.startswith("deepspeed"):
        yield (
            f"lightning.strategy={strategy}: DeepSpeed writes checkpoints of its own, a folder for"
            " each with what every process has, which no run here could be resumed, exported or"
            " checked from: set lightning.strategy=ddp, or fsdp2 to share the weights out"
        )
    elif strategy.startswith("fsdp") and strategy != "fsdp2":
        yield (
            f"lightning.strategy={strategy} is torch's first FSDP, which makes one flat tensor of"
            " trained and frozen weights: set lightning.strategy=fsdp2"
        )
    elif strategy not in ("auto", "ddp", "fsdp2"):
        yield (
            f"lightning.strategy={strategy} has not been tried with checkpoints and adapters of"
            " this kind: set it to auto, ddp or fsdp2"
        )
    if several(c["lightning"]):
        if (
            adapter["_target_"] == "adapters.rosa.RoSAAdapter"
            and adapter["scores"] != "exact"
            and adapter["mask"] == "gradient"
        ):
            yield (
                f"adapter.scores={adapter['scores']} is for one process: several have other"
                " candidates. Set adapter.scores=exact"
            )
        if (
            adapter["_target_"] == "adapters.spiel.SpIEL"
            and adapter["variant"] == "AG"
            and adapter["accumulation_steps"] < 2
        ):
            yield (
                "with several processes the first step of a window finds candidates: set"
                " adapter.accumulation_steps=2"
            )
    if strategy == "fsdp2":
        yield from _fsdp2_combinations(c, quantized)


def _fsdp2_combinations(c: dict[str, Any], quantized: bool) -> Iterator[str]:
    end = ": set lightning.strategy=ddp"
    adapter, name = c["adapter"]["_target_"], c["adapter"]["_target_"].rpartition(".")[2]
    if not several(c["lightning"]):
        yield (
            "lightning.strategy=fsdp2 shares weights out among processes, and there is one: set"
            " lightning.devices or lightning.num_nodes"
        )
    if quantized:
        yield (
            "lightning.strategy=fsdp2 divides weights, and those of"
            f" base.quantization={c['base']['quantization']} are blocks with constants that belong"
            f" to each other{end}"
        )
    if adapter in ("adapters.rosa.RoSAAdapter", "adapters.spiel.SpIEL"):
        yield (
            f"lightning.strategy=fsdp2 divides the base's weights, into which {name} writes single"
            f" entries{end}"
        )
    elif adapter == "adapters.peft.Peft":
        yield (
            "lightning.strategy=fsdp2 is for adapter=lora (rslora, loraplus), full and none;"
            f" PEFT's methods have not been tried{end}"
        )
    if c["penalty"]:
        yield (
            "penalty=deft reads activations in an order that lightning.strategy=fsdp2 does not"
            f" keep to{end}"
        )
    if c["callbacks"].get("averaging"):
        yield (
            "callbacks.averaging keeps whole weights, and lightning.strategy=fsdp2 has shares of"
            f" them{end}, or leave it out"
        )
    if not c["callbacks"].get("checkpoints"):
        yield (
            "with lightning.strategy=fsdp2 the result is put together from the last checkpoint,"
            f" and callbacks.checkpoints is null{end}"
        )
    if not c["optimizer"]["_target_"].startswith("torch.optim."):
        yield (
            f"lightning.strategy=fsdp2 divides moments, which {c['optimizer']['_target_']} does not"
            " know: set optimizer=adamw"
        )
    if c["precision"] == "16-mixed":
        yield (
            f"lightning.strategy=fsdp2 has not been tried with precision=16-mixed{end}, or"
            " precision=bf16-true or fp32"
        )
    if c["fused"] == "liger":
        yield f"lightning.strategy=fsdp2 has not been tried with fused=liger{end}, or fused=true"
    if c["compile"]:
        yield (
            f"lightning.strategy=fsdp2 has not been tried with compile=true{end}, or compile=false"
        )
    drafter = (c.get("drafter") or {}).get("_target_", "").rpartition(".")[2]
    if drafter and (drafter == "Registers" or adapter == "adapters.full.Full"):
        what = "drafter=registers" if drafter == "Registers" else "a drafter beside adapter=full"
        yield f"lightning.strategy=fsdp2 has not been tried with {what}{end}"
    if (c.get("target") or {}).get("features") is not None or (c.get("target") or {}).get(
        "run"
    ) is not None:
        yield (
            "lightning.strategy=fsdp2 has not been tried with a target of another run or its"
            f" features{end}"
        )


def schedule_free(c: dict[str, Any]) -> bool:
    """Whether a plain config's optimiser is one of the package schedulefree."""
    return c["optimizer"]["_target_"].startswith("schedulefree.")


def _schedule_free_combinations(c: dict[str, Any]) -> Iterator[str]:
    if c["schedule"]["_target_"] != "trainer.schedules.constant.constant":
        yield (
            "optimizer=schedulefree averages its weights instead of lowering the rate: set"
            " schedule=constant"
        )
    if c.get("branch"):
        yield (
            "optimizer=schedulefree needs no cooldown, so there is nothing to branch off for: set"
            " branch=none"
        )
    if c["callbacks"].get("cooldown"):
        yield "optimizer=schedulefree needs no cooldown: leave callbacks.cooldown out"
    adapter = c["adapter"]
    if adapter.get("peft_type") == "ADALORA":
        yield (
            "adapter=adalora takes ranks away, which optimizer=schedulefree's average brings back:"
            " set optimizer=adamw"
        )
    if (
        adapter.get("restart_after_mask")
        and adapter["schedule"] == "wl"
        and adapter["mask"] == "gradient"
    ):
        yield (
            "adapter.restart_after_mask=true starts anew what optimizer=schedulefree averages over"
            " the whole run: set it to false, or optimizer=adamw"
        )
    full = adapter["_target_"] == "adapters.full.Full"
    low = [f"adapter.{key}" for key in ("dtype", "sparse_dtype") if adapter.get(key) == "bfloat16"]
    low += ["precision"] if full and c["precision"] == "bf16-true" else []
    low += ["base.dtype"] if full and c["base"]["dtype"] in ("bfloat16", "float16") else []
    for key in low:
        yield (
            f"optimizer=schedulefree averages the trained weights in their own dtype, and {key} is"
            " too coarse for that: use fp32"
        )


def _peft_combinations(c: dict[str, Any], quantized: bool) -> Iterator[str]:
    if c["adapter"]["_target_"] != "adapters.peft.Peft" or c["adapter"]["peft_type"] == "???":
        return
    from adapters import peft_fields

    classification = c["task"]["_target_"].startswith("tasks.classification")
    yield from peft_fields.problems(
        c["adapter"],
        quantized,
        c["packing"],
        classification,
        c["objective"]["gradient_checkpointing"],
    )
