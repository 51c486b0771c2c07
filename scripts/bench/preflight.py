"""How fast a run's rows are prepared and checked: rows a minute on one core, from files to
preflight's report, stage by stage.

    python -m scripts.bench.preflight prompts=FILE [rows=20000] [repeats=1] [plain_rows=5000]
    [max_length=1024] [ways=[...]] [extra=[...]]
        [json=FILE]

FILE, or a list of them, is JSON lines of chats or of prompts and answers. Its rows are repeated up
to `rows`, each time with other numbers in their texts, so that no two are alike and nothing that is
kept from one serves another. Each measurement is a process of its
own without further threads, started `repeats` times in turn; medians are shown, by processor time
and by wall clock. Ways:

    cold        everything that preflight does before it prints: reading, rendering, masks, tokens, the cache's files, plan, checks
    warm        the same again, with the tokens in the cache
    stages      cold, with each stage's own time; watching costs a little itself
    encode      tokenizer(texts) on the rendered rows, in batches of 1000: what tokens alone cost, the floor of all ways but warm
    map_rows    datasets.map row by row with apply_chat_template(tokenize=True): tokens only, no mask, no check (on `plain_rows` rows)
    map_batch   datasets.map with apply_chat_template(tokenize=True) on batches of 1000 chats: the same
    map_masked  map_batch, and the prompts once more, whose lengths tell which tokens are trained: as plain SFT trainers do

`rows=20000` are prepared by map_batch, map_masked and encode, too. Loading tokenizer and libraries
is in no number.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.bench.options import given

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
    """A row as a chat.

    Raises:
        ValueError: neither a chat nor one of the known pairs.
    """
    if "messages" in row:
        return row["messages"]
    for asked, told in PAIRS:
        if asked in row and told in row:
            return [
                {"role": "user", "content": row[asked]},
                {"role": "assistant", "content": row[told]},
            ]
    raise ValueError(
        f"the columns {', '.join(row)} are neither messages nor"
        f" {', '.join('/'.join(pair) for pair in PAIRS)}: give other prompts=FILE"
    )


def varied(
    chats: list[list[dict[str, str]]], count: int, seed: int = 0
) -> Iterator[list[dict[str, str]]]:
    """`count` chats: those given, over and over, with other digits in place of theirs, and a number
    that no other has."""
    draw = random.Random(seed)
    for number, chat in enumerate(itertools.islice(itertools.cycle(chats), count)):
        texts = [
            re.sub(r"\d", lambda _: str(draw.randrange(10)), message["content"]) for message in chat
        ]
        texts[0] = f"{texts[0]} ({number})"
        yield [{**message, "content": text} for message, text in zip(chat, texts, strict=True)]


class Stages:
    """Processor time that each of some functions takes itself, without that of the others called
    within."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []
        self.since = time.process_time()

    def _turn(self) -> None:
        now = time.process_time()
        if self.open:
            self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.since
        self.since = now

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Count as `name` until it ends."""
        self._turn()
        self.open.append(name)
        try:
            yield
        finally:
            self._turn()
            self.open.pop()

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted."""

        @functools.wraps(function)
        def counted(*arguments: Any, **named: Any) -> Any:
            with self.within(name):
                return function(*arguments, **named)

        return counted

    def each(
        self, name: str, function: Callable[..., Iterator[Any]]
    ) -> Callable[..., Iterator[Any]]:
        """A function that gives an iterator, of which each step is counted."""

        @functools.wraps(function)
        def counted(*arguments: Any, **named: Any) -> Iterator[Any]:
            steps = iter(function(*arguments, **named))
            while True:
                with self.within(name):
                    try:
                        item = next(steps)
                    except StopIteration:
                        return
                yield item

        return counted


def overrides(options: dict[str, Any], file: str) -> list[str]:
    """The run that is prepared."""
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
    """Preflight of the rows, without printing. {seconds, cpu_seconds, rows, tokens, and the stages'
    if they are watched}."""
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
    made = {"seconds": wall, "cpu_seconds": processor, "rows": rows, "tokens": tokens}
    return made | ({"stages": watch.seconds} if stages is not None else {})


