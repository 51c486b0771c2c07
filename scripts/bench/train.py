"""Training speed and memory of our program against a bare PyTorch loop, Hugging Face's Trainer, TRL's SFTTrainer and LitGPT.

    python -m scripts.bench.train out=runs/bench/chat data=chat
    python -m scripts.bench.train out=runs/bench/packed data=packed
    python -m scripts.bench.train out=runs/bench/8b shape=8b device=cuda

The same model, rows, tokens, labels, batches, precision, LoRA with its values at the start, optimiser (fused AdamW, clip 1.0, constant
rate), seed and logging at each step for all. That they do the same work is seen in the loss curves, whose largest difference from ours
stands in the table. Each runs in a process of its own, `rounds` times in turn; results go to OUT/results.jsonl, from which a stopped
benchmark goes on, then OUT/train.md and OUT/train.svg are written. After a change of the program take another OUT.

Contestants: ours (`python -m trainer` as it is), ours_packed (the same rows with packing=true; chat only), bare, hf, trl, litgpt; what
each of the last four is stands in its file in scripts/bench/peers/. `variants` adds more, by name: variants.compiled=[compile=true] gives
overrides of our config, variants.hf_bf16=[hf,adapter_dtype=bfloat16] the options adapter_dtype, autocast and gradient_checkpointing
of a peer.

Options, with their defaults:
  data=chat             chat: long prompts and short answers, padded to the longest row of each batch; packed: plain text of Python's
                        documentation in rows of exactly `length` tokens, all supervised, without padding
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

Step seconds are the median of the warm steps; tokens/s are of all of them together, as batches differ in length, and the processed
ones are rows' own, without padding. The table has medians over the rounds, with the least and the greatest. Peak memory is the
process's largest resident set, on a GPU what torch's allocator had at most. The first step counts from the command; tokenised rows are
in our cache by then, and the peers read them from a file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS: dict[str, Any] = {
    "out": None, "data": "chat", "task": ["task=bfcl"], "base": "smollm2_135m", "shape": None, "vocabulary": 128256, "length": None,
    "batch_size": 8, "steps": 14, "warm": 4, "rounds": 3, "group_by_length": False, "precision": "auto", "adapter_dtype": "float32",
    "autocast": False, "gradient_checkpointing": False, "rank": 16, "alpha": 32, "lr": 2e-4, "seed": 0, "device": "cpu", "threads": None,
    "contestants": ["ours", "ours_packed", "bare", "hf", "trl", "litgpt"], "variants": {}, "extra": [], "envs": "~/.cache/graft/bench",
    "minutes": None,
}  # fmt: skip
BIG = {"data": "packed", "batch_size": 2, "length": 2048}  # with a shape
PEERS = {"bare": "bare.py", "hf": "hf_trainer.py", "trl": "trl_sft.py", "litgpt": "litgpt_lora.py"}
ENVIRONMENTS = {"bare": "trl", "hf": "trl", "trl": "trl", "litgpt": "litgpt"}
REQUIREMENTS = {
    "trl": ["transformers", "peft", "accelerate", "datasets", "trl==1.16.0"],
    "litgpt": ["litgpt==0.5.13"],
}
# What the rows and the start depend on.
WORK = (
    "data", "task", "base", "shape", "vocabulary", "length", "batch_size", "steps", "group_by_length", "precision", "rank", "alpha", "lr",
    "seed", "device",
)  # fmt: skip
NOT_INSTALLED: dict[Path, str] = {}
OF_A_PEER = ("adapter_dtype", "autocast", "gradient_checkpointing")


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The options, from KEY=VALUE arguments.

    Raises:
        ValueError: an option or one of its values is unknown.
    """
    given: dict[str, Any] = OmegaConf.to_container(OmegaConf.from_dotlist(arguments))  # type: ignore[assignment]
    options = DEFAULTS | (BIG if given.get("shape") else {}) | given
    if unknown := sorted(set(options) - set(DEFAULTS)):
        raise ValueError(f"no option {', '.join(unknown)}")
    allowed = {
        "data": ("chat", "packed"), "shape": (None, "1b", "8b"), "precision": ("auto", "fp32", "bf16"), "device": ("cpu", "cuda"),
        "adapter_dtype": ("float32", "bfloat16"),
    }  # fmt: skip
    for name, values in allowed.items():
        if options[name] not in values:
            raise ValueError(f"{name}={options[name]}: it is one of {', '.join(map(str, values))}")
    if not 1 <= options["warm"] < options["steps"]:
        raise ValueError(
            f"warm={options['warm']}: at least one step is left out, and of steps={options['steps']} one must remain"
        )
    if options["length"] is None:
        options["length"] = 256 if options["data"] == "packed" else 1024
    contestants(options)
    return options


