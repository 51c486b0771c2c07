"""An answer ends where training ended it: in every verb that decodes, and in every result, served
as a user would serve it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.conftest import ROOT, write_rows
from tests.toys import other_end
from tests.toys.commands import exit_code
from trainer import evaluate, export, generate, respond, speculate
from trainer.assembly.trained import load_trained
from trainer.data.chat_template import template
from trainer.decoding import speculative

IM_END, EOT = (other_end.SPECIALS.index(token) for token in ("<|im_end|>", "<|endoftext|>"))
STOPS = [IM_END, EOT]
ASKED = [{"role": "user", "content": "a"}]
# Every command, with arguments that make it decode; None if it never writes text.
VERBS: dict[str, Any] = {
    "compare": None,
    "completion": None,
    "compress": None,
    "cooldown": None,
    "density": None,
    "doctor": None,
    "draft": None,
    "ensemble": None,
    "evaluate": (evaluate, ["generate=2"]),
    "export": None,
    "merge": None,
    "generate": (generate, ["prompt=a", "max_new_tokens=30"]),
    "import": None,
    "preflight": None,
    "push": None,
    "realign": None,
    "report": None,
    "respond": (respond, ["max_new_tokens=30"]),
    "run": "its samples: see the fixture",
    "schema": None,
    "select": None,
    "serve": "its answers: tests/serving compares them with generate's",
    "shrink": None,
    "sizes": None,
    "study": None,
    "speculate": (speculate, ["prompt=a", "drafter=lookup", "max_new_tokens=30"]),
    "submit": None,
}


@pytest.fixture(scope="module")
def ended(train_in, tmp_path_factory):
    """A run on a base that ends texts in <|endoftext|>, with chats that end in <|im_end|>; and the
    stop sets of its samples."""
    place = tmp_path_factory.mktemp("ended")
    rows = [{"messages": [*ASKED, {"role": "assistant", "content": "yes"}]}] * 24
    path = write_rows(place / "rows.jsonl", rows)
    jinja = place / "moved.jinja"
    jinja.write_text(template("chatml", None))
    seen: list[list[int]] = []
    whole = transformers.GenerationMixin.generate

    def watched(self, *arguments, generation_config=None, **more):
        seen.append(generation_config.eos_token_id)
        return whole(self, *arguments, generation_config=generation_config, **more)

    transformers.GenerationMixin.generate = watched
    try:
        run = train_in(
            place,
            "base=hf",
            f"base.path={other_end.base(place / 'base')}",
            f"task.path={path}",
            f"task.eval_path={path}",
            f"task.chat_template={jinja}",
            "adapter=lora",
            "adapter.target_modules=all-linear",
            "max_steps=60",
            "max_epochs=null",
            "optimizer.lr=0.01",
            "callbacks.evaluation.samples=1",
            "callbacks.evaluation.generate=2",
        )
    finally:
        transformers.GenerationMixin.generate = whole
    jinja.unlink()  # the run has its own copy
    return run, seen


def test_the_run_records_what_it_was_trained_with(ended):
    run, samples = ended
    assert yaml.safe_load((run / "run.yaml").read_text())["answer_ends"] == {"<|im_end|>": IM_END}
    assert (run / "chat_template.jinja").read_text() == template("chatml", None)
    assert samples
    assert all(stops == STOPS for stops in samples)
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert rows[-1]["answer"] == "yes"  # and no further turn


def test_every_command_is_listed():
    files = {file.stem for file in (ROOT / "trainer").glob("*.py") if file.stem[0] != "_"}
    assert files == set(VERBS)


def test_nothing_else_makes_a_stop_set():
    files = (ROOT / "trainer").rglob("*.py")
    reads = re.compile(r"generation_config\W+(\w+\W+)?eos_token_id|\.eos_token_id\b")
    users = {str(file.relative_to(ROOT)) for file in files if reads.search(file.read_text("utf-8"))}
    assert users == {
        "trainer/data/encoding.py",  # takes off the end that a tokenizer appends to a prompt
        "trainer/data/ends.py",
        "trainer/data/render.py",  # appends the tokenizer's own end to a text
        "trainer/exporting/compare.py",  # rows of classifiers that read the end token's state
        "trainer/exporting/serving.py",  # writes the stop set
        "trainer/models/base.py",  # refuses a tokenizer without one
    }


@pytest.mark.parametrize("verb", [name for name, how in VERBS.items() if isinstance(how, tuple)])
def test_a_verb_that_decodes_takes_the_one_stop_set(ended, verb, monkeypatch, tmp_path, capsys):
    run, seen = ended[0], []
    generate_, init = transformers.GenerationMixin.generate, speculative.Decoder.__init__

    def watched(self, *arguments, generation_config=None, **more):
        seen.append(generation_config.eos_token_id)
        return generate_(self, *arguments, generation_config=generation_config, **more)

    def initialised(self, target, drafter, count, stops, *rest):
        seen.append(stops)
        init(self, target, drafter, count, stops, *rest)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", watched)
    monkeypatch.setattr(speculative.Decoder, "__init__", initialised)
    module, words = VERBS[verb]
    if verb == "respond":
        write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
        words = [*words, f"prompts={tmp_path / 'prompts.jsonl'}", f"out={tmp_path / 'out'}"]
    assert exit_code(module.main, [f"run={run}", *words]) == 0
    assert seen
    assert all(sorted(stops) == STOPS for stops in seen)
    text = capsys.readouterr().out
    if verb == "generate":
        assert text == "yes\n"
    if verb == "evaluate":
        assert "exact_match" in text
        assert "1.0000" in text
    if verb == "respond":
        row = json.loads((tmp_path / "out" / "rows.jsonl").read_text())
        assert row["messages"] == [*ASKED, {"role": "assistant", "content": "yes"}]
        assert "cut" not in row


def served(model: Any, folder: Path, **settings: Any) -> str:
    """The answer as a user of transformers gets it, with its special tokens."""
    words = AutoTokenizer.from_pretrained(folder)
    inputs = words.apply_chat_template(
        ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.eval().generate(**inputs, max_new_tokens=30, do_sample=False, **settings)
    return words.decode(out[0, inputs["input_ids"].shape[1] :])


def test_a_merged_folder_stops_where_training_ended_by_defaults(ended, tmp_path, capsys):
    run = ended[0]
    assert export.main([f"run={run}", "to=merged", f"out={tmp_path / 'merged'}"]) == 0
    merged = tmp_path / "merged"
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.generation_config.eos_token_id == STOPS
    assert served(model, merged) == "yes<|im_end|>"
    assert (merged / "chat_template.jinja").read_text() == template("chatml", None)
    assert AutoTokenizer.from_pretrained(merged).eos_token == "<|im_end|>"
    # Where nothing reads the generation settings, the model's own config has the same ends.
    assert model.config.eos_token_id == STOPS
    (merged / "generation_config.json").unlink()
    bare = AutoModelForCausalLM.from_pretrained(merged)
    assert bare.generation_config.eos_token_id == STOPS
    assert served(bare, merged) == "yes<|im_end|>"
    # The base's settings are what the folder would have had.
    base = {"eos_token_id": EOT, "pad_token_id": 0}
    assert len(served(model, merged, **base)) > len("yes<|im_end|>")


@pytest.mark.parametrize("place", ["adapter", "peft"])
def test_an_adapter_folder_serves_with_stock_peft(ended, tmp_path, place, capsys):
    folder = ended[0] / place
    if place == "peft":
        folder = tmp_path / "peft"
        assert export.main([f"run={ended[0]}", "to=peft", f"out={folder}"]) == 0
    path = load_trained(str(ended[0])).base.path
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), folder)
    config = GenerationConfig.from_pretrained(folder)
    assert config.eos_token_id == STOPS
    assert served(model, folder, generation_config=config) == "yes<|im_end|>"
    eos = AutoTokenizer.from_pretrained(folder).eos_token_id
    assert served(model, folder, eos_token_id=eos) == "yes<|im_end|>"
    whole = AutoModelForCausalLM.from_pretrained(folder)  # transformers' own loading of adapters
    assert served(whole, folder, generation_config=config) == "yes<|im_end|>"


def test_a_run_of_an_older_version_finds_its_ends_again(ended, tmp_path, caplog, capsys):
    old = shutil.copytree(ended[0], tmp_path / "old")
    content = yaml.safe_load((old / "run.yaml").read_text())
    del content["answer_ends"]
    content["config"]["task"]["chat_template"] = "chatml"
    (old / "run.yaml").write_text(yaml.safe_dump(content))
    (old / "chat_template.jinja").unlink()
    assert load_trained(str(old)).stops == STOPS
    assert exit_code(generate.main, [f"run={old}", "prompt=a", "max_new_tokens=30"]) == 0
    assert capsys.readouterr().out == "yes\n"
    actual = load_trained(str(old))
    actual.task.examples = lambda split: (_ for _ in ()).throw(OSError("the rows are gone"))
    assert actual.stops == STOPS
    assert "the rows are gone" in caplog.text
