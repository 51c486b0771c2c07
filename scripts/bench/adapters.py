"""Step time and peak memory of our LoRA, RoSA and sparse layers against stock PEFT's LoRA, SHiRA
and Super-Tuning.

    python -m scripts.bench.adapters [rank=16] [batch_size=4] [length=256] [steps=8] [repeats=3]
    [dtype=bfloat16] [base=smollm2_135m]
        [shape=null|1b|8b] [supervised=1.0] [methods=[...]] [fused=true] [gradient=auto]
        [device=cpu]

All have the same model, random tokens, loss (ours, logits in chunks) and optimiser, at equal
trainable parameters. Each runs in a new process, in turn. `shape` uses a Llama of that size with
random weights instead of a base, for a GPU. `supervised` is the share of positions that are
trained; `fused` is for ours, as in conf/config.yaml. Ratios are to the first of `methods`. Memory
is the peak above the memory after loading the model: activations, gradients, adapter and optimiser.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.options import parse
from scripts.bench.processes import worker, worker_arguments

DEFAULTS: dict[str, Any] = {
    "rank": 16,
    "batch_size": 4,
    "length": 256,
    "steps": 8,
    "repeats": 3,
    "dtype": "bfloat16",
    "base": "smollm2_135m",
    "shape": None,
    "supervised": 1.0,
    "fused": True,
    "gradient": "auto",
    "device": "cpu",
    "methods": [
        "peft_lora",
        "lora",
        "rosa",
        "sparse",
        "peft_supertuning",
        "peft_supra",
        "peft_shira",
    ],
}
SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def loaded(options: dict[str, Any]) -> Any:
    """Return the base model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainer.assembly import quiet
    from trainer.assembly.build import instantiate
    from trainer.config import compose

    quiet.quiet()
    dtype = getattr(torch, options["dtype"])
    if options["shape"] is not None:
        settings = LlamaConfig(
            vocab_size=32000, tie_word_embeddings=True, **SHAPES[options["shape"]]
        )
        with torch.device(options["device"]):
            torch.set_default_dtype(dtype)
            model = LlamaForCausalLM(settings)
            torch.set_default_dtype(torch.float32)
        return model
    plain: Any = OmegaConf.to_container(
        compose.compose([f"base={options['base']}", "task=viggo", "task.path=x"]), resolve=True
    )
    return instantiate(plain["base"]).load(dtype, device=torch.device(options["device"]))