def contestants(options: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """Name -> (ours, ours_packed or a peer, what it is given), in their order.

    Raises:
        ValueError: a name is unknown.
    """
    found: dict[str, tuple[str, list[str]]] = {}
    for name in options["contestants"]:
        if name not in ("ours", "ours_packed", *PEERS):
            raise ValueError(
                f"no contestant {name}; there are ours, ours_packed, {', '.join(PEERS)}; others are variants.NAME=[...]"
            )
        if name != "ours_packed" or options["data"] == "chat":
            found[name] = name, []
    for name, given in options["variants"].items():
        kind, rest = (given[0], given[1:]) if given and given[0] in ("ours_packed", *PEERS) else ("ours", given)
        for item in rest if kind in PEERS else []:
            if item.partition("=")[0] not in OF_A_PEER:
                raise ValueError(f"variants.{name}: {item}: of a peer one can set {', '.join(OF_A_PEER)}")
        found[name] = kind, list(rest)
    return found


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


# The work, in a process that has our packages


def overrides(options: dict[str, Any], work: Path) -> list[str]:
    """Our config of the run, up to what only concerns its speed."""
    base = [f"base={options['base']}"]
    if options["shape"]:
        base = ["base=hf", f"base.path={work.parent / llama_name(options)}"]
    elif "/" in options["base"]:
        base = ["base=hf", f"base.path={options['base']}"]
    rows = [*options["task"], "overlong=drop", f"group_by_length={str(options['group_by_length']).lower()}"]
    if options["data"] == "packed":
        rows = ["task=completion", f"task.path={work / 'text.jsonl'}", "task.eval_fraction=0", "overlong=truncate"]
    precision = {"bf16": "bf16-true"}.get(options["precision"], options["precision"])
    return [
        *base, *rows, f"max_length={options['length']}", f"batch_size={options['batch_size']}", "max_epochs=null",
        f"max_steps={options['steps']}", f"precision={precision}", f"adapter.rank={options['rank']}", f"adapter.alpha={options['alpha']}",
        f"optimizer.lr={options['lr']}", "schedule=constant", "schedule.warmup=0", f"seed={options['seed']}",
        f"lightning={'gpu' if options['device'] == 'cuda' else 'cpu'}", "callbacks.evaluation=null", "callbacks.checkpoints=null",
        "callbacks.progress.every=1", "logger=none",
    ]  # fmt: skip


def prepare(options: dict[str, Any], work: Path) -> None:
    """Write what all contestants are given: WORK/rows.json, start/ and, last, spec.json."""
    import lightning
    import torch

    from adapters.delta import Start
    from trainer import assembly, config
    from trainer.base import compute

    assembly.quiet()
    work.mkdir(parents=True, exist_ok=True)
    if options["shape"]:
        random_llama(options, work.parent / llama_name(options))
    (work / "text.jsonl").write_text("\n", "utf-8")  # composing asks for no more than the name
    plain: dict[str, Any] = OmegaConf.to_container(config.compose(overrides(options, work)), resolve=True)  # type: ignore[assignment]
    base = assembly.instantiate(plain["base"])
    if options["data"] == "packed":
        rows = texts(base.tokenizer, options["length"])
        (work / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), "utf-8")
    found = assembly.tokenised(plain, base, assembly.instantiate(plain["task"]))
    assert found.train is not None
    plan = assembly.plan(plain, found, 1)
    steps = []
    for step in range(options["steps"]):
        (picks,) = plan.micro_batches(step)
        tokens = [found.train[pick][1][0] for pick in picks]
        steps.append([labelled(row.ids, row.trained) for row in tokens])
    if options["data"] == "packed":
        assert all(
            len(row["input_ids"]) == options["length"] and -100 not in row["labels"][1:] for rows in steps for row in rows
        )
    (work / "rows.json").write_text(json.dumps(steps), "utf-8")

    dtype, _, precision = compute(plain["precision"], "auto", False, options["device"] == "cuda")
    model = base.load(dtype, device=torch.device(options["device"]))
    lightning.seed_everything(options["seed"], verbose=False)  # as trainer.run does before it attaches the adapter
    adapter = assembly.instantiate(plain["adapter"])
    adapter.save(adapter.attach(model, Start(steps=options["steps"])), work / "start", base.path, "CAUSAL_LM")
    spec = {
        "model": str(Path(base.path).resolve()), "rows": str(work / "rows.json"), "start": str(work / "start/adapter_model.safetensors"),
        "litgpt": str(work.parent / f"litgpt-{digest(str(base.path))}-{str(dtype)[6:]}"), "pad": base.tokenizer.pad_token_id,
        "dtype": str(dtype).removeprefix("torch."), "precision": precision, "mean_length": float(found.train.rows.lengths.mean()),
        **{name: options[name] for name in ("batch_size", "steps", "rank", "alpha", "lr", "seed", "device")},
    }  # fmt: skip
    (work / "spec.json").write_text(json.dumps(spec, indent=2), "utf-8")


