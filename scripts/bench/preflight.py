"""Speed of preparing and checking a run's rows: rows per minute on one core, from files to
preflight's report, in stages.

    python -m scripts.bench.preflight prompts=FILE [rows=20000] [repeats=1] [plain_rows=5000]
        [max_length=1024] [ways=[...]] [extra=[...]] [json=FILE]

FILE, or a list of files, is JSON lines of chats or of prompts and answers. Its rows are repeated up
to `rows`, each time with other numbers in their texts, so that no two are equal and no cache helps.
Each measurement is a process with one thread. The ways run in turn, `repeats` times. The table
shows medians, by processor time and by wall clock. Ways:

    cold        everything that preflight does before it prints: reading, rendering, masks, tokens,
                the cache's files, batches, checks
    warm        the same again, with the tokens in the cache
    stages      cold, with the time of each stage; measuring them costs a little
    encode      tokenizer(texts) on the rendered rows, in batches of 1000: tokens alone, the lower
                limit of all ways but warm
    map_rows    datasets.map row by row with apply_chat_template(tokenize=True): tokens only, no
                mask, no check (on `plain_rows` rows)
    map_batch   datasets.map with apply_chat_template(tokenize=True) on batches of 1000 chats:
                tokens only
    map_masked  map_batch, and the prompts again; their lengths show which tokens are trained, as
                in plain SFT trainers

All ways but map_rows prepare `rows` rows. Loading the tokenizer and libraries is not measured.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench import processes
from scripts.bench.options import parse
from scripts.bench.stages import Stages

DEFAULTS: dict[str, Any] = {
    "prompts": None,
    "rows": 20000,
    "repeats": 1,
    "plain_rows": 5000,
    "max_length": 1024,
    "extra": [],
    "json": None,
    "ways": ["cold", "warm", "stages", "encode", "map_rows", "map_batch", "map_masked"],
}
PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("target", "meaning_representation"),
    ("instruction", "output"),
)
BATCH = 1000


def messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row as a chat.

    Raises:
        ValueError: neither a chat nor one of the known pairs.
    """
    if "messages" in row:
        return row["messages"]
    for question, answer in PAIRS:
        if question in row and answer in row:
            return [
                {"role": "user", "content": row[question]},
                {"role": "assistant", "content": row[answer]},
            ]
    raise ValueError(
        f"the columns {', '.join(row)} are neither messages nor"
        f" {', '.join('/'.join(pair) for pair in PAIRS)}: give other prompts=FILE"
    )


def varied(
    chats: list[list[dict[str, str]]], count: int, seed: int = 0
) -> Iterator[list[dict[str, str]]]:
    """Yield `count` chats: `chats` repeatedly, with other digits in their texts, and each with its
    number."""
    draw = random.Random(seed)
    for number, chat in enumerate(itertools.islice(itertools.cycle(chats), count)):
        texts = [
            re.sub(r"\d", lambda _: str(draw.randrange(10)), message["content"]) for message in chat
        ]
        texts[0] = f"{texts[0]} ({number})"
        yield [{**message, "content": text} for message, text in zip(chat, texts, strict=True)]


def overrides(options: dict[str, Any], file: str) -> list[str]:
    """Return the overrides of the run that is prepared."""
    return [
        f"task.path={file}",
        "task.eval_fraction=0.02",
        f"max_length={options['max_length']}",
        "precision=fp32",
        "lightning=cpu",
        "logger=none",
        *options["extra"],
    ]


