"""Training speed and memory of our program against a bare PyTorch loop, Hugging Face's Trainer,
TRL's SFTTrainer and LitGPT.

    python -m scripts.bench.train out=runs/bench/chat data=chat
    python -m scripts.bench.train out=runs/bench/packed data=packed
    python -m scripts.bench.train out=runs/bench/8b shape=8b device=cuda

All contestants have the same model, rows, tokens, labels, batches, precision, initial LoRA,
optimiser (fused AdamW, clip 1.0, constant rate) and seed, and log at each step. The loss curves
show that they do the same work: the table has each contestant's largest difference from ours. Each
run is a process. The contestants run in turn, `rounds` times. Results go to OUT/results.jsonl, from
which a stopped benchmark continues. Then OUT/train.md, train.json and train.svg are written. Use
another OUT after a change of the program.

Contestants: ours (`python -m trainer`), ours_packed (the same rows with packing=true; chat only),
bare, hf, trl and litgpt, whose files in scripts/bench/peers/ describe them. hf_strongest is hf with
what costs it nothing: adapters in bf16 and our setting of malloc. It leads the table. `variants`
adds more, by name: variants.compiled=[compile=true] has overrides of our config,
variants.hf_bf16=[hf,adapter_dtype=bfloat16] the options adapter_dtype, autocast,
gradient_checkpointing and allocator of a peer.

Options, with their defaults:
  data=chat             chat: long prompts and short answers, padded to the longest row of a batch;
                        packed: plain text of Python's documentation in rows of exactly `length`
                        tokens, all supervised, without padding
  task=[task=bfcl]      overrides that choose the rows of data=chat, for example
                        task=[task=sql,task.path=FILE]
  base=smollm2_135m     a name of conf/base, or the folder of a model
  shape=null            1b or 8b: a Llama of that size with random weights, with data=packed
                        batch_size=2 length=2048
  vocabulary=128256     of such a Llama
  length=null           tokens of a packed row (256), or of the longest row of chat (1024); longer
                        rows are dropped
  batch_size=8 steps=14 warm=4 rounds=3
  group_by_length=false put rows of similar length into the same batch of chat
  precision=auto        fp32, bf16 (weights and activations), or auto: bf16 on hardware for it
  adapter_dtype=float32 float32 (PEFT's default) or bfloat16 (with precision=bf16), of the adapters.
                        LitGPT always has bf16 adapters with bf16
  autocast=false gradient_checkpointing=false
                        TRL sets both by default; here both are off for all unless they are set
  allocator=false       our setting of malloc for the peers, too
  rank=16 alpha=32 lr=2e-4 seed=0 device=cpu threads=null
  contestants=[ours,hf_strongest,ours_packed,bare,hf,trl,litgpt]
  variants={} extra=[]  extra: overrides for all of ours
  envs=~/.cache/graft/bench
                        folder of the peers' virtual environments; here: use this environment, as
                        far as the peers are installed in it
  minutes=null          stop after this many minutes, when the current process ends
  --install             create the environments and stop
  --table               write table and plot from the existing results

Step seconds are the median of the warm steps. Tokens/s are over all warm steps, as batches differ
in length; processed tokens are without padding. The table has medians over the rounds, with the
minimum and maximum. TFLOP/s are model FLOP by formula (trainer.models.flops), over the peak of the
machine. Peak memory is the process's largest resident set, on a GPU the peak of torch's
allocator. The time to the first step starts with the command; the tokenised rows are in our cache
by then, and the peers read them from a file.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from scripts.bench.peers.contestants import (
    OF_A_PEER,
    PEERS,
    ROOT,
    contestants,
    environment,
    interpreter,
    parsed,
)
from scripts.bench.peers.runs import run_ours, run_peer, waited
from scripts.bench.peers.table import described, figures, plot, summary, table
from scripts.bench.peers.work import digest, prepare

# the options that change the rows or the initial adapter
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


def work_key(options: dict[str, Any]) -> str:
    """Return the key of the rows and the initial adapter."""
    return digest({name: options[name] for name in WORK})


def result_key(options: dict[str, Any], kind: str, settings: list[str]) -> str:
    """Return the key of a contestant's results. It covers everything that changes the numbers, as
    all rounds must measure the same."""
    peer = {name: options[name] for name in (*OF_A_PEER, "threads")}
    ours = options["extra"] if kind not in PEERS else []
    return digest(work_key(options), peer, kind, settings, ours)


def turns(names: list[str], rounds: int) -> list[tuple[int, str]]:
    """Return (round, name) of all runs. Each round starts with another contestant, since the first
    one reads files that are not in memory yet."""
    return [
        (number, names[(number + at) % len(names)])
        for number in range(rounds)
        for at in range(len(names))
    ]


class Results:
    """OUT/results.jsonl: the results of these options, by contestant."""

    def __init__(self, options: dict[str, Any], out: Path):
        self.file = out / "results.jsonl"
        self.keys = {
            name: result_key(options, kind, settings)
            for name, (kind, settings) in contestants(options).items()
        }

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """Return the results that exist."""
        lines = self.file.read_text("utf-8").splitlines() if self.file.exists() else []
        rows = [json.loads(line) for line in lines]
        return {
            name: [row for row in rows if row["name"] == name and row["key"] == key]
            for name, key in self.keys.items()
        }

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Append one result."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "key": self.keys[name], **result}) + "\n")


def install(options: dict[str, Any]) -> int:
    """Create the peers' environments; return the exit code."""
    failed = {}
    for kind in dict.fromkeys(kind for kind, _ in contestants(options).values() if kind in PEERS):
        try:
            interpreter(kind, options["envs"])
        except RuntimeError as error:
            failed[kind] = str(error)
    print("\n".join(f"{kind}: {reason}" for kind, reason in failed.items()) or "installed")
    return int(bool(failed))