def labelled(ids: list[int], trained: list[bool]) -> dict[str, list[int]]:
    """A row as transformers' trainers take it; nothing predicts its first token."""
    labels = [token if flag else -100 for token, flag in zip(ids, trained, strict=True)]
    return {"input_ids": list(ids), "labels": [-100, *labels[1:]]}


def texts(tokenizer: Any, length: int) -> list[str]:
    """Python's documentation in pieces of a little more than `length` tokens, to be cut there."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode()
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # Cut anew, a piece's ends may be other tokens than within the text.
    pieces = [text[offsets[at][0] : offsets[at + length + 8][1]] for at in range(0, len(offsets) - length - 8, length)]
    return [piece for piece in pieces if len(tokenizer(piece, add_special_tokens=False)["input_ids"]) >= length]


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
    from trainer import assembly, config

    plain: Any = OmegaConf.to_container(config.compose(["base=tiny", "task=viggo", "task.path=x"]), resolve=True)
    sizes: Any = SHAPES[options["shape"]]
    settings = LlamaConfig(
        vocab_size=options["vocabulary"], tie_word_embeddings=True, max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options["device"]):
        model = LlamaForCausalLM(settings)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    assembly.instantiate(plain["base"]).tokenizer.save_pretrained(folder)
    (folder / "done").touch()


# The contestants, each in a process of its own


def interpreter(peer: str, envs: str) -> str:
    """The Python that a peer runs in; its environment is made where it is missing.

    Raises:
        RuntimeError: it cannot be made.
    """
    if envs == "here":
        return sys.executable
    name = ENVIRONMENTS[peer]
    folder = Path(envs).expanduser() / name
    python, marker = folder / "bin" / "python", folder / "installed.txt"
    torch = importlib.metadata.version("torch")
    wanted = [f"torch=={torch}", *REQUIREMENTS[name]]
    if marker.exists() and marker.read_text() == "\n".join(wanted):
        return str(python)
    if folder in NOT_INSTALLED:  # for another peer of this environment
        raise RuntimeError(NOT_INSTALLED[folder])
    print(f"installing {', '.join(wanted)} into {folder}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"not installed: envs={envs}: {error}") from None
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    # LitGPT holds an older huggingface_hub: of ours it is only given what it computes with.
    shared = (
        constraints
        if name == "trl"
        else [line for line in constraints if re.match("(torch|lightning|numpy|safetensors)==", line)]
    )
    (folder / "constraints.txt").write_text("\n".join(shared) + "\n")
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-q",
        "-c",
        str(folder / "constraints.txt"),
        *wanted,
    ]
    index = [
        "--extra-index-url",
        "https://download.pytorch.org/whl/cpu",
    ]  # where torch's CPU builds are, if nobody nearer has them
    attempts = [[sys.executable, "-m", "venv", str(folder)], pip]
    for number, command in enumerate(attempts):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and number == 1 and "+cpu" in torch:
            done = subprocess.run([*command, *index], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
            NOT_INSTALLED[folder] = f"not installed: {lines[-1][:200] if lines else shlex.join(command)}"
            raise RuntimeError(NOT_INSTALLED[folder])
    marker.write_text("\n".join(wanted))
    return str(python)


def environment(options: dict[str, Any]) -> dict[str, str]:
    """The variables of a contestant's process."""
    threads = {"OMP_NUM_THREADS": str(options["threads"])} if options["threads"] else {}
    # One GPU or none: transformers' Trainer would take all that it sees.
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] if options["device"] == "cuda" else ""
    return os.environ | threads | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": seen}


