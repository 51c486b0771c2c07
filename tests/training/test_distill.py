"""Distilling for the model that is served: the same drafter as on the merged model, and nothing of
the target is changed."""

from __future__ import annotations

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from adapters.delta import Start
from adapters.full import Nothing
from tests.conftest import sums, write_rows
from trainer import evaluate, generate
from trainer.assembly.build import instantiate
from trainer.assembly.early_checks import target_faults
from trainer.assembly.rows import Data, token_counts
from trainer.assembly.trained import Tuned, load_trained
from trainer.callbacks import evaluation
from trainer.config import compose as compose_module
from trainer.config.errors import ConfigError
from trainer.data.rows import Rows
from trainer.drafters import Drafter, Target
from trainer.models.base import BaseError
from trainer.models.losses import CausalLoss
from trainer.session.inspect import refuse_monitor
from trainer.storage import checkpoints, journal
from trainer.storage.checkpoints import CheckpointError
from trainer.training.distill import Distill, DraftLoss
from trainer.training.finetune import FineTune

DRAFT = (
    "adapter=none",
    "objective=distill",
    "drafter=mtp_parallel",
    "drafter.offsets=2",
    "batch_size=4",
)
TIMES = ("seconds", "answer_seconds", "tokens_per_s", "trained_per_s")


@pytest.fixture(scope="module")
def folder_kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def tuned(train, folder_kept, tmp_path):
    """A fine-tuning run whose adapter says something, with dropout that must not act on its
    drafter; a copy for each test."""
    if not (folder_kept / "tuned").exists():
        train(
            f"task.path={write_rows(folder_kept / 'rows.jsonl', sums(60))}",
            "max_steps=4",
            "adapter.dropout=0.3",
            "optimizer.lr=0.1",
            "adapter.target_modules=[q_proj,up_proj]",
            f"runs={folder_kept}",
            "name=tuned",
            "callbacks.checkpoints.keep=null",
        )
    return shutil.copytree(folder_kept / "tuned", tmp_path / "runs" / "tuned")


@pytest.fixture
def distil(train, chats, tuned):
    def distilled(*overrides):
        return train(f"task.path={chats}", *DRAFT, f"target.run={tuned}", "max_steps=4", *overrides)

    return distilled


def drafter_of(run):
    return checkpoints.load(checkpoints.chosen(run / "checkpoints", "last"))["drafter"]