def prepare_in_process(options: dict[str, Any], arguments: list[str], work: Path) -> None:
    """Run `prepare` in a process, unless its result exists.

    Raises:
        RuntimeError: it failed.
    """
    if (work / "spec.json").exists():
        return
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "scripts.bench.train", *arguments, "--prepare", str(work)]
    waited(command, environment(options) | {"PYTHONPATH": path})


def run_all(
    options: dict[str, Any], spec: dict[str, Any], work: Path, results: Results
) -> dict[str, str]:
    """Run everything that has no result yet. Returns the reasons of the peers that failed, by name.

    Raises:
        RuntimeError: one of our runs failed.
    """
    started, skipped = time.monotonic(), dict[str, str]()
    who = contestants(options)
    for number, name in turns(list(who), options["rounds"]):
        minutes = (time.monotonic() - started) / 60
        if options["minutes"] is not None and minutes > options["minutes"]:
            break
        if name in skipped or len(results.read()[name]) > number:
            continue
        kind, settings = who[name]
        try:
            if kind in PEERS:
                result = run_peer(options, spec, kind, settings)
            else:
                result = run_ours(options, spec, work, kind, settings)
        except RuntimeError as error:
            if kind not in PEERS:
                raise
            skipped[name] = str(error).splitlines()[-1][:200]
            log = results.file.with_name(f"{name}.log")
            log.write_text(str(error), "utf-8")
            print(f"{name} is skipped: {skipped[name]}; more in {log}", flush=True)
            continue
        results.add(name, result)
        one = summary([result], options["warm"], options["device"] == "cuda")
        print(
            f"round {number + 1} {name}: {one['step'][0]:.3f} s a step, {one['supervised'][0]:.0f}"
            f" supervised tokens/s, {one['memory'][0]:.0f} MB, first step after"
            f" {one['first'][0]:.1f} s, last loss {one['loss'][0]:.4f}",
            flush=True,
        )
    return skipped


def main() -> int:
    """Run the missing contestants, then write table and plot."""
    arguments = [word for word in sys.argv[1:] if "=" in word and not word.startswith("--")]
    try:
        options = parsed(arguments)
    except ValueError as error:
        print(f"{error}\n\n{__doc__}", file=sys.stderr)
        return 2
    if "--prepare" in sys.argv:
        prepare(options, Path(sys.argv[sys.argv.index("--prepare") + 1]))
        return 0
    if "--install" in sys.argv:
        return install(options)
    if options["out"] is None:
        print(f"out=FOLDER is missing\n\n{__doc__}", file=sys.stderr)
        return 2
    out = Path(options["out"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    work, results = out / f"work-{work_key(options)}", Results(options, out)
    only_table, skipped = "--table" in sys.argv, dict[str, str]()
    try:
        if not only_table:
            prepare_in_process(options, arguments, work)
        if not (work / "spec.json").exists():
            print(f"{out} has no results of these options", file=sys.stderr)
            return 1
        spec = json.loads((work / "spec.json").read_text("utf-8"))
        if not only_table:
            skipped = run_all(options, spec, work, results)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    done = results.read()
    if not any(done.values()):
        print("no result yet", file=sys.stderr)
        return 1
    command = shlex.join(["python", "-m", "scripts.bench.train", *arguments])
    text = table(options, done, skipped, described(options, spec, done, command), spec)
    (out / "train.md").write_text(text, "utf-8")
    content = figures(options, done, text.partition("\n\n|")[0])
    (out / "train.json").write_text(json.dumps(content, indent=1), "utf-8")
    plot(options, done, out / "train.svg")
    print(f"\n{text}\n{out / 'train.md'}, {out / 'train.svg'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