def waited(command: list[str], env: dict[str, str], watch: Callable[[], bool] | None = None) -> tuple[float, float | None]:
    """(when a command began, when `watch` first held), wall-clock times.

    Raises:
        RuntimeError: it failed; the end of what it said.
    """
    with tempfile.TemporaryFile("w+") as log:
        began, held = time.time(), None
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT)
        while watch is not None and held is None and process.poll() is None:
            if watch():
                held = time.time()
            time.sleep(0.01)
        if process.wait():
            log.seek(0)
            raise RuntimeError(log.read()[-3000:].strip() or f"{shlex.join(command)} ended with {process.returncode}")
        if held is None and watch is not None and watch():
            held = time.time()
    return began, held


def packed(spec: dict[str, Any], length: int) -> list[str]:
    """Packing with as many tokens in a step as the padded rows have, as far as whole sequences allow."""
    return [
        "packing=true",
        "group_by_length=false",
        f"batch_size={max(1, round(spec['batch_size'] * spec['mean_length'] / length))}",
    ]


def run_ours(options: dict[str, Any], spec: dict[str, Any], work: Path, kind: str, given: list[str]) -> dict[str, Any]:
    """One run of our program."""
    with tempfile.TemporaryDirectory() as temporary:
        journal, result = Path(temporary) / "runs" / "bench" / "metrics.jsonl", Path(temporary) / "result.json"
        settings = [
            *overrides(options, work), f"adapter.dtype={options['adapter_dtype'] if spec['dtype'] == 'bfloat16' else 'float32'}",
            f"objective.gradient_checkpointing={str(options['gradient_checkpointing']).lower()}",
            *(packed(spec, options["length"]) if kind == "ours_packed" else []), *options["extra"], *given,
            "name=bench", f"runs={journal.parents[1]}",
        ]  # fmt: skip
        command = [sys.executable, str(ROOT / "scripts/bench/peers/ours.py"), str(result), *settings]
        env = environment(options) | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        began, first = waited(command, env, lambda: journal.exists() and '"kind": "step"' in journal.read_text("utf-8"))
        rows = [row for row in map(json.loads, journal.read_text("utf-8").splitlines()) if row["kind"] == "step"]
        found = json.loads(result.read_text("utf-8"))
    seconds = [0.0, *(row["seconds"] for row in rows)]
    tokens = [0, *(row["tokens"] for row in rows)]
    found |= {
        "losses": [row["loss"] for row in rows], "seconds": [b - a for a, b in itertools.pairwise(seconds)][1:],
        "processed": [b - a for a, b in itertools.pairwise(tokens)],
        "supervised": [round(row["trained_per_s"] * (b - a)) for row, (a, b) in zip(rows, itertools.pairwise(seconds), strict=True)],
        "first": first - began if first else None, "overrides": settings,
    }  # fmt: skip
    return found


def run_peer(options: dict[str, Any], spec: dict[str, Any], kind: str, given: list[str]) -> dict[str, Any]:
    """One run of a peer."""
    python = interpreter(kind, options["envs"])
    own: Any = OmegaConf.to_container(OmegaConf.from_dotlist(given))
    settings = spec | {name: options[name] for name in OF_A_PEER} | own
    script = str(ROOT / "scripts/bench/peers" / PEERS[kind])
    env = {name: value for name, value in environment(options).items() if name != "PYTHONPATH" or options["envs"] == "here"}
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
        "seconds": [b - a for a, b in itertools.pairwise(ends)], "first": ends[0] - began,
        "processed": [sum(len(row["input_ids"]) for row in rows) for rows in steps],
        "supervised": [sum(label != -100 for row in rows for label in row["labels"]) for rows in steps],
    }  # fmt: skip


def turns(names: list[str], rounds: int) -> list[tuple[int, str]]:
    """(round, name) of all runs: each round begins with another one, since who runs first finds files that are not in memory yet."""
    return [(number, names[(number + at) % len(names)]) for number in range(rounds) for at in range(len(names))]


# What is made of the results


