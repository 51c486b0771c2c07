"""The time and memory of a training step: time by operation, and the tensors that are saved for the
backward pass.

    python -m scripts.bench.profile [batch_size=4] [length=256] [supervised=1.0] [steps=4] [rows=20]
    [overrides=[...]] [threads=null]
        [device=cpu] [base=smollm2_135m]

The run's own model, adapter and loss on random tokens; `overrides` go to the config (adapter=rosa,
precision=fp32). `supervised` is the share of each row, its end, that is trained. It prints the
median step with its parts and what the machine's products and copies would allow, the operations
that take most of the processor's own time, and the tensors that wait for the backward pass, by the
module that made them.
"""

from __future__ import annotations

import collections
import statistics
import time
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.options import parse

DEFAULTS: dict[str, Any] = {
    "batch_size": 4,
    "length": 256,
    "supervised": 1.0,
    "steps": 4,
    "rows": 20,
    "overrides": [],
    "threads": None,
    "device": "cpu",
    "base": "smollm2_135m",
}


def prepared(options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Return (training module, optimiser, batch)."""
    import torch

    from adapters.delta import Start
    from trainer.assembly import quiet
    from trainer.assembly.build import instantiate
    from trainer.config import compose
    from trainer.models import precision
    from trainer.speed import attention_choice, elementwise_choice, fused, liger, malloc

    quiet.quiet()
    words = [f"base={options['base']}", "task=completion", "task.path=x", *options["overrides"]]
    plain: Any = OmegaConf.to_container(compose.compose(words), resolve=True)
    device = torch.device(options["device"])
    described, adapter = instantiate(plain["base"]), instantiate(plain["adapter"])
    dtype, _, _ = precision.compute(
        plain["precision"], plain["base"]["dtype"], False, device.type == "cuda"
    )
    torch.manual_seed(plain["seed"])
    model = described.load(dtype, None, device)
    if plain["fused"]:
        malloc.keep_freed()
        shape = attention_choice.shape_of(model.config.get_text_config(), dtype)
        choice = None
        if shape is not None and device.type == "cpu":
            setting = plain["cpu_attention"]
            choice = attention_choice.choose(setting, shape, options["length"])
        if choice is not None:
            print(f"attention: {choice.describe()}")
        own = plain["fused"] != "liger"
        shape = elementwise_choice.shape_of(model.config.get_text_config(), dtype)
        parts = None
        if shape is not None and device.type == "cpu":
            parts = elementwise_choice.choose(plain["cpu_elementwise"], shape)
        if parts is not None:
            print(f"elementwise: {parts.describe()}")
        native = parts.kinds if parts is not None else ()
        print(f"fused: {fused.fuse(model, choice, native) if own else liger.put_in(model)}")
    model = adapter.attach(model, Start())
    drafter = None
    if make := instantiate(plain["drafter"]):
        drafter = make(model=model)
        drafter.calibrate(lambda: torch.arange(model.config.vocab_size))
    module = instantiate(plain["objective"])(
        model=model,
        adapter=adapter,
        optimizer=instantiate(plain["optimizer"]),
        schedule=lambda *_, **__: 1.0,
        steps=1,
        labelled=False,
        accumulate=1,
        seed=0,
        drafter=drafter,
    )
    return module.train(), module.configure_optimizers(), random_batch(model, options, device)


def random_batch(model: Any, options: dict[str, Any], device: Any) -> dict[str, Any]:
    """Return random tokens, of which the end of each row is trained."""
    import torch

    B, T = options["batch_size"], options["length"]
    ids = torch.randint(
        10, model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(1)
    ).to(device)
    labels = ids.clone()
    labels[:, : T - round(T * options["supervised"])] = -100
    return {"input_ids": ids, "labels": labels}


def step(
    module: Any, optimizer: Any, batch: dict[str, Any], times: dict[str, list[float]] | None = None
) -> None:
    """Run one step, and add the seconds of its parts to `times`."""
    import torch

    def part(name: str, since: float) -> float:
        if batch["input_ids"].is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if times is not None:
            times.setdefault(name, []).append(now - since)
        return now

    began = at = time.perf_counter()
    loss, sums = module.loss(batch)
    at = part("forward and loss", at)
    (loss / sums["tokens"]).backward()
    at = part("backward", at)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    part("clip and optimiser", at)
    part("step", began)


def saved_tensors(module: Any, batch: dict[str, Any]) -> list[tuple[int, str, str]]:
    """(bytes, the module that made it, shape and dtype) of what is there after a forward pass and
    was not before, each storage once.

    What autograd's hooks for saved tensors see would leave out what checkpoints keep.
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    weights = {
        tensor.untyped_storage()._cdata for tensor in [*module.parameters(), *module.buffers()]
    }
    inside: list[str] = []
    results: dict[int, tuple[StorageWeakRef, tuple[int, str, str]]] = {}

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in tree_iter(out):
                if (
                    isinstance(tensor, torch.Tensor)
                    and (storage := tensor.untyped_storage())._cdata not in weights
                ):
                    entry = (
                        storage.nbytes(),
                        inside[-1] if inside else "",
                        f"{tuple(tensor.shape)} {tensor.dtype}",
                    )
                    results[storage._cdata] = StorageWeakRef(storage), entry
            return out

    handles = []
    for _, child in module.model.named_modules():
        handles.append(
            child.register_forward_pre_hook(lambda m, *_: inside.append(type(m).__name__))
        )
        handles.append(child.register_forward_hook(lambda *_: inside.pop() and None))
    with Noted():
        loss = module.loss(batch)  # its graph holds the saved tensors
    for handle in handles:
        handle.remove()
    saved = [entry for storage, entry in results.values() if not storage.expired()]
    del loss
    return saved


def limits(module: Any, batch: dict[str, Any]) -> tuple[float, float, float]:
    """(FLOP/s of the machine in products of such a model, bytes a second of a large copy, FLOP of a
    step by the formula of trainer.models.flops)."""
    import torch

    from trainer.models.flops import count

    model, ids = module.model, batch["input_ids"]
    config = model.config.get_text_config()
    weight = torch.randn(config.intermediate_size, config.hidden_size, device=ids.device).to(
        model.dtype
    )
    x = torch.randn(ids.numel(), config.hidden_size, device=ids.device).to(model.dtype)
    large = torch.empty(256 << 20, dtype=torch.uint8, device=ids.device)

    def least(call: Any) -> float:
        seconds = []
        for _ in range(8):
            started = time.perf_counter()
            call()
            if ids.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    supervised = int((batch["labels"][:, 1:] != -100).sum())
    flop = count(model).flop(ids.numel(), supervised, [ids.shape[1]] * len(ids))
    rate = 2 * x.numel() * config.intermediate_size / least(lambda: x @ weight.t())
    return rate, 2 * large.numel() / least(lambda: large.clone()), flop


def main() -> int:
    """Print the tables."""
    options = parse(DEFAULTS, __doc__)
    import torch

    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    module, optimizer, batch = prepared(options)
    step(module, optimizer, batch)
    times: dict[str, list[float]] = {}
    for _ in range(options["steps"]):
        step(module, optimizer, batch, times)
    whole = statistics.median(times["step"])
    print(
        f"{batch['input_ids'].numel() / whole:.0f} tokens/s; median seconds of {options['steps']}"
        " steps"
    )
    for name, seconds in times.items():
        print(
            f"  {name:20}{statistics.median(seconds):8.3f} "
            f" {statistics.median(seconds) / whole:6.1%}"
        )

    rate, bandwidth, flop = limits(module, batch)
    print(
        f"this machine: {rate / 1e12:.2f} TFLOP/s in products of the model's shape,"
        f" {bandwidth / 1e9:.1f} GB/s copied. The step's {flop / 1e9:.0f} GFLOP are"
        f" {flop / whole / 1e12:.2f} TFLOP/s, {flop / rate / whole:.0%} of it"
    )

    cuda = options["device"] != "cpu"
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        *([torch.profiler.ProfilerActivity.CUDA] if cuda else []),
    ]
    with torch.profiler.profile(activities=activities) as profile:
        step(module, optimizer, batch)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in events)
    print(f"\none step by operation, own time: {total / 1e6:.3f} s")
    for event in events[: options["rows"]]:
        print(
            f"  {event.key[:60]:60}{getattr(event, own) / 1e6:8.3f} "
            f" {getattr(event, own) / total:6.1%}{event.count:8}"
        )

    saved = saved_tensors(module, batch)
    print(f"\nkept for the backward pass: {sum(size for size, _, _ in saved) / 1e6:.0f} MB")
    sizes: collections.Counter[tuple[str, str]] = collections.Counter()
    for size, where, what in saved:
        sizes[where, what] += size
    for (where, what), size in sizes.most_common(options["rows"]):
        print(f"  {size / 1e6:8.1f} MB  {where:28}{what}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
