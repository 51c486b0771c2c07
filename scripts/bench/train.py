"""Training speed and memory of our program against a bare PyTorch loop, Hugging Face's Trainer,
TRL's SFTTrainer and LitGPT.

    python -m scripts.bench.train out=runs/bench/chat data=chat
    python -m scripts.bench.train out=runs/bench/packed data=packed
    python -m scripts.bench.train out=runs/bench/8b shape=8b device=cuda

The same model, rows, tokens, labels, batches, precision, LoRA with its values at the start,
optimiser (fused AdamW, clip 1.0, constant rate), seed and logging at each step for all. That they
do the same work is seen in the loss curves, whose largest difference from ours stands in the table.
Each runs in a process of its own, `rounds` times in turn; results go to OUT/results.jsonl, from
which a stopped benchmark goes on, then OUT/train.md and OUT/train.svg are written. After a change
of the program take another OUT.

Contestants: ours (`python -m trainer` as it is), ours_packed (the same rows with packing=true; chat
only), bare, hf, trl, litgpt; what each of the last four is stands in its file in
scripts/bench/peers/. `variants` adds more, by name: variants.compiled=[compile=true] gives
overrides of our config, variants.hf_bf16=[hf,adapter_dtype=bfloat16] the options adapter_dtype,
autocast and gradient_checkpointing of a peer.

Options, with their defaults:
  data=chat             chat: long prompts and short answers, padded to the longest row of each batch; packed: plain text of Python's
                        documentation in rows of exactly `length` tokens, all supervised, without
                        padding
  task=[task=bfcl]      our overrides that choose the rows of data=chat, as task=[task=sql,task.path=FILE]
  base=smollm2_135m     a name of conf/base, or the folder of a model
  shape=null            1b or 8b: a Llama of that size with random weights, and data=packed batch_size=2 length=2048
  vocabulary=128256     of such a Llama
  length=null           tokens of a packed row (256); of the longest row of chat (1024), longer ones are dropped
  batch_size=8 steps=14 warm=4 rounds=3
  group_by_length=false rows of similar length share a batch of chat
  precision=auto        fp32, bf16 (weights and activations), or auto: bf16 where the hardware is made for it
  adapter_dtype=float32 float32 (PEFT's default) or bfloat16 (with precision=bf16): of the adapters. LitGPT has bf16 adapters with bf16
  autocast=false gradient_checkpointing=false   TRL sets both by itself; here nobody has them unless they are given
  rank=16 alpha=32 lr=2e-4 seed=0 device=cpu threads=null
  contestants=[ours,ours_packed,bare,hf,trl,litgpt] variants={} extra=[]   extra: overrides for all of ours
  envs=~/.cache/graft/bench   where the peers' virtual environments are made; here: they run in this one, as far as it has them
  minutes=null          stop after so many, at the end of a process
  --install             make the environments and stop; --table: write table and plot from the results that there are

Step seconds are the median of the warm steps; tokens/s are of all of them together, as batches
differ in length, and the processed ones are rows' own, without padding. The table has medians over
the rounds, with the least and the greatest. Peak memory is the process's largest resident set, on a
GPU what torch's allocator had at most. The first step counts from the command; tokenised rows are
in our cache by then, and the peers read them from a file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.peers.contestants import (
    OF_A_PEER,
    PEERS,
    ROOT,
    contestants,
    environment,
    interpreter,
    parsed,
)
from scripts.bench.peers.table import described, plot, summary, table

# What the rows and the start depend on.
WORK = (
    "data",
    "task",
    "base",
    "shape",
    "vocabulary",
    "length",
    "batch_size",
    "steps",
    "group_by_length",
    "precision",
    "rank",
    "alpha",
    "lr",
    "seed",
    "device",
)


def digest(*parts: Any) -> str:
    """Tells work from other work."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def work_key(options: dict[str, Any]) -> str:
    """Of the rows and the start that all contestants are given."""
    return digest({name: options[name] for name in WORK})


