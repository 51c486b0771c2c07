"""LoRA over a quantised layer as one operation and as two, forward and backward.

    python -m scripts.bench.quantised_lora [tokens=1024] [rank=16] [turns=14] [device=cpu]

Prints for each layer the shortest milliseconds of both, taken in turns, and their ratio.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from scripts.bench.options import parse

DEFAULTS: dict[str, Any] = {"tokens": 1024, "rank": 16, "turns": 14, "device": "cpu"}
SHAPES = ((576, 1536), (1536, 576), (2048, 2048))  # in, out


def layer(kind: str, i: int, o: int, device: str) -> Any:
    """Return a frozen bf16 layer in nf4 or int8."""
    import bitsandbytes as bnb
    import torch

    weight = torch.nn.Linear(i, o, False).to(torch.bfloat16).weight.detach()
    if kind == "int8":
        quantised: Any = bnb.nn.Linear8bitLt(i, o, False, has_fp16_weights=False)
        quantised.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        quantised = bnb.nn.Linear4bit(i, o, False, compute_dtype=torch.bfloat16, quant_type=kind)
        quantised.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind)
        quantised.support_avx512bf16_for_cpu = False  # its kernel has no backward pass
    return quantised.to(device).train()


def measure(kind: str, i: int, o: int, options: dict[str, Any]) -> tuple[float, float]:
    """Return the shortest seconds of one operation and of two."""
    import torch

    from adapters.delta import AdaptedLinear
    from adapters.lora import LoRA

    base = layer(kind, i, o, options["device"])
    delta = LoRA(base, options["rank"], 1.0, 0.0, torch.float32)
    module = AdaptedLinear(base, delta).train()
    where = {"device": options["device"], "dtype": torch.bfloat16}
    x = torch.randn(1, options["tokens"], i, **where).requires_grad_()
    upstream = torch.randn(1, options["tokens"], o, **where)
    cuda = options["device"] != "cpu"
    clock = time.monotonic if cuda or torch.get_num_threads() > 1 else time.process_time
    best = [float("inf"), float("inf")]
    for _ in range(options["turns"]):
        for number, delta.fused in enumerate((True, False)):
            began = clock()
            torch.autograd.grad(module(x), [x, delta.A, delta.B], upstream)
            if cuda:
                torch.cuda.synchronize()
            best[number] = min(best[number], clock() - began)
    return best[0], best[1]


def main() -> int:
    """Print the table."""
    options = parse(DEFAULTS, __doc__)
    print("| layer | one operation, ms | two, ms | ratio |\n|---|---|---|---|")
    for kind in ("nf4", "int8"):
        for i, o in SHAPES:
            one, two = measure(kind, i, o, options)
            print(f"| {kind} {i} to {o} | {1000 * one:.2f} | {1000 * two:.2f} | {one / two:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
