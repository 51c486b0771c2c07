"""The work that all contestants of scripts.bench.train get: model, rows in batches, and the adapter
at its start."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def digest(*parts: Any) -> str:
    """Return a short hash that identifies the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def overrides(options: dict[str, Any], work: Path) -> list[str]:
    """Return our config of the run, without the settings that only change its speed."""
    base = [f"base={options['base']}"]
    if options["shape"]:
        base = ["base=hf", f"base.path={work.parent / llama_name(options)}"]
    elif "/" in options["base"]:
        base = ["base=hf", f"base.path={options['base']}"]
    rows = [
        *options["task"],
        "overlong=drop",
        f"group_by_length={str(options['group_by_length']).lower()}",
    ]
    if options["data"] == "packed":
        rows = [
            "task=completion",
            f"task.path={work / 'text.jsonl'}",
            "task.eval_fraction=0",
            "overlong=truncate",
        ]
    precision = {"bf16": "bf16-true"}.get(options["precision"], options["precision"])
    return [
        *base,
        *rows,
        f"max_length={options['length']}",
        f"batch_size={options['batch_size']}",
        "max_epochs=null",
        f"max_steps={options['steps']}",
        f"precision={precision}",
        f"adapter.rank={options['rank']}",
        f"adapter.alpha={options['alpha']}",
        f"optimizer.lr={options['lr']}",
        "schedule=constant",
        "schedule.warmup=0",
        f"seed={options['seed']}",
        f"lightning={'gpu' if options['device'] == 'cuda' else 'cpu'}",
        "callbacks.evaluation=null",
        "callbacks.checkpoints=null",
        "callbacks.progress.every=1",
        "logger=none",
    ]


def prepare(options: dict[str, Any], work: Path) -> None:
    """Write WORK/rows.json, start/ and, last, spec.json."""
    import lightning
    import torch

    from adapters.delta import Start
    from trainer.assembly import quiet
    from trainer.assembly.build import instantiate
    from trainer.config import compose
    from trainer.models import flops
    from trainer.models.precision import compute

    quiet.quiet()
    work.mkdir(parents=True, exist_ok=True)
    if options["shape"]:
        random_llama(options, work.parent / llama_name(options))
    (work / "text.jsonl").write_text("\n", "utf-8")  # composing only needs the name
    plain: dict[str, Any] = OmegaConf.to_container(
        compose.compose(overrides(options, work)), resolve=True
    )  # type: ignore[assignment]
    base = instantiate(plain["base"])
    if options["data"] == "packed":
        rows = texts(base.tokenizer, options["length"])
        (work / "text.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in rows), "utf-8"
        )
    steps, mean_length = batches(options, plain, base)
    (work / "rows.json").write_text(json.dumps(steps), "utf-8")

    dtype, _, precision = compute(plain["precision"], "auto", False, options["device"] == "cuda")
    model = base.load(dtype, device=torch.device(options["device"]))
    # as trainer.run does before it attaches the adapter
    lightning.seed_everything(options["seed"], verbose=False)
    adapter = instantiate(plain["adapter"])
    adapted = adapter.attach(model, Start(steps=options["steps"]))
    adapter.save(adapted, work / "start", base.path, "CAUSAL_LM")
    counts = flops.count(adapted)
    peak, source = flops.peak(torch.device(options["device"]), dtype)
    copied = ("batch_size", "steps", "rank", "alpha", "lr", "seed", "device")
    spec = {
        "model": str(Path(base.path).resolve()),
        "rows": str(work / "rows.json"),
        "start": str(work / "start/adapter_model.safetensors"),
        "litgpt": str(work.parent / f"litgpt-{digest(str(base.path))}-{str(dtype)[6:]}"),
        "pad": base.tokenizer.pad_token_id,
        "dtype": str(dtype).removeprefix("torch."),
        "precision": precision,
        "mean_length": mean_length,
        "flop": [flop(counts, rows) for rows in steps],
        "peak": peak,
        "peak_source": source,
        **{name: options[name] for name in copied},
    }
    (work / "spec.json").write_text(json.dumps(spec, indent=2), "utf-8")


def batches(
    options: dict[str, Any], plain: dict[str, Any], base: Any
) -> tuple[list[list[dict[str, list[int]]]], float]:
    """Return the labelled rows of each step, and the mean length of a row."""
    from trainer.assembly import rows as assembled
    from trainer.assembly.build import instantiate

    data = assembled.load_data(plain, base, instantiate(plain["task"]))
    assert data.train is not None
    order = assembled.batch_order(plain, data, 1)
    steps = []
    for step in range(options["steps"]):
        (picks,) = order.micro_batches(step)
        tokens = [data.train[pick][1][0] for pick in picks]
        steps.append([labelled(row.ids, row.trained) for row in tokens])
    if options["data"] == "packed":
        assert all(
            len(row["input_ids"]) == options["length"] and -100 not in row["labels"][1:]
            for rows in steps
            for row in rows
        )
    return steps, float(data.train.rows.lengths.mean())


def flop(counts: Any, rows: list[dict[str, list[int]]]) -> float:
    """Return the operations of a step on these rows (trainer.models.flops)."""
    lengths = [len(row["input_ids"]) for row in rows]
    trained = sum(label != -100 for row in rows for label in row["labels"])
    return counts.flop(sum(lengths), trained, lengths)


def labelled(ids: list[int], trained: list[bool]) -> dict[str, list[int]]:
    """Return a row in the format of transformers' trainers. Nothing predicts its first token."""
    labels = [token if flag else -100 for token, flag in zip(ids, trained, strict=True)]
    return {"input_ids": list(ids), "labels": [-100, *labels[1:]]}


def texts(tokenizer: Any, length: int) -> list[str]:
    """Return Python's documentation in pieces of slightly more than `length` tokens. The program
    truncates them to `length`."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode()
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    # A piece's first and last tokens can differ from those within the text.
    pieces = [
        text[offsets[at][0] : offsets[at + length + 8][1]]
        for at in range(0, len(offsets) - length - 8, length)
    ]
    return [
        piece
        for piece in pieces
        if len(tokenizer(piece, add_special_tokens=False)["input_ids"]) >= length
    ]


def llama_name(options: dict[str, Any]) -> str:
    """Return the folder name of a shape."""
    return f"llama-{options['shape']}-{options['vocabulary']}"


def random_llama(options: dict[str, Any], folder: Path) -> None:
    """Write a Llama with random bf16 weights and the byte tokenizer of base=tiny, unless it
    exists."""
    if (folder / "done").exists():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from scripts.bench.adapters import SHAPES
    from trainer.assembly.build import instantiate
    from trainer.config import compose

    plain: Any = OmegaConf.to_container(
        compose.compose(["base=tiny", "task=viggo", "task.path=x"]), resolve=True
    )
    sizes: Any = SHAPES[options["shape"]]
    settings = LlamaConfig(
        vocab_size=options["vocabulary"],
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options["device"]):
        model = LlamaForCausalLM(settings)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    instantiate(plain["base"]).tokenizer.save_pretrained(folder)
    (folder / "done").touch()
