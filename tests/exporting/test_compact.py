"""Compressed adapters of real runs, loaded back by stock PEFT; and what is said of their sizes."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from adapters import compress as coding
from adapters.delta import AdapterError
from tests.conftest import sums, write_rows
from tests.toys.commands import exit_code
from trainer import compress, sizes
from trainer.assembly import trained as trained_module
from trainer.data.batches import Collate
from trainer.evaluation import adapter_sizes
from trainer.exporting import adapter as adapter_module
from trainer.exporting import compact
from trainer.exporting.compact import Choice
from trainer.exporting.compare import Mismatch
from trainer.storage.door import FolderError

COMPEFT = Choice("compeft", "both", keep=0.3, strength=1.5)
DARE = Choice("dare", "B", drop=0.6, strength=0.4)
SETTINGS = {
    "lora": [],
    "dora": ["adapter=dora", "adapter.r=4"],
    "rosa": [
        "adapter=rosa",
        "adapter.rank=4",
        "adapter.density=0.05",
        "adapter.warmup_steps=1",
        "adapter.mask_steps=1",
        "adapter.density_pattern={v_proj: 0.02}",
    ],
    "sparse": ["adapter=sparse", "adapter.density=0.05", "adapter.mask_steps=1"],
    "bilora": ["adapter=bilora"],
    "mos": ["adapter=mos", "adapter.rank=3"],
    "pissa": ["adapter=pissa", "adapter.r=4", "adapter.lora_alpha=4"],
    "prompt_tuning": ["adapter=prompt_tuning", "adapter.num_virtual_tokens=4"],
    "full": ["adapter=full"],
    "mola": ["adapter=mola"],
}
RUNS: dict[str, Path] = {}  # one of each kind for all tests


@pytest.fixture
def run_of(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def run(kind: str) -> Path:
        if kind not in RUNS:
            rows = tmp_path_factory.mktemp("rows")
            if kind == "classes":
                texts = [
                    {"text": ("good " if i % 2 else "bad ") * (1 + i % 5), "label": str(i % 2)}
                    for i in range(60)
                ]
                data = [
                    "task=classification",
                    f"task.path={write_rows(rows / 'rows.jsonl', texts)}",
                ]
            else:
                data = [
                    f"task.path={write_rows(rows / 'rows.jsonl', sums(60))}",
                    "callbacks.evaluation.samples=0",
                ]
            settings = [*data, *SETTINGS.get(kind, []), f"name={kind}"]
            RUNS[kind] = train(
                "max_steps=6", "callbacks.evaluation.every=null", "optimizer.lr=3e-2", *settings
            )
        return RUNS[kind]

    return run


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


@pytest.mark.parametrize(
    ("kind", "choice"),
    [
        ("lora", COMPEFT),
        ("lora", replace(COMPEFT, factors="B", scope="run")),
        ("lora", DARE),
        ("lora", replace(DARE, factors="both")),
        ("dora", COMPEFT),
        ("rosa", COMPEFT),
        ("rosa", DARE),
        ("classes", COMPEFT),
    ],
    ids=lambda value: getattr(value, "method", value),
)
def test_what_is_written_is_the_compressed_adapter(run_of, tmp_path, kind, choice):
    run = run_of(kind)
    result = compact.compress(str(run), choice, tmp_path / "out", True)
    assert {path.name for path in result.out.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        coding.FILE,
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        *([] if kind == "classes" else ["generation_config.json"]),
    }
    assert result.difference < 1e-4
    before, after = (
        load_file(run / "adapter" / "adapter_model.safetensors"),
        load_file(result.out / "adapter_model.safetensors"),
    )
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set(coding.updates(before, choice.factors))
    share = sum(int((after[key] != 0).sum()) for key in changed) / sum(
        after[key].numel() for key in changed
    )
    assert 0.28 < share < 0.31 if choice.method == "compeft" else 0.3 < share < 0.5
    assert result.after == (result.out / coding.FILE).stat().st_size < result.before
    assert result.before == (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert result.loss_before != result.loss_after
    assert math.isfinite(result.loss_after)

    # Stock PEFT on a plain base, against the base with the update added by hand.
    actual = trained_module.load_trained(str(run), fp32=True)
    labels = actual.task.labels if kind == "classes" else None
    loaded = peft.PeftModel.from_pretrained(
        actual.base.load(torch.float32, labels), result.out
    ).eval()
    expected = logits(actual.model)
    assert (logits(loaded) - expected).abs().max() > 1e-3
    if kind == "lora":
        plain = actual.base.load(torch.float32)
        scale = actual.adapter.alpha / actual.adapter.rank
        with torch.no_grad():
            for key, tensor in after.items():
                if key.endswith("lora_A.weight"):
                    layer = plain.get_submodule(
                        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                    )
                    layer.weight += scale * after[key.replace("lora_A", "lora_B")] @ tensor
        torch.testing.assert_close(logits(loaded), logits(plain), rtol=0, atol=1e-4)

    # The compact file alone says the same.
    alone = tmp_path / "sent"
    alone.mkdir()
    for name in ("adapter_config.json", coding.FILE, "tokenizer.json"):
        shutil.copy(result.out / name, alone)
    assert compress.main([f"expand={alone}", f"out={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / "tokenizer.json").is_file()
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == after.keys()
    assert all(torch.equal(again[key], after[key]) for key in after)
    assert (tmp_path / "again" / "adapter_config.json").read_bytes() == (
        result.out / "adapter_config.json"
    ).read_bytes()


def test_a_pair_of_adapters_is_compressed_as_one(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(
        compact, "save_adapter", functools.partial(adapter_module.save_adapter, pair=True)
    )
    result = compact.compress(str(run_of("rosa")), DARE, tmp_path / "out", False)
    assert result.difference < 1e-4
    assert result.loss_before is None
    for part in ("shira", "lora"):
        assert (result.out / part / coding.FILE).is_file()
    compact.expand(result.out, tmp_path / "again")
    for part in ("shira", "lora"):
        one, other = (
            load_file(folder / part / "adapter_model.safetensors")
            for folder in (result.out, tmp_path / "again")
        )
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_everything_kept_is_the_adapter_itself(run_of, tmp_path):
    result = compact.compress(
        str(run_of("rosa")), Choice("dare", "B", drop=0.0, strength=1.0), tmp_path / "out", True
    )
    assert result.loss_after == result.loss_before
    before = load_file(run_of("rosa") / "adapter" / "adapter_model.safetensors")
    assert all(
        torch.equal(tensor, before[key])
        for key, tensor in load_file(result.out / "adapter_model.safetensors").items()
    )


@pytest.mark.parametrize(
    "choice", [COMPEFT, replace(DARE, method="darex_q", drop=0.9)], ids=lambda choice: choice.method
)
def test_a_search_takes_the_least_loss(run_of, tmp_path, choice):
    result = compact.compress(
        str(run_of("lora")), replace(choice, strength=None), tmp_path / "out", True
    )
    assert result.searched_on == "the first 59 training rows"
    assert list(result.searched) == choice.grid
    assert result.searched[result.strength] == min(result.searched.values())
    assert len(set(result.searched.values())) == len(result.searched)
    fixed = compact.compress(
        str(run_of("lora")), replace(choice, strength=result.strength), tmp_path / "fixed", True
    )
    assert fixed.loss_after == result.loss_after
    one, other = (
        load_file(folder / "adapter_model.safetensors") for folder in (result.out, fixed.out)
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_where_to_search_without_training_rows():
    held_out = SimpleNamespace(sequences=SimpleNamespace(rows=range(2)))
    stream: Any = SimpleNamespace(
        train=None,
        held_out=held_out,
        task=SimpleNamespace(kind="chat"),
        collate=Collate(0, True, False),
    )
    actual, name = compact._search_rows(stream)
    assert name == "the first 2 held-out rows"
    assert actual.sequences.packs == [[0], [1]]
    assert actual.collate == Collate(0, False, False)
    stream.held_out = None
    with pytest.raises(AdapterError, match=r"no rows to search on.* Give alpha= or q= a number"):
        compact._search_rows(stream)


def test_the_grid_of_q():
    grid = replace(DARE, method="darex_q", drop=0.9, strength=None).grid
    assert len(grid) == 9
    assert (grid[0], grid[-1]) == (pytest.approx(0.1), 1.0)
    assert all(
        second / first == pytest.approx(10 ** (1 / 8)) for first, second in itertools.pairwise(grid)
    )


def test_an_adapter_that_answers_differently_is_refused(run_of, tmp_path, monkeypatch):
    read = coding.read

    def spoilt(path: Path) -> Any:
        tensors = read(path)
        next(tensor for key, tensor in tensors.items() if "lora_B" in key).neg_()
        return tensors

    monkeypatch.setattr(coding, "read", spoilt)
    with pytest.raises(Mismatch, match="differs from the run's model"):
        compact.compress(str(run_of("lora")), COMPEFT, tmp_path / "deep" / "out", False)
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "prompt_tuning",
            (
                "PROMPT_TUNING is not the sum of its weights and an update that starts at zero."
                " Compression is for LoRA"
            ),
        ),
        ("pissa", "init_lora_weights=pissa.* is saved as the difference of two products"),
        ("bilora", "adapter=bilora is trained with few values, and method=compeft would round"),
        ("mos", "adapter=mos trains pools, and its LoRA repeats them in each layer"),
        ("full", "adapter=full leaves no adapter to compress"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(
    run_of, tmp_path, monkeypatch, kind, message
):
    run = run_of(kind)
    monkeypatch.setattr(compact, "load_trained", None)
    with pytest.raises(AdapterError, match=message):
        compact.compress(str(run), COMPEFT, tmp_path / "out", False)
    assert not (tmp_path / "out").exists()


def test_few_values_are_packed_without_a_loss(run_of, tmp_path):
    run = run_of("bilora")
    choice = Choice.of("levels", None, None, None, None, None)
    result = compact.compress(str(run), choice, tmp_path / "out", False)
    assert result.difference < 1e-4
    compact.expand(result.out, tmp_path / "expanded")
    before, after = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (run / "adapter", tmp_path / "expanded")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert result.after < result.before / 8  # 32 bits to one, and a header for tiny matrices
    with pytest.raises(AdapterError, match="method=levels packs factors of at most 16 values"):
        compact.compress(str(run_of("lora")), choice, tmp_path / "other", False)


def test_the_verb(run_of, tmp_path, capsys):
    run = run_of("lora")
    out = tmp_path / "out"
    assert compress.main([f"run={run}", "method=darex_q", "drop=0.8", f"out={out}"]) == 0
    said = capsys.readouterr().out
    for words in (
        "bits per parameter",
        "held-out loss",
        "q=",
        "of least loss on the first 59 training rows (0.2: ",
        f"{out}\nloaded back",
    ):
        assert words in said
    assert compress.main([f"run={run}", "method=compeft", f"out={out}"]) == 2
    assert "out exists. Remove it" in capsys.readouterr().err
    with pytest.raises(FolderError, match="exists"):
        compact.expand(out, out)
    assert (out / coding.FILE).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either run=FOLDER or expand=FOLDER"),
        (["run=x", "expand=y"], "either run=FOLDER or expand=FOLDER"),
        (["expand=x"], "takes out=FOLDER and nothing else"),
        (["expand=x", "out=y", "keep=0.1"], "takes out=FOLDER and nothing else"),
        (["expand=none", "out=y"], "none has no compact.safetensors"),
        (["run=x"], "missing: method=compeft|dare|darex_q"),
        (["run=x", "method=ties"], "method=ties: expected one of compeft, dare, darex_q"),
        (["run=x", "method=compeft", "keep=0"], "keep=0: expected a number, above 0 and at most 1"),
        (["run=x", "method=compeft", "keep=nan"], "keep=nan: expected a number, above 0"),
        (["run=x", "method=compeft", "alpha=-1"], "alpha=-1: expected a number, above 0, or auto"),
        (
            ["run=x", "method=compeft", "drop=0.5"],
            "drop=0.5 has no effect with method=compeft, which takes keep, alpha, scope",
        ),
        (["run=x", "method=dare", "scope=run"], "scope=run has no effect with method=dare"),
        (["run=x", "method=dare", "drop=1"], "drop=1: expected a number, at least 0 and below 1"),
        (["run=x", "method=dare", "q=0.5"], "q=0.5 has no effect with method=dare"),
        (["run=x", "method=dare", "factors=A"], "factors=A: expected one of both, B"),
        (["run=x", "method=dare", "seed=1.5"], "seed=1.5: expected a whole number"),
        (
            ["run=x", "method=darex_q", "q=0.05"],
            "q=0.05: expected auto, or from 1 - drop = 0.1 to 1",
        ),
        (["run=no/run", "method=dare"], "no/run is no run folder"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(compress.main, arguments) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_compact_file_without_its_config_is_refused(tmp_path):
    coding.write(tmp_path / coding.FILE, {"x": torch.ones(2)}, [])
    with pytest.raises(
        AdapterError,
        match=r"adapter_config.json is missing; it belongs to compact.safetensors",
    ):
        compact.expand(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["lora", "dora", "mos", "pissa", "rosa", "sparse", "classes"])
def test_sizes_are_those_of_the_update(run_of, tmp_path, kind):
    run = run_of(kind)
    assert sizes.main([f"run={run}", f"json={tmp_path / 'sizes.json'}"]) == 0
    layers = {row["module"]: row for row in json.loads((tmp_path / "sizes.json").read_text())}
    actual = trained_module.load_trained(str(run), fp32=True)
    with actual.adapter.disabled(actual.model):
        alone = {
            name: tensor.clone()
            for name, tensor in (
                actual.base.load(torch.float32, actual.task.labels if kind == "classes" else None)
                .state_dict()
                .items()
            )
        }
    merged = actual.adapter.merge(actual.model).state_dict()
    seen = 0
    for module, row in layers.items():
        if row["density"] is None and kind == "mos":
            assert module.startswith("graft_pools.")
            assert row["bytes"] == 0  # the file has the layers' LoRA
            continue
        if row["density"] is None:
            assert (kind, module) == ("classes", "score")
            assert row["parameters"] == merged["score.weight"].numel()
            continue
        base = alone[f"{module}.weight"].double()
        update = merged[f"{module}.weight"].double() - base
        assert row["norm"] == pytest.approx(float(update.norm() / base.norm()), rel=1e-4)
        values = torch.linalg.svdvals(update)
        shares = [float(value / values.sum()) for value in values if value > 1e-12]
        assert row["rank"] == pytest.approx(
            math.exp(-sum(share * math.log(share) for share in shares)), rel=1e-2
        )
        if kind == "sparse":
            assert row["density"] == int(0.05 * update.numel()) / update.numel()
        else:
            assert row["density"] > 0.99
        seen += 1
    assert seen == 14
    file = load_file(run / "adapter" / "adapter_model.safetensors")
    assert sum(row["bytes"] for row in layers.values()) == sum(
        t.numel() * t.element_size() for t in file.values()
    )
    trained = sum(
        p.numel()
        for p in trained_module.load_trained(str(run)).model.parameters()
        if p.requires_grad
    )
    assert sum(row["parameters"] for row in layers.values()) == trained


def test_sizes_without_an_update_or_without_an_adapter(run_of, tmp_path, capsys):
    assert sizes.main([f"run={run_of('prompt_tuning')}", f"json={tmp_path / 'sizes.json'}"]) == 0
    (row,) = json.loads((tmp_path / "sizes.json").read_text())
    assert row["parameters"] * 4 == row["bytes"] > 0
    assert row["rank"] is None
    capsys.readouterr()
    assert sizes.main([f"run={run_of('full')}"]) == 2
    assert "adapter=full leaves no adapter to measure" in capsys.readouterr().err
    assert sizes.main([f"run={run_of('mola')}"]) == 2
    assert "adapter=mola leaves no adapter to measure" in capsys.readouterr().err
    assert exit_code(sizes.main, ["run=x", "json=no/where.json"]) == 2
    assert "there is no folder no" in capsys.readouterr().err


def test_effective_rank_is_exact_where_it_is_known():
    assert adapter_sizes.effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)
    assert adapter_sizes.effective_rank(torch.zeros(4)) == 0
    B, A = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        for shape in ((9, 3), (3, 5))
    )
    torch.testing.assert_close(
        adapter_sizes.low_rank_svdvals(B, A),
        torch.linalg.svdvals((B @ A).double())[:3],
        rtol=1e-6,
        atol=1e-6,
    )