def result_key(options: dict[str, Any], kind: str, given: list[str]) -> str:
    """Of a contestant's result: nothing that its numbers depend on may differ among the rounds."""
    own = {name: options[name] for name in (*OF_A_PEER, "threads")}
    ours = options["extra"] if kind not in PEERS else []
    return digest(work_key(options), own, kind, given, ours)


def overrides(options: dict[str, Any], work: Path) -> list[str]:
    """Our config of the run, up to what only concerns its speed."""
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
    """Write what all contestants are given: WORK/rows.json, start/ and, last, spec.json."""
    import lightning
    import torch

    from adapters.delta import Start
    from trainer.assembly import quiet
    from trainer.assembly import rows as rows_module
    from trainer.assembly.build import instantiate
    from trainer.config import compose
    from trainer.models.precision import compute

    quiet.quiet()
    work.mkdir(parents=True, exist_ok=True)
    if options["shape"]:
        random_llama(options, work.parent / llama_name(options))
    (work / "text.jsonl").write_text("\n", "utf-8")  # composing asks for no more than the name
    plain: dict[str, Any] = OmegaConf.to_container(
        compose.compose(overrides(options, work)), resolve=True
    )  # type: ignore[assignment]
    base = instantiate(plain["base"])
    if options["data"] == "packed":
        rows = texts(base.tokenizer, options["length"])
        (work / "text.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in rows), "utf-8"
        )
    found = rows_module.load_data(plain, base, instantiate(plain["task"]))
    assert found.train is not None
    plan = rows_module.batch_order(plain, found, 1)
    steps = []
    for step in range(options["steps"]):
        (picks,) = plan.micro_batches(step)
        tokens = [found.train[pick][1][0] for pick in picks]
        steps.append([labelled(row.ids, row.trained) for row in tokens])
    if options["data"] == "packed":
        assert all(
            len(row["input_ids"]) == options["length"] and -100 not in row["labels"][1:]
            for rows in steps
            for row in rows
        )
    (work / "rows.json").write_text(json.dumps(steps), "utf-8")

    dtype, _, precision = compute(plain["precision"], "auto", False, options["device"] == "cuda")
    model = base.load(dtype, device=torch.device(options["device"]))
    # as trainer.run does before it attaches the adapter
    lightning.seed_everything(options["seed"], verbose=False)
    adapter = instantiate(plain["adapter"])
    adapter.save(
        adapter.attach(model, Start(steps=options["steps"])), work / "start", base.path, "CAUSAL_LM"
    )
    spec = {
        "model": str(Path(base.path).resolve()),
        "rows": str(work / "rows.json"),
        "start": str(work / "start/adapter_model.safetensors"),
        "litgpt": str(work.parent / f"litgpt-{digest(str(base.path))}-{str(dtype)[6:]}"),
        "pad": base.tokenizer.pad_token_id,
        "dtype": str(dtype).removeprefix("torch."),
        "precision": precision,
        "mean_length": float(found.train.rows.lengths.mean()),
        **{
            name: options[name]
            for name in ("batch_size", "steps", "rank", "alpha", "lr", "seed", "device")
        },
    }
    (work / "spec.json").write_text(json.dumps(spec, indent=2), "utf-8")


def labelled(ids: list[int], trained: list[bool]) -> dict[str, list[int]]:
    """A row as transformers' trainers take it; nothing predicts its first token."""
    labels = [token if flag else -100 for token, flag in zip(ids, trained, strict=True)]
    return {"input_ids": list(ids), "labels": [-100, *labels[1:]]}


def texts(tokenizer: Any, length: int) -> list[str]:
    """Python's documentation in pieces of a little more than `length` tokens, to be cut there."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode()
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    # Cut anew, a piece's ends may be other tokens than within the text.
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
    """The folder's name of a shape."""
    return f"llama-{options['shape']}-{options['vocabulary']}"


def random_llama(options: dict[str, Any], folder: Path) -> None:
    """A Llama of a size with random bf16 weights and the byte tokenizer of base=tiny, made once."""
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


