"""Time from the command to the first optimiser step: the program against plain scripts of
transformers' Trainer and of TRL's SFTTrainer. All have a LoRA (stock PEFT's in the scripts) on the
same model, rows, batch size and precision, and run in turn, each in a new process.

    python -m scripts.bench.startup [repeats=3] [rows=1000] [length=128] [batch_size=2]
        [precision=auto] [base=smollm2_135m] [contestants=[ours,hf]] [caches=[cold,warm]]
        [trl=PYTHON] [short=true] [json=FILE] [extra=[]]

Prints medians of wall and, in brackets, processor seconds from the start of the process to: rows as
tokens (data), the model in memory with its adapter (model), the first optimiser step done (step);
and the ratios of each round. cold: rows are tokenised; warm: an earlier start has cached them.
trl=PYTHON is the python of an environment with trl, which adds trl to the contestants. short: also
time --help and a wrong key. The operating system's file cache is warm for all: the first start of
each contestant is not counted.

The rows are chats of about `length` words from a seeded generator. The plain scripts load, tokenise
with the chat template, mask nothing and do not log, like the program with task.train_on=everything
and logger=none. Neither writes a checkpoint before the first step.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.options import parse

DEFAULTS: dict[str, Any] = {
    "repeats": 3,
    "rows": 1000,
    "length": 128,
    "batch_size": 2,
    "precision": "auto",
    "base": "smollm2_135m",
    "contestants": ["ours", "hf"],
    "caches": ["cold", "warm"],
    "trl": None,
    "short": True,
    "json": None,
    "extra": [],
}
STAGES = ("data", "model", "step")
MARK = "reached: "  # what the plain scripts print before a stage's name
# The program's log lines that end a stage; `data` is the last thing said before the model is asked
# for.
SAID = {
    "data": re.compile(r"INFO\s+loading "),
    "model": re.compile(r"INFO\s+trained: "),
    "step": re.compile(r"INFO\s+step 1\b"),
}

PEER = (
    """
import sys, json
kind, base, rows, out, dtype, batch_size = sys.argv[1:]
import torch, datasets, transformers, peft
if kind == "trl":
    import trl
def reached(stage):
    print("%s" + stage, flush=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(base)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
data = datasets.load_dataset("json", data_files=rows, split="train")
shared = dict(
    per_device_train_batch_size=int(batch_size), max_steps=2, learning_rate=1e-4, report_to=[],
    save_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    optim="adamw_torch_fused", logging_steps=1, bf16=False, seed=0,
)
lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
class Steps(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **more):
        if state.global_step == 1:
            reached("step")
def loaded():
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
if kind == "hf":
    def tokens(batch):
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in batch["messages"]]
        ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=1024)
        return {"input_ids": ids["input_ids"]}
    data = data.map(tokens, batched=True, remove_columns=data.column_names)
    reached("data")
    model = peft.get_peft_model(loaded(), lora)
    reached("model")
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(out, **shared), train_dataset=data,
        callbacks=[Steps()],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
else:
    model = loaded()
    shared["bf16"] = False
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=out, max_length=1024, gradient_checkpointing=False, **shared
        ),
        train_dataset=data, processing_class=tokenizer, peft_config=lora, callbacks=[Steps()],
    )
    reached("data")
    reached("model")