def ours(options: dict[str, Any], file: str, stages: Stages | None = None) -> dict[str, Any]:
    """Run preflight on the rows, without printing. Returns {seconds, cpu_seconds, rows, tokens, and
    the stages' times if they are watched}."""
    from trainer.assembly import quiet
    from trainer.assembly.build import instantiate
    from trainer.assembly.recipe import Recipe
    from trainer.config import compose
    from trainer.data import rows as data_rows
    from trainer.data.render import Renderer
    from trainer.session.inspect import inspect

    quiet.quiet()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    plain: dict[str, Any] = OmegaConf.to_container(
        compose.compose(overrides(options, file)), resolve=True
    )  # type: ignore[assignment]
    base = instantiate(plain["base"])
    adapter = instantiate(plain["adapter"])
    base.tokenizer("loaded")
    base.skeleton(None)
    watch = stages or Stages()
    if stages is not None:
        from tasks.sft import SFT

        for owner, method, name, wrap in (
            (SFT, "examples", "read", watch.each),
            (Renderer, "_jinja", "render", watch.watched),
            (Renderer, "_spans", "render", watch.watched),
            (Renderer, "_encode", "tokenise", watch.watched),
            (Renderer, "_aligned", "mask", watch.watched),
            (data_rows, "take", "count", watch.watched),
            (data_rows, "_write", "write", watch.watched),
        ):
            setattr(owner, method, wrap(name, getattr(owner, method)))
    started = time.perf_counter(), time.process_time()
    with watch.within("rest"):
        recipe = Recipe.of(plain, adapter)
    with watch.within("check"):
        result = inspect(recipe, Path(file).parent)
    wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
    if result["errors"]:
        raise SystemExit("\n".join(result["errors"]))
    parts = [result["data"][split] for split in ("train", "eval")]
    rows, tokens = (sum(part[key] for part in parts) for key in ("rows", "tokens"))
    times = {"seconds": wall, "cpu_seconds": processor, "rows": rows, "tokens": tokens}
    return times | ({"stages": watch.seconds} if stages is not None else {})


class Tokens:
    """datasets.map's functions with a tokenizer's chat template."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Tokenise a chat."""
        return {"input_ids": self._ids(row["messages"])}

    def batch(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """Tokenise a batch of chats."""
        return {"input_ids": self._ids(rows["messages"])}

    def masked(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """Tokenise a batch of chats, and mark the tokens of the answers."""
        ids = self._ids(rows["messages"])
        prompts = self._ids([chat[:-1] for chat in rows["messages"]], add_generation_prompt=True)
        masks = [[0] * len(p) + [1] * (len(i) - len(p)) for i, p in zip(ids, prompts, strict=True)]
        return {"input_ids": ids, "completion_mask": masks}

    def _ids(self, chats: Any, **more: Any) -> Any:
        return self.tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True, **more)[
            "input_ids"
        ]


def plain(options: dict[str, Any], file: str, way: str) -> dict[str, Any]:
    """Prepare the rows with datasets.map, or with the tokenizer alone. The result is that of
    `ours`."""
    import datasets

    from trainer.assembly import quiet
    from trainer.assembly.build import instantiate
    from trainer.config import compose

    quiet.quiet()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    config: dict[str, Any] = OmegaConf.to_container(
        compose.compose(overrides(options, file)), resolve=True
    )  # type: ignore[assignment]
    tokenizer = instantiate(config["base"]).tokenizer
    tokenizer.apply_chat_template([{"role": "user", "content": "loaded"}], tokenize=True)
    if way == "encode":
        chats = [json.loads(line)["messages"] for line in Path(file).read_bytes().splitlines()]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter(), time.process_time()
        if way == "encode":
            lengths = encoded(tokenizer, texts)
        else:
            table = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)
            lengths = mapped(Tokens(tokenizer), table, way, options["plain_rows"])
        wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
    counts = {"rows": len(lengths), "tokens": sum(lengths)}
    return {"seconds": wall, "cpu_seconds": processor} | counts


def encoded(tokenizer: Any, texts: list[str]) -> list[int]:
    """Tokenise texts in batches; return the rows' lengths."""
    parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    return [
        len(ids) for part in parts for ids in tokenizer(part, add_special_tokens=False)["input_ids"]
    ]


def mapped(tokens: Tokens, table: Any, way: str, plain_rows: int) -> list[int]:
    """Tokenise a table with datasets.map; return the rows' lengths."""
    if way == "map_rows":
        table = table.select(range(min(len(table), plain_rows)))
        table = table.map(tokens.row, remove_columns="messages")
    else:
        function = tokens.masked if way == "map_masked" else tokens.batch
        table = table.map(function, batched=True, batch_size=BATCH, remove_columns="messages")
    column = table.data.column("input_ids").combine_chunks().to_numpy(zero_copy_only=False)
    return [len(ids) for ids in column]


def per_minute(run: dict[str, Any]) -> float:
    """Return the rows that are read in a minute of processor time."""
    return 60 * run["rows"] / run["cpu_seconds"]