def waited(
    command: list[str], env: dict[str, str], watch: Callable[[], bool] | None = None
) -> tuple[float, float | None]:
    """(when a command began, when `watch` first held), wall-clock times.

    Raises:
        RuntimeError: it failed; the end of what it said.
    """
    with tempfile.TemporaryFile("w+") as log:
        began, held = time.time(), None
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT
        )
        while watch is not None and held is None and process.poll() is None:
            if watch():
                held = time.time()
            time.sleep(0.01)
        if process.wait():
            log.seek(0)
            raise RuntimeError(
                log.read()[-3000:].strip()
                or f"{shlex.join(command)} ended with {process.returncode}"
            )
        if held is None and watch is not None and watch():
            held = time.time()
    return began, held


def packed(spec: dict[str, Any], length: int) -> list[str]:
    """Packing with as many tokens in a step as the padded rows have, as far as whole sequences
    allow."""
    return [
        "packing=true",
        "group_by_length=false",
        f"batch_size={max(1, round(spec['batch_size'] * spec['mean_length'] / length))}",
    ]


def run_ours(
    options: dict[str, Any], spec: dict[str, Any], work: Path, kind: str, given: list[str]
) -> dict[str, Any]:
    """One run of our program."""
    with tempfile.TemporaryDirectory() as temporary:
        journal, result = (
            Path(temporary) / "runs" / "bench" / "metrics.jsonl",
            Path(temporary) / "result.json",
        )
        settings = [
            *overrides(options, work),
            (
                f"adapter.dtype={options['adapter_dtype'] if spec['dtype'] == 'bfloat16' else 'float32'}"
            ),
            f"objective.gradient_checkpointing={str(options['gradient_checkpointing']).lower()}",
            *(packed(spec, options["length"]) if kind == "ours_packed" else []),
            *options["extra"],
            *given,
            "name=bench",
            f"runs={journal.parents[1]}",
        ]
        command = [
            sys.executable,
            str(ROOT / "scripts/bench/peers/ours.py"),
            str(result),
            *settings,
        ]
        env = environment(options) | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        }
        began, first = waited(
            command,
            env,
            lambda: journal.exists() and '"kind": "step"' in journal.read_text("utf-8"),
        )
        rows = [
            row
            for row in map(json.loads, journal.read_text("utf-8").splitlines())
            if row["kind"] == "step"
        ]
        found = json.loads(result.read_text("utf-8"))
    seconds = [0.0, *(row["seconds"] for row in rows)]
    tokens = [0, *(row["tokens"] for row in rows)]
    found |= {
        "losses": [row["loss"] for row in rows],
        "seconds": [b - a for a, b in itertools.pairwise(seconds)][1:],
        "processed": [b - a for a, b in itertools.pairwise(tokens)],
        "supervised": [
            round(row["trained_per_s"] * (b - a))
            for row, (a, b) in zip(rows, itertools.pairwise(seconds), strict=True)
        ],
        "first": first - began if first else None,
        "overrides": settings,
    }
    return found


def run_peer(
    options: dict[str, Any], spec: dict[str, Any], kind: str, given: list[str]
) -> dict[str, Any]:
    """One run of a peer."""
    python = interpreter(kind, options["envs"])
    own: Any = OmegaConf.to_container(OmegaConf.from_dotlist(given))
    settings = spec | {name: options[name] for name in OF_A_PEER} | own
    script = str(ROOT / "scripts/bench/peers" / PEERS[kind])
    env = {
        name: value
        for name, value in environment(options).items()
        if name != "PYTHONPATH" or options["envs"] == "here"
    }
    with tempfile.TemporaryDirectory() as temporary:
        asked, result = Path(temporary) / "spec.json", Path(temporary) / "result.json"
        asked.write_text(json.dumps(settings), "utf-8")
        if kind == "litgpt" and not (Path(spec["litgpt"]) / "lit_model.pth").exists():
            waited([python, script, str(asked), str(result), "--convert"], env)
        began, _ = waited([python, script, str(asked), str(result)], env)
        found = json.loads(result.read_text("utf-8"))
    steps = json.loads(Path(spec["rows"]).read_text("utf-8"))
    ends = found.pop("ends")
    return found | {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "first": ends[0] - began,
        "processed": [sum(len(row["input_ids"]) for row in rows) for rows in steps],
        "supervised": [
            sum(label != -100 for row in rows for label in row["labels"]) for rows in steps
        ],
    }