def rows_of(run, kind):
    rows = [row for row in journal.read(run / "metrics.jsonl") if row["kind"] == kind]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def batch(packed=False):
    ids = torch.randint(3, 259, (3, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :6] = -100
    actual = {"input_ids": ids, "labels": labels}
    return actual | (
        {"position_ids": torch.arange(24).remainder(12).expand(3, 24)} if packed else {}
    )


def built(model, choice, *overrides):
    """A drafter of conf/drafter with weights that are not its start's."""
    node = compose_module.compose(
        ["base=tiny", "task.path=x", "adapter=none", f"drafter={choice}", *overrides]
    )["drafter"]
    drafter = instantiate(dict(node))(model=model)
    torch.manual_seed(3)
    for parameter in drafter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return drafter


def gradients(loss, drafter, rows):
    drafter.zero_grad()
    total, actual = loss(rows)
    total.backward()
    return (
        {name: p.grad.clone() for name, p in drafter.named_parameters() if p.grad is not None},
        total.detach(),
        actual,
    )


@pytest.mark.long
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("choice", ["mtp_parallel", "mtp_medusa", "eagle3"])
def test_the_drafters_gradients_are_fine_tunings(tiny, choice, packed):
    """On the same states, with nothing else trained; and no logit of the target's own next token is
    computed."""
    model = Nothing().attach(tiny.load(torch.float32), Start())
    drafter = built(
        model,
        choice,
        *(["drafter.aux_layers=[0,1,2]", "drafter.offsets=3"] if choice == "eagle3" else []),
    )
    target, rows = Target(model), batch(packed)
    expected, whole, numbers = gradients(CausalLoss(model, 8, drafter, target), drafter, rows)
    actual, alone, own = gradients(DraftLoss(model, 8, drafter, target), drafter, rows)
    assert expected.keys() == actual.keys()
    assert any(gradient.abs().max() > 0 for gradient in actual.values())
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
    assert torch.allclose(alone, whole - drafter.main_weight * numbers["loss"], rtol=1e-5)
    assert torch.equal(own["offsets"], numbers["offsets"])
    assert own["tokens"] == numbers["tokens"]
    assert "right" not in own
    assert own["loss"] == alone


@pytest.mark.long
def test_states_may_come_from_elsewhere(tiny):
    model = Nothing().attach(tiny.load(torch.float32), Start())
    drafter = built(model, "eagle3", "drafter.aux_layers=[0,1,2]", "drafter.offsets=2")
    target, rows = Target(model), batch()
    loss = DraftLoss(model, 8, drafter, target)
    expected, total, _ = gradients(loss, drafter, rows)
    folder_kept = loss.forward(rows)[:2]
    assert folder_kept[1].shape == (3, 24, 3 * 16)
    assert not folder_kept[1].requires_grad
    calls = []
    stored = DraftLoss(model, 8, drafter, target, lambda batch: calls.append(batch) or folder_kept)
    actual, again, _ = gradients(stored, drafter, rows)
    assert calls == [rows]
    assert again == total
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


def test_only_a_drafter_is_trained(tiny):
    model = tiny.load(torch.float32)
    arguments = {
        "model": model,
        "adapter": Nothing(),
        "optimizer": None,
        "schedule": None,
        "steps": 1,
        "labelled": False,
        "accumulate": 1,
        "seed": 0,
        "max_grad_norm": None,
        "logits_chunk": 8,
        "gradient_checkpointing": False,
        "nonfinite_limit": 3,
        "repeat_smaller": False,
    }
    with pytest.raises(ValueError, match="objective=distill trains a drafter, and there is none"):
        Distill(**arguments)
    with pytest.raises(ValueError, match="trains the drafter only: set adapter=none"):
        Distill(**arguments, drafter=built(model, "mtp_medusa"))


def test_the_served_model_is_the_target(train, chats, distil, tuned, tmp_path, monkeypatch):
    """Distilling on base + un-merged adapter is distilling on the merged model; the target stays as
    it was, bit for bit."""
    models = []
    attach = Tuned.attach

    def folder_kept(self, model):
        model = attach(self, model)
        models.append((model, copy.deepcopy(model.state_dict())))
        return model

    monkeypatch.setattr(Tuned, "attach", folder_kept)
    same = ("drafter=mtp_medusa", "callbacks.evaluation.every=1")
    run = distil("name=unmerged", *same)
    model, before = models[0]
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert any("delta" in name for name in before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    actual = load_trained(str(tuned), fp32=True)
    actual.adapter.merge(actual.model).save_pretrained(tmp_path / "merged")
    actual.base.tokenizer.save_pretrained(tmp_path / "merged")
    common = (f"task.path={chats}", *DRAFT, "max_steps=4", *same)
    merged = train(*common, "base=hf", f"base.path={tmp_path / 'merged'}", "name=merged")
    alone = train(*common, "name=alone")
    expected, own, other = drafter_of(merged), drafter_of(run), drafter_of(alone)
    assert all(torch.allclose(own[name], expected[name], atol=1e-4) for name in expected)
    assert not all(torch.allclose(other[name], expected[name], atol=1e-3) for name in expected)
    losses = [
        [row["loss"] for row in rows_of(place, "evaluation")] for place in (run, merged, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[2] != pytest.approx(losses[1], abs=1e-3)
    for kind in ("step", "evaluation"):
        row = rows_of(run, kind)[-1]
        assert {"loss", "offset1/top1", "accepted"} <= row.keys()
        assert not {"accuracy", "perplexity"} & row.keys()


def test_a_run_that_goes_on_ends_with_the_same_bits(chats, tuned, distil, monkeypatch):
    settings = ("callbacks.checkpoints.every=2", "callbacks.evaluation.every=2")
    calls = []
    monkeypatch.setattr(Drafter, "calibrate", lambda self, counts: calls.append(counts()))
    expected = distil("name=alone", *settings)
    with monkeypatch.context() as patch:
        step = FineTune.on_train_batch_start

        def cut(self, batch, batch_idx):
            if self.step == 3:
                raise KeyError("power")
            step(self, batch, batch_idx)

        patch.setattr(FineTune, "on_train_batch_start", cut)
        with pytest.raises(KeyError):
            distil("name=cut", *settings)
    # The first start counted tokens; the resumed one does not, and takes the weights that it finds.
    assert len(calls) == 2
    actual = distil("name=cut", "resume=auto", *settings)
    assert len(calls) == 2
    assert calls[0].sum() > 59
    assert calls[0].dtype == torch.int64
    first, second = drafter_of(expected), drafter_of(actual)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rows_of(actual, "step") == rows_of(expected, "step")
    assert rows_of(actual, "evaluation") == rows_of(expected, "evaluation")

    record = yaml.safe_load((actual / "run.yaml").read_text())["identity"]["target"]
    manifest = json.loads((tuned / "checkpoints" / "step-00000004.json").read_text())
    assert record == {
        "run": str(tuned),
        "id": record["id"],
        "step": 4,
        "sha256": manifest["sha256"],
    }
    assert (
        json.loads((actual / "drafter" / "config.json").read_text())["target"]["adapter"] == record
    )
    with pytest.raises(CheckpointError, match=r"target\.step: 4 in the run, 2 now"):
        distil("name=cut", "resume=auto", f"target.run={tuned}@2", "max_steps=6")
    for file in (tuned / "checkpoints").glob("step-00000004.*"):
        file.rename(file.with_name(file.name + ".gone"))
    with pytest.raises(CheckpointError, match="has no checkpoint '4'; it has the steps"):
        load_trained(str(actual))


def test_the_verbs_use_base_adapter_and_drafter(chats, tuned, distil, tmp_path, capsys):
    run = distil("name=draft", "drafter=mtp_medusa")
    actual, target = load_trained(str(run), fp32=True), load_trained(str(tuned), fp32=True)
    ids = torch.arange(5, 20)[None]
    assert torch.equal(actual.model(input_ids=ids).logits, target.model(input_ids=ids).logits)
    with actual.adapter.disabled(actual.model):
        assert not torch.allclose(
            actual.model(input_ids=ids).logits, target.model(input_ids=ids).logits
        )
    tensors = load_file(run / "drafter" / "model.safetensors")
    assert all(
        torch.equal(tensor, tensors[name]) for name, tensor in actual.drafter.state().items()
    )
    assert not (run / "adapter").exists()

    assert evaluate.main([f"run={run}", f"json={tmp_path / 'found.json'}"]) == 0
    measured = json.loads((tmp_path / "found.json").read_text())["adapted"]
    assert measured["offset1/loss"] == pytest.approx(
        rows_of(run, "evaluation")[-1]["offset1/loss"], abs=1e-5
    )
    assert generate.main([f"run={run}", "prompt=1+1=", "max_new_tokens=4"]) == 0
    moved = tmp_path / "elsewhere"
    (tmp_path / "runs").rename(moved)
    assert load_trained(str(moved / "draft")).adapted["run"] == str(moved / "tuned")


def refused(compose, *overrides):
    with pytest.raises(ConfigError) as error:
        compose("+experiment=smoke", "task.path=rows.jsonl", *overrides)
    return str(error.value)


@pytest.mark.long
def test_what_does_not_go_together_is_refused_before_torch(compose):
    distil = ("objective=distill", "adapter=none")
    assert "drafter=none is none: choose one" in refused(compose, *distil)
    assert "trains the drafter only: set adapter=none" in refused(
        compose, "objective=distill", "drafter=mtp_shared"
    )
    assert "no gradient through the target" in refused(
        compose, *distil, "drafter=mtp_shared", "objective.gradient_checkpointing=true"
    )
    assert "mode=max" in refused(
        compose, "drafter=mtp_shared", "callbacks.evaluation.monitor=accepted"
    )
    assert "target.draft=x is the start of a drafter" in refused(compose, "target.draft=x")
    endless = ("max_steps=null", "drafter=mtp_shared", "adapter=none")
    assert "the run has no end" in refused(compose, *endless)
    assert "target.run must" in refused(compose, "target.runs=x").replace(
        "target.runs: there is no such key. Did you mean run", "target.run must"
    )


def record(folder, **changes):
    """A run folder as far as its record says."""
    folder.mkdir()
    content = {
        "config": {
            "base": {
                "_target_": "trainer.models.tiny.tiny",
                "seed": 3,
                "layers": 2,
                "hidden_size": 16,
                "max_length": 512,
                "dtype": "auto",
                "attn_implementation": "sdpa",
                "quantization": "none",
                "double_quant": True,
            },
            "adapter": {"_target_": "adapters.lora.LoRAAdapter"},
            "target": {"run": None},
        },
        "identity": {"labels": None, "choices": {"base": "tiny"}},
    }
    for place, value in changes.items():
        node = content
        *path, last = place.split("__")
        for key in path:
            node = node[key]
        node[last] = value
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.long
def test_the_base_is_the_targets(compose, tmp_path):
    run = record(tmp_path / "tuned")
    cfg = compose(
        "task.path=x", "logger=none", "adapter=none", "drafter=mtp_shared", f"target.run={run}@best"
    )
    assert (cfg.base.seed, cfg.base._target_, cfg.hydra.runtime.choices.base) == (
        3,
        "trainer.models.tiny.tiny",
        "tiny",
    )
    own = (
        "task.path=x",
        "logger=none",
        "adapter=none",
        "drafter=mtp_shared",
        f"target.run={run}",
        "base=tiny",
        "base.seed=3",
    )
    assert compose(*own, "base.attn_implementation=eager").base.attn_implementation == "eager"
    cfg = compose(*own[:-2], "base.dtype=bfloat16")  # without saying which base: the run's
    assert (cfg.base.seed, cfg.base.dtype, cfg.base.attn_implementation) == (3, "bfloat16", "sdpa")
    with pytest.raises(
        ConfigError,
        match=(
            r"was trained on tiny, and the requested base is tiny \(base\.seed: 3 there, 4 here\)"
        ),
    ):
        compose(*own[:-1], "base.seed=4")
    with pytest.raises(
        ConfigError,
        match=r"was trained on tiny, and the requested base is ORG/NAME \(base\._target_",
    ):
        compose(*own[:-2], "base=hf", "base.path=ORG/NAME")
    with pytest.raises(
        ConfigError, match=r"was trained on tiny, and the requested base is .*SmolLM2"
    ):
        compose(*own[:-2], "base=smollm2_135m")


@pytest.mark.long
def test_runs_that_are_no_target_are_refused(compose, tmp_path):
    def message(folder, *more):
        return refused(compose, "drafter=mtp_shared", "adapter=none", f"target.run={folder}", *more)

    assert "it has no run.yaml" in message(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.yaml").write_text("a: 1")
    assert "is not a run's record: it lacks 'config'" in message(tmp_path / "empty")
    assert "trained a classifier" in message(
        record(tmp_path / "classifier", identity__labels=["a", "b"])
    )
    assert "trained no adapter" in message(
        record(tmp_path / "alone", config__adapter___target_="adapters.full.Nothing")
    )
    draft = record(tmp_path / "draft", config__target__run="runs/sql")
    assert f"give target.run=runs/sql, and target.draft={draft}" in message(draft)
    strange = record(tmp_path / "strange", config__base___target_="os.system")
    with pytest.raises(ConfigError, match=r"base\._target_ is 'os\.system'"):
        compose("task.path=x", "drafter=mtp_shared", "adapter=none", f"target.run={strange}")
    fits = record(tmp_path / "fits", config__base__seed=0)
    assert "brings that run's adapter, frozen: set adapter=none" in message(fits, "adapter=lora")


def test_the_best_drafter_is_the_one_that_is_kept(train, chats, monkeypatch):
    """EAGLE-3 over-trains: what is measured is best after the second step, and two worse ones end
    the run."""
    values = iter([1.0, 1.1, 1.5, 1.4, 1.3])
    monkeypatch.setattr(evaluation, "losses", lambda *_: {"loss": 1.0, "accepted": next(values)})
    run = train(
        f"task.path={chats}",
        *DRAFT,
        "max_steps=6",
        "export=best",
        "drafter=mtp_medusa",
        "callbacks.evaluation.every=1",
        "callbacks.evaluation.monitor=accepted",
        "callbacks.evaluation.mode=max",
        "callbacks.evaluation.patience=2",
    )
    assert rows_of(run, "step")[-1]["step"] == 4
    tensors = load_file(run / "drafter" / "model.safetensors")
    best = checkpoints.load(checkpoints.chosen(run / "checkpoints", "2"))["drafter"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in best.items())
    assert not all(torch.equal(tensor, tensors[name]) for name, tensor in drafter_of(run).items())
    assert json.loads((run / "drafter" / "config.json").read_text())["target"]["step"] == 2


def test_tokens_are_counted_where_they_are_trained():
    import datasets

    table = datasets.Dataset.from_dict(
        {
            "ids": [[5, 6, 5], [6, 6, 7, 5], [8]],
            "trained": [[True, True, True], [False, False, True, True], [True]],
        }
    )
    assert Rows(table, None).counts(9).tolist() == [0, 0, 0, 0, 0, 2, 1, 1, 0]
    assert Rows(table.select([]), None).counts(3).tolist() == [0, 0, 0]
    stream = Data(None, None, None, None, None, {})
    with pytest.raises(ConfigError, match=r"which task\.streaming=true does not allow"):
        token_counts(stream, 9)


def test_states_on_disk_train_the_same(chats, distil, tuned, tmp_path):
    """Made at the first start, and read by the second, whose target never sees a training row."""
    eagle = (
        "drafter=eagle3",
        "drafter.aux_layers=[0,1,2]",
        "drafter.coverage=0",
        "drafter.draft_vocab_size=32",
        "packing=true",
        "max_length=96",
    )
    online = distil(*eagle, "name=online")
    stored = distil(*eagle, "name=stored", f"target.features={tmp_path / 'states'}")
    assert (tmp_path / "states" / "index.json").exists()
    expected, actual = drafter_of(online), drafter_of(stored)
    assert all(
        torch.allclose(actual[name].float(), expected[name].float(), atol=1e-5) for name in expected
    )
    losses = [[row["loss"] for row in rows_of(place, "step")] for place in (online, stored)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert rows_of(stored, "evaluation")[0] == rows_of(online, "evaluation")[0]
    with pytest.raises(ValueError, match=r"adapter: .* there, .* expected"):
        distil(
            *eagle, "name=other", f"target.features={tmp_path / 'states'}", f"target.run={tuned}@2"
        )


def test_preflight_names_what_does_not_fit(tiny, tmp_path):
    assert target_faults(
        {"target": {"run": None, "draft": str(tmp_path)}, "drafter": {"offsets": 2}}, tiny
    ) == [f"target.draft={tmp_path}: it is no drafter's folder: it has no config.json"]
    task = SimpleNamespace(kind="conversation", metrics=[])

    def message(objective, drafter, monitor):
        evaluated = {"generate": 0, "monitor": monitor, "generate_every": None}
        settings = {
            "task": {"eval_path": "rows.jsonl"},
            "callbacks": {"evaluation": evaluated},
            "objective": {"_target_": objective},
            "drafter": drafter,
        }
        try:
            refuse_monitor(settings, task)
        except BaseError as error:
            return str(error)
        return ""

    alone, taught = {"offsets": 1}, {"offsets": 1, "loss": "ce"}
    assert (
        message("trainer.training.distill.Distill", taught, "expected")
        == message("trainer.training.finetune.FineTune", taught, "offset1/acceptance")
        == ""
    )
    assert message("trainer.training.distill.Distill", alone, "expected").endswith(
        "the metrics are: loss, accepted, offset1/loss, offset1/top1, offset1/top5"
    )
    assert "the metrics are: loss, accepted, expected" in message(
        "trainer.training.distill.Distill", taught, "accuracy"
    )
    assert message("trainer.training.finetune.FineTune", {}, "accepted").endswith(
        "the metrics are: loss, accuracy, perplexity"
    )