def adapted(method: str, model: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return (the model to call, our adapter or None), with the parameters of a LoRA of `rank`."""
    import peft

    from adapters import mask
    from adapters.delta import Start
    from adapters.linear import features
    from adapters.sparse import layers
    from adapters.targets import targets
    from trainer.assembly.build import instantiate
    from trainer.config import compose

    sizes = [features(linear) for _, linear in targets(model, "all-linear")]
    rank = options["rank"]
    density = rank * sum(i + o for i, o in sizes) / sum(i * o for i, o in sizes)
    ours = {
        "lora": ["adapter=lora", f"adapter.rank={rank}"],
        "rosa": ["adapter=rosa", f"adapter.rank={rank // 2}", f"adapter.density={density / 2}"],
        "sparse": ["adapter=sparse", f"adapter.density={density}"],
    }
    if method in ours:
        extra = (
            []
            if method == "lora"
            else ["adapter.mask=random", f"adapter.gradient={options['gradient']}"]
        )
        plain: Any = OmegaConf.to_container(
            compose.compose([*ours[method], *extra, "task=viggo", "task.path=x"]), resolve=True
        )
        adapter = instantiate(plain["adapter"])
        model = adapter.attach(model, Start(steps=1000))
        for name, layer in layers(model):
            assert len(layer.delta.indices) == mask.entries(
                layer.delta.o, layer.delta.i, adapter.density, name
            )  # type: ignore[arg-type]
        return model, adapter
    configs: dict[str, Any] = {
        "peft_lora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"),
        "peft_supertuning": lambda: peft.SupertuningConfig(
            sparsity=1 - density, target_modules="all-linear"
        ),
        "peft_supra": lambda: peft.SupertuningConfig(
            sparsity=1 - density / 2, r=rank // 2, lora_alpha=rank // 2, target_modules="all-linear"
        ),
        "peft_shira": lambda: peft.ShiraConfig(
            r=rank, random_seed=0, target_modules=[n for n, _ in targets(model, "all-linear")]
        ),
    }
    return peft.get_peft_model(model, configs[method]()), None


class Peak(threading.Thread):
    """Measures the largest resident memory in MB while it runs. The process's maximum may be
    earlier."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.going = 0.0, True

    def run(self) -> None:
        while self.going:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.most = max(self.most, pages * resource.getpagesize() / 1e6)
            time.sleep(0.002)


def measured(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of each step, and the peak memory above the loaded model."""
    import torch

    from trainer.models.losses import CausalLoss
    from trainer.speed import fused, malloc

    torch.manual_seed(0)
    cuda = options["device"] == "cuda"
    model = loaded(options)
    before = (
        torch.cuda.memory_allocated() / 1e6
        if cuda
        else int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    )
    if options["fused"] and not method.startswith("peft_"):
        malloc.keep_freed()
        fused.fuse(model)
    model, adapter = adapted(method, model, options)
    model.train()
    loss_of = CausalLoss(model if adapter is not None else model.get_base_model(), 512)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    draw = torch.Generator().manual_seed(0)
    shape = (options["batch_size"], options["length"])
    ids = torch.randint(0, 32000, shape, generator=draw).to(options["device"])
    labels = torch.where(
        torch.rand(shape, generator=draw).to(ids.device) < options["supervised"], ids, -100
    )
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    peak, times = Peak(), []
    peak.start()
    for step in range(options["steps"]):
        started = time.perf_counter()
        summed, sums = loss_of({"input_ids": ids, "labels": labels})
        (summed / sums["tokens"]).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if adapter is not None:
            adapter.after_step(model, step + 2)
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak.going = False
    most = torch.cuda.max_memory_allocated() / 1e6 if cuda else peak.most
    ways = sorted(set(getattr(adapter, "ways", {}).values()))
    return {
        "steps": times[2:],
        "mb": most - before,
        "trained": sum(p.numel() for p in trained),
        "ways": ways,
        "loss": float(sums["loss"] / sums["tokens"]),
    }


def main() -> int:
    """Measure each method `repeats` times in turn; print a table of medians and of ratios to stock
    PEFT's LoRA."""
    options = parse(DEFAULTS, __doc__)
    if words := worker_arguments():
        name, out = words
        Path(out).write_text(json.dumps(measured(name, options)))
        return 0
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options["methods"]}
    for repeat in range(options["repeats"]):
        for name in options["methods"]:
            with tempfile.NamedTemporaryFile(suffix=".json") as out:
                worker("scripts.bench.adapters", name, out.name)
                results[name].append(json.loads(Path(out.name).read_text()))
            print(
                f"round {repeat + 1} {name}: {statistics.median(results[name][-1]['steps']):.3f} s"
                " a step",
                flush=True,
            )
    reference = options["methods"][0]
    medians = {
        name: [statistics.median(r["steps"]) for r in runs] for name, runs in results.items()
    }
    print(
        f"\n{'':17}{'trained':>11}{'step s':>9}{'/ ' + reference:>13}{'(rounds)':>24}"
        f"{'peak MB':>10}{'/':>7}  gradient"
    )
    memory = {name: statistics.median(r["mb"] for r in runs) for name, runs in results.items()}
    for name, values in medians.items():
        ratios = [a / b for a, b in zip(values, medians[reference], strict=True)]
        rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        first = results[name][0]
        print(
            f"{name:17}{first['trained']:11,}{statistics.median(values):9.3f}"
            f"{statistics.median(ratios):13.3f}{rounds:>24}{memory[name]:10.0f}"
            f"{memory[name] / memory[reference]:7.2f}  {'+'.join(first['ways'])}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
