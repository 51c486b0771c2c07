"""Runs merged into one adapter, against the weighted sum of their merged models' weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from adapters.combine import Combination
from adapters.errors import AdapterError
from tests.conftest import sums, write_rows
from tests.toys.commands import exit_code
from trainer import merge as verb
from trainer.assembly.trained import load_trained
from trainer.exporting import combinable, combined
from trainer.exporting.combined import merge
from trainer.exporting.compare import Mismatch
from trainer.storage.door import FolderError

ADAPTERS = Path(__file__).parents[2] / "conf" / "adapter"
SETTINGS = {
    "lora": ["adapter=lora", "adapter.rank=4"],
    "mos": ["adapter=mos", "adapter.rank=3", "seed=5"],
    "bilora": ["adapter=bilora", "adapter.rank=2", "adapter.alpha=2", "seed=6"],
    "increlora": ["adapter=increlora", "adapter.target_rank=2", "adapter.grow_by=1",
                  "adapter.warmup_steps=1", "adapter.interval=1", "seed=7"],
    "peft": ["adapter=pissa", "adapter.r=3", "adapter.lora_alpha=3", "seed=2"],
    "rosa": ["adapter=rosa", "adapter.rank=4", "adapter.density=0.05", "adapter.warmup_steps=1",
             "adapter.mask_steps=1", "seed=3"],
    "sparse": ["adapter=sparse", "adapter.density=0.03", "adapter.mask_steps=1", "seed=4",
               "adapter.target_modules=[q_proj,down_proj]"],
}  # fmt: skip


@pytest.fixture(scope="module")
def run_of(train_in, tmp_path_factory):
    place = tmp_path_factory.mktemp("merged")
    rows = write_rows(place / "rows.jsonl", sums(40))
    runs: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in runs:
            common = [f"task.path={rows}", "callbacks.evaluation.samples=0", "report=false"]
            common += ["callbacks.evaluation.every=null", "check_export=false", "max_steps=4"]
            runs[kind] = train_in(
                place, *common, *SETTINGS[kind], f"name={kind}", "optimizer.lr=3e-2"
            )
        return runs[kind]

    return run


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


@pytest.mark.parametrize(
    ("kinds", "weights"),
    [
        (("lora", "peft"), (0.7, 0.5)),
        (("rosa", "sparse", "mos"), (0.5, -0.5, 1.0)),
        (("increlora", "bilora"), (0.6, 0.8)),
    ],
)
def test_cat_is_the_sum_of_what_the_runs_merge_to(run_of, tmp_path, kinds, weights):
    runs = [str(run_of(kind)) for kind in kinds]
    result = merge(runs, Combination("cat", weights), tmp_path / "out", True)
    assert result.difference < 1e-4
    assert result.from_sum < 1e-6
    expected: Any = None
    for run, weight in zip(runs, weights, strict=True):
        source = load_trained(run, fp32=True)
        plain = source.base.load(torch.float32)
        if expected is None:
            expected = source.base.load(torch.float32)
        whole = dict(source.adapter.merge(source.model).named_parameters())
        for name, tensor in plain.named_parameters():
            target = expected.get_parameter(name)
            target.data += weight * (whole[name].detach() - tensor.detach())
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.library_name, data.tags[:2]) == ("peft", ["graft", "merge"])
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    before = logits(source.base.load(torch.float32))
    assert (logits(loaded) - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=0, atol=2e-4)

    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
                     "chat_template.jinja", "generation_config.json", "merge.json"}  # fmt: skip
    assert "parts" not in files
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert [entry["given"] for entry in record["runs"]] == runs
    assert all(entry["sha256"] and entry["step"] >= 4 for entry in record["runs"])
    assert record["weights"] == list(weights)
    assert record["base"] == yaml.safe_load((Path(runs[0]) / "run.yaml").read_text())["identity"][
        "base"
    ]  # fmt: skip
    assert [row["run"] for row in result.losses] == runs


def test_one_weight_alone_is_the_run_itself(run_of, tmp_path):
    runs = [str(run_of("lora")), str(run_of("rosa"))]
    result = merge(runs, Combination("cat", (0.0, 1.0)), tmp_path / "out", True)
    own = result.losses[1]
    assert own["merged"] == pytest.approx(own["own"], abs=1e-5)
    assert result.losses[0]["merged"] != pytest.approx(result.losses[0]["own"], abs=1e-4)


@pytest.mark.parametrize("method", ["ties", "svd", "dare_ties_svd"])
def test_other_methods_are_written_as_they_are_meant(run_of, tmp_path, method, capsys):
    out = tmp_path / "out"
    words = [f"runs=[{run_of('lora')},{run_of('rosa')}]", f"to={out}", f"method={method}"]
    words += [] if method == "svd" else ["density=0.5"]
    assert exit_code(verb.main, [*words, "evaluate=false"]) == 0
    text = capsys.readouterr().out
    assert "the update differs from the runs' weighted sum by" in text
    assert f"{out}\nloaded back and compared" in text
    record = json.loads((out / "merge.json").read_text())
    assert record["difference_from_weighted_sum"] > 1e-3
    assert record["weights"] == ([1.0, 1.0] if "ties" in method else [0.5, 0.5])
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4


def test_a_folder_that_answers_otherwise_is_not_left_behind(run_of, tmp_path, monkeypatch):
    write = combined.io.write

    def spoilt(folder: Path, config: Any, tensors: Any) -> None:
        if folder.name.startswith(".out"):
            next(t for key, t in tensors.items() if "lora_B" in key).neg_()
        write(folder, config, tensors)

    monkeypatch.setattr(combined.io, "write", spoilt)
    runs = [str(run_of("lora")), str(run_of("peft"))]
    with pytest.raises(Mismatch):
        merge(runs, Combination("cat", (1.0, 1.0)), tmp_path / "deep" / "out", False)
    assert list((tmp_path / "deep").iterdir()) == []


def edited(run: Path, to: Path, change: Any) -> str:
    """A copy of a run whose run.yaml says something else."""
    shutil.copytree(run, to)
    content = yaml.safe_load((to / "run.yaml").read_text())
    change(content, to)
    (to / "run.yaml").write_text(yaml.safe_dump(content))
    return str(to)


REFUSED = {
    "have different bases: weights differ": lambda c, f: c["identity"].update(base="0"),
    "have different bases: base.quantization": lambda c, f: c["config"]["base"].update(
        quantization="nf4"
    ),
    "have different chat templates: the first line that differs is 'other'": lambda c, f: (
        f / "chat_template.jinja"
    ).write_text("other"),
    "end answers in different tokens: ": lambda c, f: c.update(answer_ends={"<|eot|>": 4}),
    "trained a classification head": lambda c, f: c["identity"].update(labels=["a", "b"]),
    "trained a draft head": lambda c, f: c["identity"].update(target={"run": "x"}),
    "has base.add_tokens=": lambda c, f: c["config"]["base"].update(add_tokens=["<x>"]),
    "has adapter.train_modules=": lambda c, f: c["config"]["adapter"].update(
        train_modules=["embed_tokens"]
    ),
    "adds the factors, which must have one rank": lambda c, f: c["config"]["adapter"].update(
        rank=9
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_runs_without_a_sum_are_refused_before_a_model_is_loaded(
    run_of, tmp_path, monkeypatch, message
):
    monkeypatch.setattr(combined, "load_trained", None)
    if "quantization" in message:  # of the tiny base, which has no such setting
        monkeypatch.setattr(combinable.run_folder.compose, "check", lambda *_: None)
    if "add_tokens" in message:
        monkeypatch.setattr(combinable.run_folder.compose, "check", lambda *_: None)
    other = edited(run_of("lora"), tmp_path / "other", REFUSED[message])
    with pytest.raises(AdapterError) as error:
        merge([str(run_of("lora")), other], Combination("linear", (1, 1)), tmp_path / "out", False)
    text = str(error.value)
    assert message in text
    assert other in text
    assert "\n" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"_target_": "adapters.full.Full"}, "trained all weights of the base, so there is no"),
        ({"_target_": "adapters.mola.MoLAAdapter"}, "chooses among its experts token by token"),
        (
            {"_target_": "adapters.peft.Peft", "peft_type": "OFT"},
            "has adapter.peft_type=OFT, which",
        ),
        (
            {"_target_": "adapters.peft.Peft", "peft_type": "LORA", "use_dora": True},
            "has adapter.use_dora=True, which is no sum of updates",
        ),
        (
            {"_target_": "adapters.peft.Peft", "peft_type": "LORA", "bias": "all"},
            "has adapter.bias=all, and biases are not combined",
        ),
        ({"_target_": "adapters.lora.LoRAAdapter", "target_parameters": "all-experts"}, "experts"),
    ],
)
def test_kinds_without_a_sum(adapter, message):
    content = {
        "identity": {"labels": None, "choices": {}},
        "config": {"adapter": adapter, "base": {}},
    }
    assert message in next(combinable.faults_of(content))


def test_each_adapter_can_be_combined_or_says_why_not():
    targets = {
        yaml.safe_load(file.read_text()).get("_target_") for file in ADAPTERS.glob("*.yaml")
    } - {None, "adapters.peft.Peft"}
    assert {*combinable.OURS, *combinable.OTHERS} >= targets
    assert not {*combinable.OURS} & {*combinable.OTHERS}


def test_several_ranks_have_no_sum_of_factors():
    grown = {"_target_": "adapters.increlora.IncreLoRAAdapter", "max_rank": 8}
    runs = [{"config": {"adapter": grown}}] * 2
    with pytest.raises(AdapterError, match=r"a has several ranks, .* or method=ties_svd$"):
        combinable.check_method(["a", "b"], runs, "ties", None)
    for method in ("cat", "svd", "ties_svd"):
        combinable.check_method(["a", "b"], runs, method, None)


def test_ranks_are_those_that_are_saved():
    peft_lora = {"_target_": "adapters.peft.Peft", "peft_type": "LORA", "r": 4}
    ranks = {
        4: peft_lora,
        8: peft_lora | {"init_lora_weights": "olora"},
        6: peft_lora | {"rank_pattern": {"q_proj": 6}},
        16: {"_target_": "adapters.lora.LoRAAdapter", "rank": 16},
        None: {"_target_": "adapters.rosa.RoSAAdapter", "rank": 16, "schedule": "spa_only"},
    }
    assert [combinable.rank(adapter) for adapter in ranks.values()] == list(ranks)
    runs = [{"config": {"adapter": ranks[None]}}] * 2
    with pytest.raises(AdapterError, match=r"none of the runs has one: use method=ties$"):
        combinable.check_method(["a", "b"], runs, "ties_svd", None)
    runs = [{"config": {"adapter": ranks[4]}}] * 2
    with pytest.raises(AdapterError, match=r"rank=9: .* has rank 8 at most"):
        combinable.check_method(["a", "b"], runs, "svd", 9)
    combinable.check_method(["a", "b"], runs, "svd", 8)


def test_an_existing_folder_stays(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FolderError, match=r"out exists\. Remove it, or choose another with to="):
        merge(["a", "b"], Combination("cat", (1.0, 1.0)), tmp_path / "out", False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=[a]"], "expected two or more"),
        (["runs=[a,a]"], "a run is there twice"),
        (["runs=[a,b]", "weights=[1]"], "1 weights for 2 runs"),
        (["runs=[a,b]", "weights=[1,x]"], "weights=[1,x]: expected numbers"),
        (["runs=[a,b]", "weights=[1,nan]"], "expected finite numbers"),
        (["runs=[a,b]", "method=ties"], "missing: density=0.5"),
        (["runs=[a,b]", "density=0.5"], "density=0.5 has no effect with method=cat"),
        (["runs=[a,b]", "rank=4"], "rank=4 has no effect with method=cat"),
        (["runs=[a,b]", "method=tis"], "Did you mean ties?"),
        (["runs=[a,b]"], "is no run folder"),
    ],
)
def test_bad_arguments_are_named(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(verb.main, [*words, "to=out"]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