def summary(runs: list[dict[str, Any]], warm: int, cuda: bool) -> dict[str, list[float]]:
    """Of each round: the median warm step, tokens/s of all warm steps, peak memory in MB, seconds to the first step, the last loss."""
    found: dict[str, list[float]] = {name: [] for name in ("step", "processed", "supervised", "memory", "first", "loss")}
    for run in runs:
        seconds = run["seconds"][warm - 1 :]
        found["step"].append(statistics.median(seconds))
        for name in ("processed", "supervised"):
            found[name].append(sum(run[name][warm:]) / sum(seconds))
        found["memory"].append((run["peak_gpu"] if cuda else run["peak_rss"]) / 1e6)
        found["first"].append(run["first"])
        found["loss"].append(run["losses"][-1])
    return found


def difference(run: dict[str, Any], ours: dict[str, Any] | None) -> float | None:
    """The largest difference of two loss curves; None where their steps did not have the same tokens."""
    if ours is None or any(run[name] != ours[name] for name in ("processed", "supervised")):
        return None
    return max(abs(a - b) for a, b in zip(run["losses"], ours["losses"], strict=True))


def ratios(names: dict[str, dict[str, list[float]]], ours: str, peer: str) -> dict[str, float]:
    """Medians over the rounds of both: our supervised tokens/s, memory and seconds to the first step, each over the peer's."""
    pairs = {"supervised": "speed", "memory": "memory", "first": "start"}
    return {
        label: statistics.median(a / b for a, b in zip(names[ours][key], names[peer][key], strict=False))
        for key, label in pairs.items()
    }


def cell(values: list[float], form: str) -> str:
    """A median, with the least and the greatest behind it."""
    text = format(statistics.median(values), form)
    return text if len(values) == 1 else f"{text} ({min(values):{form}}-{max(values):{form}})"


def table(options: dict[str, Any], results: dict[str, list[dict[str, Any]]], skipped: dict[str, str], about: str) -> str:
    """train.md."""
    cuda, who = options["device"] == "cuda", contestants(options)
    found = {name: summary(runs, options["warm"], cuda) for name, runs in results.items() if runs}
    ours = results["ours"][0] if results.get("ours") else None
    memory = "peak GPU MB" if cuda else "peak RSS MB"
    lines = [
        about,
        "",
        f"| contestant | step s | processed tokens/s | supervised tokens/s | {memory} | first step s | last loss | loss from ours | rounds |",
        "|---" * 9 + "|",
    ]
    for name in who:
        if name not in found:
            lines.append(f"| {name} | skipped: {skipped.get(name, 'not run yet')} |" + " |" * 7)
            continue
        numbers, apart = found[name], difference(results[name][0], ours)
        lines.append(
            f"| {name} | {cell(numbers['step'], '.3f')} | {cell(numbers['processed'], '.1f')} | {cell(numbers['supervised'], '.1f')} "
            f"| {cell(numbers['memory'], '.0f')} | {cell(numbers['first'], '.2f')} | {statistics.median(numbers['loss']):.4f} "
            f"| {'other batches' if apart is None else f'{apart:.1e}'} | {len(numbers['step'])} |"
        )
    peers = [name for name, (kind, _) in who.items() if kind in PEERS and name in found]
    mine = [name for name, (kind, _) in who.items() if kind not in PEERS and name in found]
    if peers and mine:
        lines += [
            "", "Ours over the peer's, medians of the rounds: supervised tokens/s (more is better), peak memory and time to the first step "
            "(less is better).", "", "| | " + " | ".join(f"{name}: speed, memory, start" for name in mine) + " |", "|---" * (1 + len(mine)) + "|",
        ]  # fmt: skip
        for peer in peers:
            cells = [", ".join(f"{value:.2f}x" for value in ratios(found, name, peer).values()) for name in mine]
            lines.append(f"| {peer} | {' | '.join(cells)} |")
    changed = [f"{name}: {' '.join(given)}" for name, (_, given) in who.items() if given]
    lines += ["", *(f"- {line}" for line in changed)] if changed else []
    return "\n".join(lines) + "\n"


def bars(options: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[list[str], list[list[float]]]]:
    """What the plot shows: title -> (contestants, each one's values of the rounds)."""
    cuda = options["device"] == "cuda"
    found = {name: summary(runs, options["warm"], cuda) for name, runs in results.items() if runs}
    names = [name for name in contestants(options) if name in found]
    titles = {"supervised tokens/s": "supervised", "peak memory, MB": "memory", "seconds to the first step": "first"}
    return {title: (names, [found[name][key] for name in names]) for title, key in titles.items()}


