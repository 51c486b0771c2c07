"""Tokens a second of a batch with and without a drafter, on a toy.

    python -m scripts.bench.drafted_batches [drafters=[eagle3,mtp_shared,dspark]] [batch=8]
        [hidden=256] [layers=4] [vocabulary=2048] [offsets=4] [max_new_tokens=48] [train=60]
        [repeats=3] [clock=processor] [json=FILE]

A random Llama answers `batch` prompts of 24 tokens, one at a time and all at once: by plain
decoding, and with each drafter, which is trained for `train` steps on the target's own texts. Both
write the same texts, in fp32 and greedily. The ways take turns, and the table has the least of
`repeats` times:

    tau      tokens of a step
    alone    tokens a second, one prompt at a time
    batch    tokens a second, all at once
    gain     batch / alone
    share    the gain over that of plain decoding

clock=processor counts processor seconds, which other jobs on the machine change less.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.bench.options import parse

DEFAULTS: dict[str, Any] = {
    "drafters": ["eagle3", "mtp_shared", "dspark"],
    "batch": 8,
    "hidden": 256,
    "layers": 4,
    "vocabulary": 2048,
    "offsets": 4,
    "max_new_tokens": 48,
    "train": 60,
    "repeats": 3,
    "clock": "processor",
    "json": None,
}
PROMPT = 24


def toy(options: dict[str, Any]) -> Any:
    """Return a random target."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hidden = options["hidden"]
    config = LlamaConfig(
        vocab_size=options["vocabulary"],
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=options["layers"],
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        initializer_range=0.1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def drafter_of(name: str, model: Any, options: dict[str, Any]) -> Any:
    """Return an untrained drafter of conf/drafter."""
    from omegaconf import OmegaConf

    from trainer.assembly.build import instantiate
    from trainer.config import compose

    words = [f"drafter={name}", f"drafter.offsets={options['offsets']}", "base=tiny", "task.path=x"]
    node = compose.compose(words).drafter
    return instantiate(OmegaConf.to_container(node))(model=model)


def train(drafter: Any, target: Any, texts: Any, steps: int) -> None:
    """Train a drafter on the target's texts (B, T)."""
    import torch

    from trainer.drafters import TargetOutput
    from trainer.models.heads import captured_layers

    drafter.calibrate(lambda: torch.bincount(texts.flatten(), minlength=target.config.vocab_size))
    with torch.no_grad(), captured_layers(target.decoder, drafter.layers) as between:
        hidden = target.decoder(input_ids=texts).last_hidden_state
    features = torch.cat(list(between), dim=-1) if between else None
    positions = torch.arange(texts.shape[1]).expand_as(texts)
    labels = texts.clone()
    labels[:, :PROMPT] = -100
    output = TargetOutput(hidden, texts, labels, positions, hidden[:, :0], features)
    parameters = [p for p in drafter.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3)
    drafter.train()
    for _ in range(steps):
        loss, numbers = drafter.loss(output, target, 1024)
        (loss / numbers[0, 1].clamp_min(1)).backward()
        optimiser.step()
        optimiser.zero_grad()
    drafter.eval()


def measure(ways: dict[str, Callable[[bool], Any]], repeats: int, clock: str) -> dict[str, Any]:
    """Return the least seconds of each way alone and in a batch, after a warm-up, and its last
    results."""
    now = time.process_time if clock == "processor" else time.perf_counter
    least: dict[str, Any] = {}
    for repeat in range(repeats + 1):
        for name, decode in ways.items():
            for together in (False, True):
                started = now()
                results = decode(together)
                seconds = now() - started
                key = f"{name} {'batch' if together else 'alone'}"
                before = least.get(key, (float("inf"), None))[0] if repeat > 1 else float("inf")
                least[key] = (min(before, seconds), results)
    return least


def main() -> int:
    """Print the table."""
    options = parse(DEFAULTS, __doc__)
    import torch

    from trainer.decoding.speculative import generate, generate_batch
    from trainer.drafters import Target

    model = toy(options)
    target, count = Target(model), options["max_new_tokens"]
    draw = torch.Generator().manual_seed(1)
    size = (options["batch"], PROMPT)
    prompts = list(torch.randint(3, options["vocabulary"], size, generator=draw))
    plain = generate_batch(target, None, prompts, count, [])
    whole = [[*ids.tolist(), *one.tokens] for ids, one in zip(prompts, plain, strict=True)]
    drafters: dict[str, Any] = {"plain": None}
    for name in options["drafters"]:
        drafters[name] = drafter_of(name, model, options)
        train(drafters[name], target, torch.tensor(whole), options["train"])

    def way(drafter: Any) -> Callable[[bool], Any]:
        def decode(together: bool) -> Any:
            if together:
                return generate_batch(target, drafter, prompts, count, [])
            return [generate(target, drafter, ids, count, []) for ids in prompts]

        return decode

    ways = {name: way(drafter) for name, drafter in drafters.items()}
    least = measure(ways, options["repeats"], options["clock"])
    tokens, rows = options["batch"] * count, {}
    for name in ways:
        (alone, _), (batch, results) = least[f"{name} alone"], least[f"{name} batch"]
        assert [one.tokens for one in results] == [one.tokens for one in plain], name
        steps = sum(one.steps for one in results)
        rows[name] = {
            "tau": (tokens - len(prompts)) / steps,
            "alone": tokens / alone,
            "batch": tokens / batch,
            "gain": alone / batch,
        }
    print(f"{'':12} {'tau':>6} {'alone':>8} {'batch':>8} {'gain':>6} {'share':>6}")
    for name, row in rows.items():
        row["share"] = row["gain"] / rows["plain"]["gain"]
        print(
            f"{name:12} {row['tau']:6.2f} {row['alone']:8.0f} {row['batch']:8.0f}"
            f" {row['gain']:6.2f} {row['share']:6.2f}"
        )
    if options["json"]:
        Path(options["json"]).write_text(json.dumps({"options": options, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