def plain(options: dict[str, Any], file: str, way: str) -> dict[str, Any]:
    """What `ours` tells, of datasets.map; `encode` without even that."""
    import datasets

    from trainer.assembly import quiet
    from trainer.assembly.build import instantiate
    from trainer.config import compose

    quiet.quiet()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    found: dict[str, Any] = OmegaConf.to_container(
        compose.compose(overrides(options, file)), resolve=True
    )  # type: ignore[assignment]
    tokenizer = instantiate(found["base"]).tokenizer
    tokenizer.apply_chat_template([{"role": "user", "content": "loaded"}], tokenize=True)

    def row(one: dict[str, Any]) -> dict[str, Any]:
        return {
            "input_ids": tokenizer.apply_chat_template(
                one["messages"], tokenize=True, return_dict=True
            )["input_ids"]
        }

    def batch(many: dict[str, list[Any]]) -> dict[str, Any]:
        return {
            "input_ids": tokenizer.apply_chat_template(
                many["messages"], tokenize=True, return_dict=True
            )["input_ids"]
        }

    def masked(many: dict[str, list[Any]]) -> dict[str, Any]:
        ids = batch(many)["input_ids"]
        asked = [chat[:-1] for chat in many["messages"]]
        prompts = tokenizer.apply_chat_template(
            asked, tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        masks = [[0] * len(p) + [1] * (len(i) - len(p)) for i, p in zip(ids, prompts, strict=True)]
        return {"input_ids": ids, "completion_mask": masks}

    with tempfile.TemporaryDirectory() as cache:
        if way == "encode":
            chats = [json.loads(line)["messages"] for line in Path(file).read_bytes().splitlines()]
            texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
            started = time.perf_counter(), time.process_time()
            parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
            ids = [
                row
                for part in parts
                for row in tokenizer(part, add_special_tokens=False)["input_ids"]
            ]
            rows, tokens = len(ids), sum(map(len, ids))
        else:
            started = time.perf_counter(), time.process_time()
            table: Any = datasets.load_dataset(
                "json", data_files=file, split="train", cache_dir=cache
            )
            if way == "map_rows":
                table = table.select(range(min(len(table), options["plain_rows"]))).map(
                    row, remove_columns="messages"
                )
            else:
                function = masked if way == "map_masked" else batch
                table = table.map(
                    function, batched=True, batch_size=BATCH, remove_columns="messages"
                )
            rows = len(table)
            tokens = sum(
                len(part)
                for part in (
                    table.data.column("input_ids").combine_chunks().to_numpy(zero_copy_only=False)
                )
            )
        wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
    return {"seconds": wall, "cpu_seconds": processor, "rows": rows, "tokens": tokens}


def per_minute(run: dict[str, Any], clock: str = "cpu_seconds") -> float:
    """Rows a minute."""
    return 60 * run["rows"] / run[clock]


def measured(way: str, folder: str, number: int) -> dict[str, Any]:
    """One way in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "scripts.bench.preflight",
        *sys.argv[1:],
        "--worker",
        way,
        folder,
    ]
    # What is cold has a cache that nothing is in; warm is what the cold one of the same round has
    # left.
    cache = (
        f"{folder}/cache{number}" if way in ("cold", "warm") else f"{folder}/cache-{way}{number}"
    )
    environment = {**os.environ, "GRAFT_CACHE_TOKENS": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with"
            f" {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return json.loads(Path(folder, "result.json").read_text())


def worker(options: dict[str, Any], way: str, folder: str) -> None:
    """Measure one way; result.json holds what was found."""
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


def main() -> int:
    """All ways in turn; a table of what was measured."""
    options = given(DEFAULTS, __doc__)
    if (unknown := set(options) - set(DEFAULTS)) or options["prompts"] is None:
        print(
            f"no option {', '.join(sorted(unknown))}" if unknown else "prompts=FILE is missing",
            f"\n\n{__doc__}",
            file=sys.stderr,
        )
        return 2
    if "--worker" in sys.argv:
        worker(options, *sys.argv[sys.argv.index("--worker") + 1 :][:2])
        return 0
    files = [options["prompts"]] if isinstance(options["prompts"], str) else options["prompts"]
    chats = [
        messages(json.loads(line))
        for file in files
        for line in Path(file).read_bytes().splitlines()
        if line.strip()
    ]
    random.Random(0).shuffle(chats)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in options["ways"]}
    with tempfile.TemporaryDirectory() as folder:
        with Path(folder, "rows.jsonl").open("w") as rows:
            for chat in varied(chats, options["rows"]):
                rows.write(json.dumps({"messages": chat}) + "\n")
        size = Path(folder, "rows.jsonl").stat().st_size / options["rows"]
        print(
            f"{options['rows']:,} rows of {size:.0f} bytes, one of {os.cpu_count()} cores, load"
            f" {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        for number, way in itertools.product(range(options["repeats"]), options["ways"]):
            runs[way].append(measured(way, folder, number))
            print(
                f"round {number + 1} {way}: {runs[way][-1]['cpu_seconds']:.1f} s of processor time",
                flush=True,
            )
    print(
        f"\n{'':12}{'rows':>9}{'tokens a row':>14}{'cpu s':>9}{'wall s':>9}{'us a row':>10}{'rows/min':>11}{'by wall':>11}"
    )
    for way, found in runs.items():
        cpu, wall = (
            statistics.median(run[clock] for run in found) for clock in ("cpu_seconds", "seconds")
        )
        count, tokens = found[0]["rows"], found[0]["tokens"] / found[0]["rows"]
        print(
            f"{way:12}{count:9,}{tokens:14.1f}{cpu:9.2f}{wall:9.2f}{cpu / count * 1e6:10.0f}{60 * count / cpu:11,.0f}{60 * count / wall:11,.0f}"
        )
    if "stages" in runs:
        found, count = runs["stages"], runs["stages"][0]["rows"]
        print(f"\n{'stage':12}{'cpu s':>9}{'us a row':>10}{'share':>8}{'rows/min':>12}")
        whole = statistics.median(run["cpu_seconds"] for run in found)
        for name in found[0]["stages"]:
            seconds = statistics.median(run["stages"][name] for run in found)
            print(
                f"{name:12}{seconds:9.2f}{seconds / count * 1e6:10.0f}{seconds / whole:8.1%}{60 * count / max(seconds, 1e-9):12,.0f}"
            )
    for other in ("map_rows", "map_batch", "map_masked", "encode"):
        if runs.get("cold") and runs.get(other):
            ratios = [
                per_minute(a) / per_minute(b)
                for a, b in zip(runs["cold"], runs[other], strict=True)
            ]
            print(f"cold / {other}, rows a minute: {statistics.median(ratios):.2f}")
    if options["json"] is not None:
        Path(options["json"]).write_text(
            json.dumps({"options": options, "runs": runs}, indent=1) + "\n", "utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