trainer.train()
""".lstrip()
    % MARK
)


def chats(rows: int, length: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return conversations of one question and one answer, of `length` words together."""
    draw = random.Random(seed)
    words = [
        "the",
        "river",
        "seven",
        "moves",
        "slowly",
        "blue",
        "engine",
        "because",
        "under",
        "light",
        "paper",
        "often",
        "round",
        "green",
    ]

    def text(count: int) -> str:
        return " ".join(draw.choice(words) for _ in range(max(1, count)))

    return [
        {
            "messages": [
                {"role": "user", "content": text(length // 2)},
                {"role": "assistant", "content": text(length - length // 2)},
            ]
        }
        for _ in range(rows)
    ]


def stage_of(line: str) -> str | None:
    """Return the stage that a line of output reports."""
    if line.startswith(MARK):
        return line.removeprefix(MARK).strip()
    return next((stage for stage, table_rows in SAID.items() if table_rows.match(line)), None)


def processor_seconds(stat: str, ticks: int) -> float:
    """Return user and system seconds of a process and its ended children, from its
    /proc/PID/stat."""
    fields = stat.rpartition(")")[2].split()  # from the third field on; a name may have spaces
    return sum(int(fields[i]) for i in (11, 12, 13, 14)) / ticks


def timed(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Return the time of each stage since the start of `command`. It is stopped after its first
    step.

    Raises:
        SystemExit: it ended before.
    """
    ticks, reached, lines = os.sysconf("SC_CLK_TCK"), dict[str, tuple[float, float]](), list[str]()
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        errors="replace",
    )
    guard = threading.Timer(550, process.kill)
    guard.start()
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        stage = stage_of(line)
        if stage is not None and stage not in reached:
            spent = processor_seconds(Path(f"/proc/{process.pid}/stat").read_text(), ticks)
            reached[stage] = (time.perf_counter() - started, spent)
        if stage == "step":
            process.kill()
    process.wait()
    guard.cancel()
    if "step" not in reached:
        raise SystemExit(f"{' '.join(command)[:400]}\nmade no step:\n{''.join(lines[-30:])}")
    return {stage: {"wall": wall, "processor": spent} for stage, (wall, spent) in reached.items()}


def short(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Return wall and processor seconds of a command that ends by itself."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    wall, after = time.perf_counter() - started, os.times()
    spent = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return {"wall": wall, "processor": spent}


def program(options: dict[str, Any], folder: str, rows: Path, runs: str) -> list[str]:
    """Return the command of our run."""
    return [
        sys.executable,
        "-m",
        "trainer",
        "base=hf",
        f"base.path={folder}",
        "task=sft",
        f"task.path={rows}",
        "task.eval_fraction=0",
        "task.train_on=everything",
        "max_steps=2",
        f"batch_size={options['batch_size']}",
        f"precision={options['precision']}",
        "adapter.rank=16",
        "adapter.alpha=32",
        "optimizer.lr=1e-4",
        "callbacks.evaluation=null",
        "callbacks.checkpoints=null",
        "logger=none",
        f"runs={runs}",
        *options["extra"],
    ]


def described(options: dict[str, Any]) -> tuple[str, str]:
    """Return (folder of the base, the dtype that `precision` gives it)."""
    from trainer.assembly.build import instantiate
    from trainer.config import compose
    from trainer.models import precision

    plain: Any = OmegaConf.to_container(
        compose.compose(
            [
                f"base={options['base']}",
                "task=sft",
                "task.path=x",
                f"precision={options['precision']}",
            ]
        ),
        resolve=True,
    )
    import torch

    dtype, _, _ = precision.compute(
        plain["precision"], plain["base"]["dtype"], False, torch.cuda.is_available()
    )
    return instantiate(plain["base"]).path, str(dtype).removeprefix("torch.")


def medians(results: list[dict[str, Any]], key: str = "wall") -> dict[str, float]:
    """Return the median of each stage over the rounds."""
    return {stage: statistics.median(result[stage][key] for result in results) for stage in STAGES}


def ratios(
    ours: list[dict[str, Any]], other: list[dict[str, Any]], key: str = "wall"
) -> list[float]:
    """Return our time to the first step over another's, round by round."""
    return [a["step"][key] / b["step"][key] for a, b in zip(ours, other, strict=True)]


def table(by_cache: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Return a table of the medians of each cache and contestant, and the ratios."""
    lines = [
        "| cache | | " + " | ".join(f"{stage}, s" for stage in STAGES) + " |",
        "|---" * (2 + len(STAGES)) + "|",
    ]
    table_rows = []
    for cache, of in by_cache.items():
        for name, results in of.items():
            wall, spent = medians(results), medians(results, "processor")
            lines.append(
                f"| {cache} | {name} | "
                + " | ".join(f"{wall[s]:.2f} ({spent[s]:.2f})" for s in STAGES)
                + " |"
            )
            if name != "ours" and "ours" in of:
                both = [ratios(of["ours"], results, key) for key in ("wall", "processor")]
                table_rows.append(
                    f"{cache}, ours / {name} to the first step: {statistics.median(both[0]):.3f}"
                    f" wall ({', '.join(f'{one:.3f}' for one in both[0])}),"
                    f" {statistics.median(both[1]):.3f} processor"
                )
    return "\n".join([*lines, "", *table_rows])


SHORT = {"--help": ["--help"], "a wrong key": ["task=sft", "task.path=x", "no_such_key=1"]}


def start(
    name: str, cache: str, folder: Path, base: str, dtype: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Start a contestant once, with caches below `cache`, and time its stages."""
    environment = {
        **os.environ,
        "GRAFT_CACHE": f"{cache}/graft",
        "HF_DATASETS_CACHE": f"{cache}/datasets",
        "HF_HUB_OFFLINE": "1",
    }
    rows = folder / "rows.jsonl"
    with tempfile.TemporaryDirectory(dir=folder) as out:
        if name == "ours":
            return timed(program(options, base, rows, out), environment)
        python = options["trl"] if name == "trl" else sys.executable
        environment.pop("PYTHONPATH", None)
        arguments = [name, base, str(rows), out, dtype, str(options["batch_size"])]
        return timed([python, str(folder / "peer.py"), *arguments], environment)


def main() -> int:
    """Start each contestant `repeats` times in turn, with a cold cache and a warm one."""
    options = parse(DEFAULTS, __doc__)
    names = list(options["contestants"])
    if options["trl"] and "trl" not in names:
        names.append("trl")
    base, dtype = described(options)
    results: dict[str, Any] = {cache: {name: [] for name in names} for cache in options["caches"]}
    quick: dict[str, list[dict[str, float]]] = {name: [] for name in SHORT if options["short"]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = chats(options["rows"], options["length"])
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "peer.py").write_text(PEER)

        def once(name: str, cache: str) -> dict[str, Any]:
            return start(name, cache, folder, base, dtype, options)

        for name in names:
            once(name, f"{folder}/warm")
        for repeat in range(options["repeats"]):
            for cache in options["caches"]:
                for name in names[repeat % 2 :] + names[: repeat % 2]:
                    with tempfile.TemporaryDirectory(dir=folder) as cold:
                        result = once(name, f"{folder}/warm" if cache == "warm" else cold)
                    results[cache][name].append(result)
                    steps = "  ".join(
                        f"{s} {result[s]['wall']:.2f} ({result[s]['processor']:.2f})"
                        for s in STAGES
                    )
                    print(f"round {repeat + 1} {cache} {name}: {steps}", flush=True)
            for name, times in quick.items():
                command = [sys.executable, "-m", "trainer", *SHORT[name]]
                times.append(short(command, dict(os.environ)))
    print(f"\n{table(results)}")
    for name, times in quick.items():
        wall, spent = (
            statistics.median(one[key] for one in times) for key in ("wall", "processor")
        )
        print(f"{name}: {wall:.2f} s ({spent:.2f})")
    print(
        f"{os.cpu_count()} cores, {platform.machine()}, {dtype}, {options['rows']} rows of about"
        f" {options['length']} words"
    )
    if options["json"]:
        text = json.dumps({"options": options, "found": results, "short": quick})
        Path(options["json"]).write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
