"""Random rows, run folders and configs end in our own errors, within a time for each byte.

Everything is drawn from a seed: a failure names the seed, which repeats it. GRAFT_FUZZ=N draws N
times as much.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import time

import pytest
import yaml
from omegaconf import OmegaConf

from tasks.reading import Bad, DataError
from tests.conftest import ROOT, composed
from trainer.config.compose import check
from trainer.config.errors import ConfigError
from trainer.storage.journal import Journal
from trainer.storage.run_folder import FolderError, read

MORE = int(os.environ.get("GRAFT_FUZZ", "1"))
OLD = ROOT / "tests" / "data" / "runs_0.1" / "runs" / "lora"
SECONDS = 2.0  # of computing for one input, at most
TEXTS = (
    *(
        "",
        " ",
        "a",
        "system",
        "user",
        "assistant",
        "x" * 3000,
        "\x00",
        "\ud800",
        "\x1b[2J",
        "\u2028",
    ),
    *("{{7*7}}", "{% for", "${oc.env:HOME}", "${", "../../etc/passwd", "/dev/zero", "nan", "-1"),
    *("1e999", "9" * 5000, "#### 1", "#### ", "SELECT 1", "CREATE TABLE a (b INT)", "CREATE TABLE"),
    *("os.system", "inform(name[x])", "'", '"', "`", "[", "(" * 200, "null", "true", "<|im_end|>"),
    "\ufeff",
)
NAMES = (
    "messages", "role", "content", "conversations", "from", "value", "instruction", "output",
    "input", "prompt", "completion", "text", "label", "question", "answer", "context", "tools",
    "tool_calls", "function", "name", "arguments", "target", "meaning_representation", "sentence",
)  # fmt: skip


def value(draw, depth=0):
    """A random value of JSON."""
    kind = draw.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return draw.choice((None, True, False))
    if kind == 1:
        return draw.choice((0, 1, -1, 2**31, 2**63, 10**40, 1.5, float("nan"), float("inf")))
    if kind < 6:
        return draw.choice(TEXTS)
    if kind == 6:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(NAMES + TEXTS): value(draw, depth + 1) for _ in range(draw.randrange(1, 5))}


def places(node, path=()):
    """Every path in a nested content."""
    yield path
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node if isinstance(node, list) else ())
    )
    for key, child in items:
        yield from places(child, (*path, key))


def mutated(draw, content):
    """A content with one to three values replaced, removed or added."""
    content = copy.deepcopy(content)
    for _ in range(draw.randint(1, 3)):
        path = draw.choice([path for path in places(content) if path] or [()])
        if not path:  # nothing is left
            return value(draw)
        node = content
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for key in path[:-1]:
                node = node[key]
            act = draw.randrange(4)
            if act == 0:
                del node[path[-1]]
            elif act == 1 and isinstance(node, dict):
                node[draw.choice(NAMES + TEXTS)] = value(draw)
            else:
                node[path[-1]] = value(draw)
    return content


@contextlib.contextmanager
def within_time(what):
    started = time.process_time()
    yield
    taken = time.process_time() - started
    assert taken < SECONDS, f"{what}: {taken:.1f} s"


ROWS = {
    "sft": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "sql": {"question": "q", "context": "CREATE TABLE a (b INT)", "answer": "SELECT b FROM a"},
    "gsm8k": {"question": "q", "answer": "#### 1"},
    "metamath": {"query": "q", "response": "The answer is: 1"},
    "viggo": {"target": "x", "meaning_representation": "inform(name[x])"},
    "completion": {"text": "some text"},
}


@pytest.fixture(scope="module")
def tasks():
    from trainer.assembly.build import instantiate

    made = {}
    for name in ROWS:
        cfg = composed("experiment=smoke", f"task={name}", "task.path=rows.jsonl", "max_steps=1")
        config = OmegaConf.to_container(cfg.task, resolve=True)
        made[name] = lambda path, config=config: instantiate(
            config | {"path": str(path), "on_bad": "skip"}
        )
    return made


@pytest.mark.long
@pytest.mark.parametrize("name", ROWS)
def test_random_rows_end_in_our_errors(tasks, tmp_path, name):
    for seed in range(60 * MORE):
        draw = random.Random(f"{name} {seed}")
        rows = [mutated(draw, ROWS[name]) if draw.random() < 0.8 else value(draw) for _ in range(4)]
        file = tmp_path / f"{seed}.jsonl"
        lines = [json.dumps(row) for row in rows]
        if draw.random() < 0.2:  # damage beyond JSON
            lines[0] = lines[0][: draw.randrange(len(lines[0]) + 1)]
        file.write_bytes("\n".join(lines).encode("utf-8", "replace"))
        with within_time(f"{name} {seed}"), contextlib.suppress(DataError):
            task = tasks[name](file)
            for example in task.examples("train"):
                if not isinstance(example, Bad) and task.metrics:
                    task.grade(example, draw.choice(TEXTS))


@pytest.fixture(scope="module")
def good():
    cfg = composed("experiment=smoke", "task.path=rows.jsonl", "max_steps=1")
    config = OmegaConf.to_container(cfg, resolve=False)
    choices = config.pop("hydra")["runtime"]["choices"]
    return config, choices


@pytest.mark.long
def test_random_configs_end_in_our_errors(good):
    config, choices = good
    refused = 0
    for seed in range(80 * MORE):
        draw = random.Random(f"config {seed}")
        changed = mutated(draw, config)
        with within_time(f"config {seed}"):
            try:
                node = OmegaConf.create(changed)
            except Exception:  # what OmegaConf cannot hold comes from no YAML file
                continue
            try:
                check(node, choices)
            except ConfigError:
                refused += 1
    assert refused > 40 * MORE


@pytest.mark.long
def test_random_run_folders_end_in_our_errors(tmp_path, monkeypatch):
    from trainer.session import report_html

    monkeypatch.setattr(report_html, "_plots", lambda rows: report_html._curves(rows) and [])
    run = shutil.copytree(OLD, tmp_path / "run")
    content = yaml.safe_load((run / "run.yaml").read_text())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    refused = 0
    for seed in range(20 * MORE):
        draw = random.Random(f"run {seed}")
        text = yaml.safe_dump(mutated(draw, content), allow_unicode=True)
        (run / "run.yaml").write_bytes(text.encode("utf-8", "replace"))
        rows = [json.dumps(mutated(draw, json.loads(line))) for line in lines]
        (run / "metrics.jsonl").write_text("\n".join(rows))
        (run / "preflight.json").write_text(json.dumps(value(draw)))
        (run / "checkpoints" / "best.json").write_text(json.dumps(value(draw)))
        with within_time(f"run {seed}"):
            for reader in (lambda: read(str(run)), lambda: report_html.write(run)):
                try:
                    reader()
                except FolderError:
                    refused += 1
            Journal(run, []).rows("stopped")
    assert refused > 5 * MORE