def turns(names: list[str], rounds: int) -> list[tuple[int, str]]:
    """(round, name) of all runs: each round begins with another one, since who runs first finds
    files that are not in memory yet."""
    return [
        (number, names[(number + at) % len(names)])
        for number in range(rounds)
        for at in range(len(names))
    ]


def main() -> int:
    """Run what is missing, then write table and plot."""
    plain = [
        argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("--")
    ]
    try:
        options = parsed(plain)
    except ValueError as error:
        print(f"{error}\n\n{__doc__}", file=sys.stderr)
        return 2
    if "--prepare" in sys.argv:
        prepare(options, Path(sys.argv[sys.argv.index("--prepare") + 1]))
        return 0
    who = contestants(options)
    if "--install" in sys.argv:
        failed = {}
        for kind in dict.fromkeys(kind for kind, _ in who.values() if kind in PEERS):
            try:
                interpreter(kind, options["envs"])
            except RuntimeError as error:
                failed[kind] = str(error)
        print("\n".join(f"{kind}: {reason}" for kind, reason in failed.items()) or "installed")
        return int(bool(failed))
    if options["out"] is None:
        print(f"out=FOLDER is missing\n\n{__doc__}", file=sys.stderr)
        return 2
    out, started = Path(options["out"]).resolve(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    work, lines = out / f"work-{work_key(options)}", out / "results.jsonl"
    keys = {name: result_key(options, kind, given) for name, (kind, given) in who.items()}

    def results() -> dict[str, list[dict[str, Any]]]:
        rows = (
            [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
            if lines.exists()
            else []
        )
        return {
            name: [row for row in rows if row["name"] == name and row["key"] == keys[name]]
            for name in who
        }

    skipped: dict[str, str] = {}
    if "--table" not in sys.argv and not (work / "spec.json").exists():
        env = environment(options) | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        }
        try:
            waited(
                [sys.executable, "-m", "scripts.bench.train", *plain, "--prepare", str(work)], env
            )
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    if not (work / "spec.json").exists():
        print(f"{out} has no results of these options", file=sys.stderr)
        return 1
    spec = json.loads((work / "spec.json").read_text("utf-8"))
    for round_, name in turns(list(who), options["rounds"]) if "--table" not in sys.argv else ():
        late = (
            options["minutes"] is not None and time.monotonic() - started > 60 * options["minutes"]
        )
        if late or name in skipped or len(results()[name]) > round_:
            continue
        kind, given = who[name]
        try:
            found = (
                run_peer(options, spec, kind, given)
                if kind in PEERS
                else run_ours(options, spec, work, kind, given)
            )
        except RuntimeError as error:
            if kind not in PEERS:
                print(error, file=sys.stderr)
                return 1
            skipped[name] = str(error).splitlines()[-1][:200]
            (out / f"{name}.log").write_text(str(error), "utf-8")
            print(f"{name} is skipped: {skipped[name]}; more in {out / f'{name}.log'}", flush=True)
            continue
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "key": keys[name], **found}) + "\n")
        one = summary([found], options["warm"], options["device"] == "cuda")
        print(
            f"round {round_ + 1} {name}: {one['step'][0]:.3f} s a step, {one['supervised'][0]:.0f}"
            f" supervised tokens/s, {one['memory'][0]:.0f} MB, first step after"
            f" {one['first'][0]:.1f} s, last loss {one['loss'][0]:.4f}",
            flush=True,
        )
    done = results()
    if not any(done.values()):
        print("no result yet", file=sys.stderr)
        return 1
    command = shlex.join(["python", "-m", "scripts.bench.train", *plain])
    text = table(options, done, skipped, described(options, spec, done, command))
    (out / "train.md").write_text(text, "utf-8")
    plot(options, done, out / "train.svg")
    print(f"\n{text}\n{out / 'train.md'}, {out / 'train.svg'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
