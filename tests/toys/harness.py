"""Small tasks of lm-eval whose data are local files."""

from __future__ import annotations

import json
from pathlib import Path

CHOICES = [
    ("aaaa", ["a", "bcd", "zz"], 0),
    ("abcabc", ["abc", "x", "qqqqqq"], 1),
    ("1 + 1 =", ["2", "11", "banana"], 2),
    ("the cat", ["sat", "s", "mat mat"], 0),
    ("zz", ["y", "zzzz", "z"], 1),
    ("hello", ["w", "world", "lo"], 2),
    ("oh", ["no", "yes", "oh"], 0),
]
ANSWERS = ["aa", "ab", "ba", "bb", "a b"]

CHOICE = """\
task: toy_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/choice.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

GENERATE = """\
task: toy_generate
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/generate.jsonl
    train: {folder}/generate.jsonl
output_type: generate_until
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["q"]
  do_sample: false
  max_gen_toks: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def folder(place: Path, answers: list[str] | None = None) -> Path:
    """Write toy_choice and toy_generate, the expected answers of which are `answers`."""
    tasks = place / "tasks"
    tasks.mkdir()
    (tasks / "choice.yaml").write_text(CHOICE.format(folder=place))
    (tasks / "generate.yaml").write_text(GENERATE.format(folder=place))
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in CHOICES]
    (place / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = answers or ["-"] * len(ANSWERS)
    asked = [{"question": q, "answer": a} for q, a in zip(ANSWERS, expected, strict=True)]
    (place / "generate.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return tasks