def measured(way: str, folder: str, number: int) -> dict[str, Any]:
    """Measure one way in a new process."""
    # cold has an empty cache; warm uses the cache that cold of the same round has written
    cache = (
        f"{folder}/cache{number}" if way in ("cold", "warm") else f"{folder}/cache-{way}{number}"
    )
    environment = {**os.environ, "GRAFT_CACHE_TOKENS": cache, "OMP_NUM_THREADS": "1"}
    processes.worker("scripts.bench.preflight", way, folder, env=environment)
    return json.loads(Path(folder, "result.json").read_text())


def worker(options: dict[str, Any], way: str, folder: str) -> None:
    """Measure one way, and write result.json."""
    from tasks import wheel

    file = f"{folder}/rows.jsonl"
    if way in ("cold", "warm", "stages"):
        from trainer.data import rows as data_rows

        cache = Path(os.environ["GRAFT_CACHE_TOKENS"])
        data_rows.wheel = type(
            "Cache",
            (),
            {"cache_dir": staticmethod(lambda: cache), "sha256": staticmethod(wheel.sha256)},
        )  # type: ignore[assignment]
        result = ours(options, file, Stages() if way == "stages" else None)
    else:
        result = plain(options, file, way)
    Path(folder, "result.json").write_text(json.dumps(result))


def written(options: dict[str, Any], file: Path) -> None:
    """Write the rows that are measured."""
    files = [options["prompts"]] if isinstance(options["prompts"], str) else options["prompts"]
    chats = [
        messages(json.loads(line))
        for name in files
        for line in Path(name).read_bytes().splitlines()
        if line.strip()
    ]
    random.Random(0).shuffle(chats)
    with file.open("w") as rows:
        for chat in varied(chats, options["rows"]):
            rows.write(json.dumps({"messages": chat}) + "\n")


def ways_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return a line for each way, with medians over the rounds."""
    heads = ("rows", "tokens a row", "cpu s", "wall s", "us a row", "rows/min", "by wall")
    widths = (9, 14, 9, 9, 10, 11, 11)
    lines = [f"{'':12}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))]
    for way, results in runs.items():
        cpu, wall = (
            statistics.median(run[clock] for run in results) for clock in ("cpu_seconds", "seconds")
        )
        count, tokens = results[0]["rows"], results[0]["tokens"] / results[0]["rows"]
        lines.append(
            f"{way:12}{count:9,}{tokens:14.1f}{cpu:9.2f}{wall:9.2f}{cpu / count * 1e6:10.0f}"
            f"{60 * count / cpu:11,.0f}{60 * count / wall:11,.0f}"
        )
    return "\n".join(lines)


def stages_table(results: list[dict[str, Any]]) -> str:
    """Return a line for each stage, with medians over the rounds."""
    lines = [f"{'stage':12}{'cpu s':>9}{'us a row':>10}{'share':>8}{'rows/min':>12}"]
    count, whole = results[0]["rows"], statistics.median(run["cpu_seconds"] for run in results)
    for name in results[0]["stages"]:
        seconds = statistics.median(run["stages"][name] for run in results)
        lines.append(
            f"{name:12}{seconds:9.2f}{seconds / count * 1e6:10.0f}{seconds / whole:8.1%}"
            f"{60 * count / max(seconds, 1e-9):12,.0f}"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure all ways in turn, and print a table."""
    options = parse(DEFAULTS, __doc__)
    if options["prompts"] is None:
        print(f"prompts=FILE is missing\n\n{__doc__}", file=sys.stderr)
        return 2
    if words := processes.worker_arguments():
        worker(options, *words)
        return 0
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in options["ways"]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        written(options, file)
        print(
            f"{options['rows']:,} rows of {file.stat().st_size / options['rows']:.0f} bytes, one of"
            f" {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        for number, way in itertools.product(range(options["repeats"]), options["ways"]):
            runs[way].append(measured(way, folder, number))
            print(
                f"round {number + 1} {way}: {runs[way][-1]['cpu_seconds']:.1f} s of processor time",
                flush=True,
            )
    print(f"\n{ways_table(runs)}")
    if "stages" in runs:
        print(f"\n{stages_table(runs['stages'])}")
    for other in ("map_rows", "map_batch", "map_masked", "encode"):
        if runs.get("cold") and runs.get(other):
            ratios = [
                per_minute(a) / per_minute(b)
                for a, b in zip(runs["cold"], runs[other], strict=True)
            ]
            print(f"cold / {other}, rows a minute: {statistics.median(ratios):.2f}")
    if options["json"] is not None:
        text = json.dumps({"options": options, "runs": runs}, indent=1) + "\n"
        Path(options["json"]).write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
