"""Exports of real runs, loaded back by stock libraries."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from adapters.delta import AdapterError
from tests.conftest import sums, write_rows
from tests.toys.commands import exit_code
from tests.toys.heads import make, stirred
from tests.toys.mtp_bases import names_of, tiny_of
from trainer import export
from trainer.assembly import trained as trained_module
from trainer.drafters import DrafterError, io
from trainer.exporting import adapter as adapter_module
from trainer.exporting import formats, mtp_layers
from trainer.exporting.compare import Mismatch
from trainer.storage.checkpoints import CheckpointError
from trainer.storage.door import FolderError

SHORT = [
    "max_steps=4",
    "callbacks.evaluation.every=null",
    "callbacks.evaluation.max_new_tokens=8",
    "optimizer.lr=3e-2",
    "report=false",
]


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    ids = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(5))
    actual = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    return actual[:, -20:]  # virtual tokens stand before the row's own


def of_run(run: Path, which: str = "last") -> Any:
    return trained_module.load_trained(f"{run}@{which}", fp32=True)


SETTINGS = {
    "lora": [],
    "pissa": ["adapter=pissa", "adapter.r=4", "adapter.lora_alpha=4"],
    "loha": [
        "adapter=peft",
        "adapter.peft_type=LOHA",
        "adapter.r=4",
        "adapter.target_modules=all-linear",
    ],
    "adalora": ["adapter=adalora", "adapter.init_r=4", "adapter.target_r=2"],
    "prompt_tuning": [
        "adapter=prompt_tuning",
        "adapter.num_virtual_tokens=4",
        "callbacks.evaluation.samples=0",
    ],
    "full": ["adapter=full"],
    "classification": [],
    "full-classification": ["adapter=full"],
    "nf4": ["base.quantization=nf4", "base.hidden_size=64"],
}


@pytest.fixture(scope="module")
def trained_once(
    train_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The run of a kind of SETTINGS, trained when it is first asked for."""

    @functools.cache
    def trained(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        if kind.endswith("classification"):
            texts = [("good " if i % 2 else "bad ") * (1 + i % 5) for i in range(60)]
            rows = [{"text": text, "label": str(i % 2)} for i, text in enumerate(texts)]
            data = ["task=classification"]
        else:
            rows, data = sums(60), []
        path = write_rows(folder / "rows.jsonl", rows)
        return train_in(folder, *SHORT, *data, f"task.path={path}", *SETTINGS[kind])

    return trained


@pytest.fixture
def run_of(trained_once: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of `trained_once`, which a test may write to."""
    return lambda kind: shutil.copytree(trained_once(kind), tmp_path / "runs" / kind)


# of PEFT's own AdaLoRA files
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys.*lora_E:RuntimeWarning")
@pytest.mark.parametrize(
    "kind", ["lora", "pissa", "loha", "adalora", "prompt_tuning", "classification", "nf4"]
)
def test_an_exported_adapter_is_the_runs_model_in_stock_peft(run_of, kind):
    run = run_of(kind)
    out, difference = formats.export(str(run), "peft", None, "float32")
    assert out == run / "peft"
    assert difference < 1e-4
    actual = of_run(run)
    classes = actual.task.labels if kind == "classification" else None
    base = actual.base.load(torch.float32, classes)
    plain = outputs(base)
    loaded = peft.PeftModel.from_pretrained(base, out).eval()
    expected = outputs(actual.model)
    torch.testing.assert_close(outputs(loaded), expected, rtol=0, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-3
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == actual.base.path
    assert config["task_type"] == ("SEQ_CLS" if kind == "classification" else "CAUSAL_LM")
    # What the run itself wrote at its end.
    own, again = (
        load_file(run / "adapter" / "adapter_model.safetensors"),
        load_file(out / "adapter_model.safetensors"),
    )
    assert own.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in own.items())


@pytest.mark.parametrize(
    "kind", ["lora", "pissa", "full", "classification", "full-classification", "nf4"]
)
def test_a_merged_export_is_the_runs_model_in_stock_transformers(run_of, tmp_path, kind):
    run = run_of(kind)
    out, difference = formats.export(str(run), "merged", tmp_path / "deep" / "merged", "float32")
    assert difference < 1e-4
    saved = load_file(out / "model.safetensors")
    assert not any("lora" in name or "delta" in name for name in saved)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    auto: Any = (
        AutoModelForSequenceClassification
        if kind.endswith("classification")
        else AutoModelForCausalLM
    )
    loaded = auto.from_pretrained(out).eval()
    assert loaded.dtype == torch.float32
    expected = outputs(of_run(run).model)
    torch.testing.assert_close(outputs(loaded), expected, rtol=0, atol=1e-4)
    if kind.endswith("classification"):
        assert loaded.config.id2label == {0: "0", 1: "1"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("1+1=").input_ids) == "1+1="
    assert tokenizer.chat_template

    half, _ = formats.export(str(run), "merged", tmp_path / "half", "bfloat16")
    rounded = load_file(half / "model.safetensors")
    assert rounded.keys() == saved.keys()
    assert all(
        torch.equal(rounded[name], tensor.to(torch.bfloat16)) for name, tensor in saved.items()
    )
    loaded = auto.from_pretrained(half).eval()
    assert loaded.dtype == torch.bfloat16
    assert (outputs(loaded) - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_which_checkpoint_is_exported_can_be_chosen(train, chats, tmp_path):
    run = train(
        f"task.path={chats}",
        "max_steps=6",
        "optimizer.lr=3e-2",
        "callbacks.checkpoints.every=2",
        "callbacks.checkpoints.keep=5",
        "callbacks.evaluation=null",
    )
    (run / "checkpoints" / "best.json").write_text(json.dumps({"step": 4}))
    actual = {}
    for which in ("2", "4", "6", "last", "best"):
        out, _ = formats.export(f"{run}@{which}", "peft", tmp_path / which, "float32")
        actual[which] = load_file(out / "adapter_model.safetensors")
        assert of_run(run, which).step == {"last": 6, "best": 4}.get(which) or int(which)

    def same(a: str, b: str) -> bool:
        return all(torch.equal(tensor, actual[b][name]) for name, tensor in actual[a].items())

    assert same("last", "6")
    assert same("best", "4")
    assert not same("2", "4")
    assert not same("4", "6")
    with pytest.raises(CheckpointError, match="no checkpoint '3'; it has the steps 2, 4, 6"):
        formats.export(f"{run}@3", "peft", tmp_path / "3", "float32")


def test_an_export_that_answers_differently_is_refused_and_leaves_nothing(
    run_of, tmp_path, monkeypatch
):
    run = run_of("lora")
    save, write = adapter_module.save_adapter, type(of_run(run).model).save_pretrained

    def spoilt_adapter(
        adapter: Any, model: Any, base: Any, task: Any, folder: Path, pair: bool = False
    ) -> None:
        save(adapter, model, base, task, folder)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0] += 1.0
        save_file(tensors, file)

    def spoilt_model(model: Any, folder: Path, **kwargs: Any) -> None:
        write(model, folder, **kwargs)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"][5:] *= 1.5
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(formats, "save_adapter", spoilt_adapter)
    monkeypatch.setattr(type(of_run(run).model), "save_pretrained", spoilt_model)
    place = tmp_path / "exports"
    with pytest.raises(
        Mismatch,
        match=(
            r"differs from the run's model by .* of the logits' spread.*first to do so is decoder"
            r" layer 1"
        ),
    ):
        formats.export(str(run), "peft", place / "adapter", "float32")
    with pytest.raises(Mismatch, match="the first to do so is the embedding"):
        formats.export(str(run), "merged", place / "merged", "float32")
    assert list(place.iterdir()) == []


def test_an_export_with_nan_is_refused(run_of, tmp_path, monkeypatch):
    run = run_of("lora")
    save = adapter_module.save_adapter

    def spoilt(
        adapter: Any, model: Any, base: Any, task: Any, folder: Path, pair: bool = False
    ) -> None:
        save(adapter, model, base, task, folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        next(iter(tensors.values())).fill_(torch.nan)
        save_file(tensors, folder / "adapter_model.safetensors")

    monkeypatch.setattr(formats, "save_adapter", spoilt)
    with pytest.raises(Mismatch, match="have other values"):
        formats.export(str(run), "peft", tmp_path / "adapter", "float32")
    assert not list(tmp_path.glob("*adapter*"))


def test_what_cannot_be_exported_says_why(run_of, tmp_path, capsys):
    run = run_of("prompt_tuning")
    with pytest.raises(
        AdapterError,
        match=(
            r"PROMPT_TUNING cannot be merged into weights: it works on activations. Export it with"
            r" to=peft"
        ),
    ):
        formats.export(str(run), "merged", tmp_path / "out" / "merged", "float32")
    assert not (tmp_path / "out" / "merged").exists()
    assert export.main([f"run={run}", "to=merged"]) != 0
    assert "works on activations" in capsys.readouterr().err
    full = run_of("full")
    with pytest.raises(AdapterError, match="to=merged"):
        formats.export(str(full), "peft", None, "float32")
    assert not list(full.glob("*peft*"))


def test_what_is_there_is_not_overwritten(run_of, tmp_path):
    run = run_of("lora")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("kept")
    with pytest.raises(
        FolderError, match=r"mine exists. Remove it, or choose another with out=FOLDER"
    ):
        formats.export(str(run), "peft", tmp_path / "mine", "float32")
    assert (tmp_path / "mine" / "note").read_text() == "kept"


def test_the_verb(run_of, tmp_path, capsys):
    run = run_of("lora")
    assert export.main([f"run={run}", "to=peft", f"out={tmp_path / 'out'}"]) == 0
    assert "loaded back and compared: logits differ by" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert oct((tmp_path / "out").stat().st_mode)[-3:] == "755"
    for wrong, message in (
        (["to=onnx"], "expected one of peft, merged, gguf, gguf_lora, shira, drafter, mtp"),
        (["to=peft", "dtype=int4"], "float32, bfloat16, float16"),
    ):
        assert exit_code(export.main, [f"run={run}", *wrong]) == 2
        assert message in capsys.readouterr().err


def base_of(kind: str, tiny: Any, place: Path) -> Path:
    """A random model of a family, in a folder, with a tokenizer."""
    tiny.tokenizer.save_pretrained(place)
    if kind == "llama":
        AutoModelForCausalLM.from_pretrained(tiny.path).save_pretrained(place)
    else:
        model = tiny_of(
            kind,
            vocab_size=len(tiny.tokenizer),
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
        )
        model.save_pretrained(place)
    return place


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def test_a_drafter_goes_into_its_bases_own_mtp_layer_or_a_folder(train, chats, tiny, tmp_path):
    base = base_of("mellum", tiny, tmp_path / "base")
    run = train(
        *SHORT,
        f"task.path={chats}",
        "base=hf",
        f"base.path={base}",
        "drafter=mtp_shared",
        "drafter.offsets=2",
        "drafter.init=random",
        "callbacks.checkpoints.every=2",
        "callbacks.checkpoints.keep=5",
    )
    out, difference = formats.export(str(run), "mtp", tmp_path / "mtp", "float32")
    assert difference < 1e-4
    loaded, notes = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not notes["missing_keys"]
    actual = of_run(run)
    assert actual.drafter is not None
    torch.testing.assert_close(outputs(loaded), outputs(actual.model), rtol=0, atol=1e-4)
    ids = torch.randint(3, 259, (1, 20), generator=torch.Generator().manual_seed(5))
    merged = actual.adapter.merge(actual.model)
    torch.testing.assert_close(
        mtp_layers.transformers_logits(loaded, ids),
        mtp_layers.own_logits(actual.drafter, merged, ids),
        rtol=0,
        atol=1e-4,
    )
    limits = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(loaded.generate(ids, use_mtp=True, **limits), loaded.generate(ids, **limits))
    half, _ = formats.export(str(run), "mtp", tmp_path / "half", "bfloat16")
    whole = tensors_of(out)
    assert any(name.startswith("mtp.") for name in whole)
    assert all(
        torch.equal(tensor, whole[name].to(torch.bfloat16))
        for name, tensor in tensors_of(half).items()
    )

    plain = AutoModelForCausalLM.from_pretrained(base)
    for which in (2, 4):
        place, difference = formats.export(f"{run}@{which}", "drafter", None, "float32")
        assert (place, difference) == (run / f"drafter-step-{which}", 0.0)
        again = io.load(place, plain, actual.base.fingerprint).state()
        expected = of_run(run, str(which)).drafter.state()
        assert expected.keys() == again.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())
    # what the run itself wrote at its end
    last, own = tensors_of(place), tensors_of(run / "drafter")
    assert last.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in last.items())
    assert json.loads((place / "config.json").read_text()) == json.loads(
        (run / "drafter" / "config.json").read_text()
    )
    assert any(
        not torch.equal(tensor, tensors_of(run / "drafter-step-2")[name])
        for name, tensor in last.items()
    )


def test_an_mtp_layer_that_answers_differently_is_refused(
    train, chats, tiny, tmp_path, monkeypatch
):
    base = base_of("mellum", tiny, tmp_path / "base")
    run = train(
        *SHORT,
        f"task.path={chats}",
        "base=hf",
        f"base.path={base}",
        "drafter=mtp_sequential",
        "drafter.offsets=1",
    )
    write = mtp_layers.tensors

    def spoilt(*arguments: Any) -> dict[str, Tensor]:
        tensors = write(*arguments)
        tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"].roll(16, dims=1)  # hidden state first
        return tensors

    monkeypatch.setattr(mtp_layers, "tensors", spoilt)
    with pytest.raises(
        Mismatch, match="the MTP layer, loaded back, differs from the run's drafter by"
    ):
        formats.export(str(run), "mtp", tmp_path / "out" / "mtp", "float32")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_has_no_native_form_is_refused_before_weights_load(train, chats, capsys, monkeypatch):
    run = train(
        "max_steps=1",
        "callbacks.evaluation=null",
        f"task.path={chats}",
        "drafter=mtp_shared",
        "name=llama",
    )
    bare = train("max_steps=1", "callbacks.evaluation=null", f"task.path={chats}", "name=bare")
    registers = train(
        "max_steps=1",
        "callbacks.evaluation=null",
        f"task.path={chats}",
        "drafter=registers",
        "name=registers",
    )
    monkeypatch.setattr(formats, "load_trained", lambda *_, **__: pytest.fail("was loaded"))
    assert export.main([f"run={run}", "to=mtp"]) == 2
    assert "Use to=drafter, and decode with graft speculate" in capsys.readouterr().err
    for to in ("drafter", "mtp"):
        with pytest.raises(DrafterError, match=r"has no drafter. Train one with the adapter"):
            formats.export(str(bare), to, None, "float32")
        with pytest.raises(
            DrafterError, match=r"drafter \(Registers\) that only shapes the adapter"
        ):
            formats.export(str(registers), to, None, "float32")


@pytest.mark.parametrize("kind", ["mellum", "llama"])
def test_mtp_layers_of_a_base_survive_a_merged_export(train, chats, tiny, tmp_path, kind):
    base = base_of(kind, tiny, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    draw = torch.Generator().manual_seed(2)
    if kind == "mellum":
        drafter: Any = stirred(make("shared", model, offsets=1))
        mtp_layers.check(drafter, model)
        extra, keys = (
            mtp_layers.tensors(drafter, model, torch.bfloat16),
            {"num_nextn_predict_layers": 1},
        )
    else:
        # Of a family that transformers knows no MTP layers of.
        names = ("enorm.weight", "mlp.up_proj.weight", "self_attn.q_proj.weight")
        extra = {
            f"model.layers.2.{name}": torch.randn(4, 3, generator=draw).bfloat16() for name in names
        }
        keys = {"num_nextn_predict_layers": 1, "mtp_extra": [1, 2]}
    mtp_layers.append(base, extra, keys)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "again")
    assert not tensors_of(tmp_path / "again").keys() & extra.keys()  # transformers alone drops them
    run = train(*SHORT, f"task.path={chats}", "base=hf", f"base.path={base}")
    out, difference = formats.export(str(run), "merged", None, "float32")
    assert difference < 1e-4
    stored = {name: tensor for name, tensor in tensors_of(out).items() if name in extra}
    assert stored.keys() == extra.keys()
    assert all(
        tensor.dtype == torch.bfloat16 and torch.equal(tensor, extra[name])
        for name, tensor in stored.items()
    )
    assert {file for name, file in names_of(out).items() if name in extra} == {
        "model-00002-of-00002.safetensors"
    }
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in keys} == keys
    loaded, notes = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not notes["missing_keys"]
    torch.testing.assert_close(outputs(loaded), outputs(of_run(run).model), rtol=0, atol=1e-4)
    if kind == "mellum":
        ids = torch.randint(3, 259, (1, 20), generator=draw)
        limits = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(
            loaded.generate(ids, use_mtp=True, **limits), loaded.generate(ids, **limits)
        )


@pytest.mark.long
def test_a_base_in_shards_gets_one_more(tiny, tmp_path):
    folder = base_of("llama", tiny, tmp_path / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    before = names_of(folder)
    assert len(set(before.values())) > 1
    extra = {"mtp.fc.weight": torch.randn(4, 8)}
    mtp_layers.append(folder, extra, {"num_nextn_predict_layers": 1})
    assert names_of(folder) == before | {"mtp.fc.weight": "model-mtp.safetensors"}
    loaded, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not notes["missing_keys"]
    assert torch.equal(outputs(loaded), outputs(model))
    actual, settings = mtp_layers.left_out(folder, 2, tmp_path)
    assert torch.equal(actual["mtp.fc.weight"], extra["mtp.fc.weight"])
    assert settings == {"num_nextn_predict_layers": 1}
