"""One measurement of scripts.gpu: a method on a random Llama, ours and then the peer, in turn.

    python -m scripts.gpu.measure method=lora [shape=1b] [packed=true] [device=cuda] [seconds=40]
        [batch_size=2] [length=4096] [rank=16] [json=FILE] [profile=FILE]

Both sides have the same weights, rows and optimiser, in the same process. The peer of lora, rosa
and qlora is transformers with PEFT's LoRA of the same rank; that of eagle3 is the same drafter with
all logits (scripts.bench.distillation), and of its decoding the target without a draft. A side that
fails is reported, and the other one runs.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.options import parse

DEFAULTS: dict[str, Any] = {
    "method": "lora",
    "shape": "1b",
    "packed": True,
    "device": "cuda",
    "seconds": 40,
    "batch_size": 2,
    "length": 4096,
    "rank": 16,
    "json": None,
    "profile": None,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VOCABULARY = 128256
DOCUMENTS = 8  # rows in a packed sequence


def llama(options: dict[str, Any]) -> Any:
    """Return a Llama with random bf16 weights on the device; its linear layers in nf4 for qlora."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from scripts.bench.adapters import SHAPES

    tiny = options["shape"] == "tiny"
    config = LlamaConfig(
        vocab_size=512 if tiny else VOCABULARY,
        tie_word_embeddings=options["shape"] != "8b",
        max_position_embeddings=8192,
        **(TINY if tiny else SHAPES[options["shape"]]),
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(options["device"]):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    if options["method"] == "qlora":
        quantise(model, torch.device(options["device"]))
    return model.requires_grad_(False)


def quantise(model: Any, device: Any) -> None:
    """Replace the linear layers of the decoder, in place, by bitsandbytes' nf4 ones."""
    import bitsandbytes as bnb
    import torch

    for name, module in list(model.model.named_modules()):
        if type(module) is not torch.nn.Linear:
            continue
        four = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
        four.weight = bnb.nn.Params4bit(
            module.weight.detach(), requires_grad=False, quant_type="nf4"
        )
        parent, _, child = name.rpartition(".")
        four.support_avx512bf16_for_cpu = False  # its kernel has no backward pass
        setattr(model.model.get_submodule(parent), child, four.to(device))
    model.is_loaded_in_4bit = True  # what PEFT asks


def batch_of(options: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Return one batch: packed sequences of DOCUMENTS rows each, or padded rows of which the
    shortest is a quarter as long as the longest. The first token of a row is not trained."""
    import torch

    B, T = options["batch_size"], options["length"]
    ids = torch.randint(10, vocabulary, (B, T), generator=torch.Generator().manual_seed(1))
    labels, batch = ids.clone(), {"input_ids": ids}
    if options["packed"]:
        positions = torch.arange(T) % max(1, T // DOCUMENTS)
        batch["position_ids"] = positions.expand(B, T).contiguous()
        labels[:, positions == 0] = -100
    else:
        lengths = torch.linspace(T, T / 4, B).round().long()
        real = torch.arange(T) < lengths[:, None]
        labels[~real] = -100
        batch["attention_mask"] = real.long()
    batch["labels"] = labels
    return {name: tensor.to(options["device"]) for name, tensor in batch.items()}


def real_tokens(batch: dict[str, Any]) -> int:
    """Return the tokens of a batch without padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


Side = tuple[list[Any], Callable[[dict[str, Any]], Any]]  # trained parameters, loss of a batch


def ours(options: dict[str, Any]) -> Side:
    """Return our adapter on a new model, and its mean loss."""
    import torch

    from adapters.delta import Start
    from trainer.assembly.build import instantiate
    from trainer.config.compose import compose
    from trainer.models.losses import CausalLoss
    from trainer.speed import flash, fused, varlen

    model = llama(options)
    words = [f"adapter.rank={options['rank']}", f"adapter.alpha={options['rank']}", "task.path=x"]
    if options["method"] == "rosa":
        words = ["adapter=rosa", "adapter.mask=random", *words]
    plain: Any = OmegaConf.to_container(compose(words), resolve=True)
    if options["packed"]:
        device = torch.device(options["device"])
        if not flash.use_flash(model, device, torch.bfloat16):
            varlen.use_varlen(model, device, torch.bfloat16)
    fused.fuse(model)
    model = instantiate(plain["adapter"]).attach(model, Start(steps=1000)).train()
    loss_of = CausalLoss(model, None)

    def mean(batch: dict[str, Any]) -> Any:
        loss, sums = loss_of(batch)
        return loss / sums["tokens"]

    return [p for p in model.parameters() if p.requires_grad], mean


def with_peft(options: dict[str, Any]) -> Side:
    """Return PEFT's LoRA with bf16 adapters on a new model, and transformers' loss."""
    import peft

    settings = peft.LoraConfig(
        r=options["rank"],
        lora_alpha=options["rank"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(llama(options), settings, autocast_adapter_dtype=False).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return trained, lambda batch: model(**batch, use_cache=False).loss


def measured(side: Side, batch: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Train for half of the seconds, and return speed, peak memory and losses. The first two steps
    are not counted."""
    import torch

    from scripts.bench.growth import memory

    trained, loss_of = side
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step() -> Any:
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    memory(options["device"], reset=True)
    losses = [float(step()), float(step())]
    began, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - began < options["seconds"] / 2:
        last, steps = step(), steps + 1
        if steps % 4 == 0:
            losses.append(float(last))  # waits for the device
    losses.append(float(last))
    seconds = time.perf_counter() - began
    if options["profile"]:
        profile(step, options)
    return {
        "tokens_per_s": real_tokens(batch) * steps / seconds,
        "samples_per_s": len(batch["input_ids"]) * steps / seconds,
        "step_seconds": seconds / steps,
        "peak_gb": memory(options["device"], reset=False) / 1e9,
        "first_loss": losses[0],
        "losses": losses,
        "steps": steps,
    }


def profile(step: Callable[[], Any], options: dict[str, Any]) -> None:
    """Add the operations of one step, by the time that they take, to the profile's file."""
    import torch

    with torch.profiler.profile() as profiler:
        step()
    key = "self_cpu_time_total" if options["device"] == "cpu" else "self_cuda_time_total"
    with Path(options["profile"]).open("a") as file:
        file.write(profiler.key_averages().table(sort_by=key, row_limit=40) + "\n")


def eagle3(options: dict[str, Any]) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the sides of distilling an EAGLE-3 head, and of decoding with it."""
    import torch

    from scripts.bench.distillation import Plain
    from trainer.assembly.build import instantiate
    from trainer.config.compose import compose
    from trainer.decoding import speculative
    from trainer.drafters import Target
    from trainer.training.distill import DraftLoss

    model = llama(options).eval()
    vocabulary = model.config.vocab_size
    words = ["adapter=none", "drafter=eagle3", "objective=distill", "task.path=x"]
    words.append(f"drafter.draft_vocab_size={min(32000, vocabulary // 2)}")
    plain: Any = OmegaConf.to_container(compose(words), resolve=True)
    batch = batch_of(options | {"packed": False}, vocabulary)
    del batch["attention_mask"]
    target = Target(model)

    def new_drafter() -> Any:
        torch.manual_seed(0)
        drafter = instantiate(plain["drafter"])(model=model).to(options["device"]).train()
        drafter.calibrate(lambda: 10**12 // torch.arange(1, vocabulary + 1) ** 2)
        return drafter

    drafters: list[Any] = []

    def distilled(loss_of: Callable[[Any], Any]) -> dict[str, Any]:
        drafter = new_drafter()
        drafters.append(drafter)
        loss = loss_of(drafter)
        count = int((batch["labels"][:, 1:] != -100).sum())
        trained = [p for p in drafter.parameters() if p.requires_grad]
        return measured((trained, lambda batch: loss(batch)[0] / count), batch, options)

    def decoded(drafted: bool) -> dict[str, Any]:
        ids, drafter = batch["input_ids"][0, :64], drafters[0].eval() if drafted else None
        most = 128 if options["shape"] != "tiny" else 8
        speculative.generate(target, drafter, ids, 8, [])
        began = time.perf_counter()
        result = speculative.generate(target, drafter, ids, most, [])
        seconds = time.perf_counter() - began
        return {
            "tokens_per_s": len(result.tokens) / seconds,
            "peak_gb": None,  # of the training before
            "first_loss": None,
            "steps": result.steps,
            "peer": "decoding without a draft",
        }

    chunk = plain["objective"]["logits_chunk"]
    return {
        "ours": lambda: distilled(lambda drafter: DraftLoss(model, chunk, drafter, target)),
        "all logits": lambda: distilled(lambda drafter: Plain(model, drafter)),
        "decoding with the untrained head": lambda: decoded(True),
        "decoding without a draft": lambda: decoded(False),
    }


def trained(options: dict[str, Any]) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the sides of training an adapter."""
    batch = batch_of(options, 512 if options["shape"] == "tiny" else VOCABULARY)
    return {
        "ours": lambda: measured(ours(options), batch, options),
        "HF + PEFT": lambda: measured(with_peft(options), batch, options),
    }


def about(options: dict[str, Any]) -> str:
    """Describe machine and versions."""
    import peft
    import torch
    import transformers

    cuda = options["device"] != "cpu"
    machine = torch.cuda.get_device_name() if cuda else "CPU, a dry run"
    return (
        f"{machine}; torch {torch.__version__}, transformers {transformers.__version__}, peft"
        f" {peft.__version__}; {options['batch_size']} x {options['length']} tokens, rank"
        f" {options['rank']}, adapters of the peer in bf16"
    )


def main() -> int:
    """Measure the sides of a method, and write them as JSON."""
    import torch

    options = parse(DEFAULTS, __doc__)
    if options["shape"] == "tiny":
        options["length"] = 64
    if options["profile"]:
        Path(options["profile"]).unlink(missing_ok=True)
    if options["method"] == "eagle3":
        peer, sides = "all logits", eagle3(options)
    else:
        peer, sides = "HF + PEFT", trained(options)
    result: dict[str, Any] = {"about": about(options), "peer": peer, "sides": {}, "problems": {}}
    for name, measure in sides.items():
        try:
            result["sides"][name] = measure()
        except Exception as error:  # the other side is measured all the same
            traceback.print_exc()
            result["problems"][name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        if options["device"] != "cpu":
            torch.cuda.empty_cache()
        if options["json"]:
            Path(options["json"]).write_text(json.dumps(result))
    print(json.dumps(result, indent=1))
    return int(bool(result["problems"]))


if __name__ == "__main__":
    sys.exit(main())