def plot(options: dict[str, Any], results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """train.svg: medians as bars, from the least to the greatest as lines."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = bars(options, results)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6))
    for axis, (title, (names, values)) in zip(axes, panels.items(), strict=True):
        medians = [statistics.median(each) for each in values]
        spread = [
            [m - min(v) for m, v in zip(medians, values, strict=True)],
            [max(v) - m for m, v in zip(medians, values, strict=True)],
        ]
        kinds = contestants(options)
        axis.bar(
            names,
            medians,
            yerr=spread,
            capsize=3,
            color=["#888888" if kinds[name][0] in PEERS else "#2b6cb0" for name in names],
        )
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=45)
    figure.tight_layout()
    figure.savefig(file)


def described(options: dict[str, Any], spec: dict[str, Any], results: dict[str, list[dict[str, Any]]], command: str) -> str:
    """Machine, versions, work and command."""
    import psutil

    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next(
            (line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu
        )
    every = [run for runs in results.values() for run in runs]
    versions = {
        name: sorted({run["versions"][name] for run in every if name in run["versions"]})
        for name in ("torch", "transformers", "peft", "trl", "litgpt")
    }
    gpus, threads = (
        sorted({run["gpu"] for run in every if run["gpu"]}),
        sorted({run["threads"] for run in every if run["threads"]}),
    )
    steps = json.loads(Path(spec["rows"]).read_text("utf-8"))[options["warm"] :]
    real = statistics.mean(sum(len(row["input_ids"]) for row in rows) for rows in steps)
    trained = statistics.mean(sum(label != -100 for row in rows for label in row["labels"]) for rows in steps)
    wide = statistics.mean(len(rows) * (-(-max(len(row["input_ids"]) for row in rows) // 8) * 8) for rows in steps)
    model = f"a Llama of {options['shape']} with random weights" if options["shape"] else options["base"]
    lines = [
        f"# Training speed: {options['data']}, {model}",
        "",
        f"{cpu}, {os.cpu_count()} cores, {'/'.join(map(str, threads)) or '?'} threads, {psutil.virtual_memory().total / 2**30:.0f} GiB"
        + (f"; {', '.join(gpus)}" if gpus and options["device"] == "cuda" else "")
        + f"; Python {platform.python_version()}, "
        + ", ".join(f"{name} {'/'.join(found)}" for name, found in versions.items() if found)
        + ".",
        f"A warm step: {len(steps[0])} rows, {wide:.0f} positions, {real:.0f} of them tokens, {trained:.0f} of these supervised. "
        f"{spec['precision']}, adapters in {options['adapter_dtype'] if spec['dtype'] == 'bfloat16' else 'float32'}"
        + (" (LitGPT: bfloat16)" if spec["dtype"] == "bfloat16" and not options["autocast"] else "")
        + f"; LoRA r={options['rank']} alpha={options['alpha']} on all linear layers, fused AdamW at {options['lr']:g}, clip 1.0; "
        f"{options['steps']} steps, the first {options['warm']} left out.",
        "",
        f"    {command}",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run what is missing, then write table and plot."""
    plain = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("--")]
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
        rows = [json.loads(line) for line in lines.read_text("utf-8").splitlines()] if lines.exists() else []
        return {name: [row for row in rows if row["name"] == name and row["key"] == keys[name]] for name in who}

    skipped: dict[str, str] = {}
    if "--table" not in sys.argv and not (work / "spec.json").exists():
        env = environment(options) | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        try:
            waited([sys.executable, "-m", "scripts.bench.train", *plain, "--prepare", str(work)], env)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    if not (work / "spec.json").exists():
        print(f"{out} has no results of these options", file=sys.stderr)
        return 1
    spec = json.loads((work / "spec.json").read_text("utf-8"))
    for round_, name in turns(list(who), options["rounds"]) if "--table" not in sys.argv else ():
        late = options["minutes"] is not None and time.monotonic() - started > 60 * options["minutes"]
        if late or name in skipped or len(results()[name]) > round_:
            continue
        kind, given = who[name]
        try:
            found = run_peer(options, spec, kind, given) if kind in PEERS else run_ours(options, spec, work, kind, given)
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
            f"round {round_ + 1} {name}: {one['step'][0]:.3f} s a step, {one['supervised'][0]:.0f} supervised tokens/s, {one['memory'][0]:.0f} MB, "
            f"first step after {one['first'][0]:.1f} s, last loss {one['loss'][0]:.4f}",
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
