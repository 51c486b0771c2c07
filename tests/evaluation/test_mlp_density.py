"""What is reported of activations, against loops over the model's own layers, one row at a time."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from tests.toys import adapters as toys
from tests.toys.commands import exit_code
from tests.toys.finetuning import Table, adapted, lora, table
from trainer import density
from trainer.data.batches import Collate, Sequences
from trainer.data.held_out import HeldOut
from trainer.data.render import Tokens
from trainer.evaluation import mlp_density
from trainer.evaluation.mlp_density import (
    Rows,
    Sampled,
    column_norms,
    linear_part,
    measured,
    search,
)
from trainer.models.losses import CausalLoss
from trainer.penalties.deft import mlp_inputs

CPU = torch.device("cpu")


def sharp():
    """A random model that is sure of its guesses, so that they change where activations are left
    out; it has an adapter."""
    adapter, model = adapted(lora(target_modules=["down_proj", "up_proj"]))
    with torch.no_grad():
        model.model.norm.weight *= 4
    return adapter, model.eval()


def guessed(model, count=8):
    """Rows that the model itself writes, so that leaving out any part of it raises its loss."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 64, (count, 4), generator=draw)
    with torch.no_grad():
        while ids.shape[1] < 14:
            scores = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return Table(Tokens(row, [at >= 4 for at in range(14)]) for row in ids.tolist())


def held_out(model, rows=None):
    rows = rows or table(10)
    return (
        Rows(
            CausalLoss(model, 64), HeldOut(Sequences(rows), Collate(0, False, False), None), 4, CPU
        ),
        rows,
    )


def weight_of(layer):
    """What an adapted layer applies (d, F)."""
    return (
        layer.base.weight + layer.delta.scale * layer.delta.B @ layer.delta.A
        if hasattr(layer, "delta")
        else layer.weight
    )


@torch.no_grad()
def loss_of(model, rows, change=None):
    """Mean loss of trained tokens, row by row, while `change(index, h)` says what the MLPs' down
    projections are given."""
    layers = mlp_inputs(model)
    hooks = [
        module.register_forward_pre_hook(lambda _, args, index=index: (change(index, args[0]),))
        for index, (_, module) in enumerate(layers if change else [])
    ]
    total, count = 0.0, 0
    for row in rows:
        logs = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)
        for t in range(1, len(row.ids)):
            if row.trained[t]:
                total -= float(logs[t - 1, row.ids[t]])
                count += 1
    for hook in hooks:
        hook.remove()
    return total / count


def inputs_of(model, rows):
    """(N, F) of each down projection, over all tokens of all rows."""
    seen = [[] for _ in mlp_inputs(model)]

    def keep(index, h):
        seen[index].append(h[0])
        return h

    loss_of(model, rows, keep)
    return [torch.cat(parts) for parts in seen]


def test_what_an_adapted_layer_applies_is_found_by_calling_it():
    _, model = sharp()
    layer = mlp_inputs(model)[0][1]
    h = torch.randn(5, 128, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(column_norms(layer, h), weight_of(layer).norm(dim=0).float())
        torch.testing.assert_close(linear_part(layer, h), h @ weight_of(layer).T)
        assert (layer.base.weight - weight_of(layer)).abs().max() > 0.01
    conv = toys.gpt2().transformer.h[0].mlp.c_proj
    with torch.no_grad():
        conv.bias += 3.0
        torch.testing.assert_close(
            column_norms(conv, torch.zeros(1, 256, dtype=torch.float64)),
            conv.weight.norm(dim=1).float(),
        )


def test_shares_and_cett_are_those_of_loops(monkeypatch):
    monkeypatch.setattr(mlp_density, "SAMPLE", 10**6)
    _, model = sharp()
    rows, stored = held_out(model)
    actual = measured(mlp_inputs(model), rows, [0.02, 0.3], 0.0)
    assert actual["loss"] == pytest.approx(loss_of(model, stored), rel=1e-5)
    assert "ppl" not in actual
    for (name, layer), h, tau in zip(
        mlp_inputs(model), inputs_of(model, stored), [0.02, 0.3], strict=True
    ):
        one = actual["layers"][name]
        above = sum(abs(value) > tau for token in h.tolist() for value in token)
        assert one["tau"] == tau
        # A batch may round differently from its rows: a few activations may cross a threshold.
        assert one["non_zero"] == pytest.approx(1.0, abs=3 / h.numel())
        assert one["above_tau"] == pytest.approx(above / h.numel(), abs=3 / h.numel())
        w = weight_of(layer).detach()
        scores = h.abs() * w.norm(dim=0)
        middle = scores.flatten().sort().values[scores.numel() // 2]
        lengths = [
            float((token.where(score < middle, 0) @ w.T).norm() / (token @ w.T).norm())
            for token, score in zip(h, scores, strict=True)
        ]
        assert one["cett_half"] == pytest.approx(sum(lengths) / len(lengths), rel=1e-3)
    assert actual["mean"]["above_tau"] == pytest.approx(
        sum(one["above_tau"] for one in actual["layers"].values()) / 2
    )


def test_cett_does_not_depend_on_the_scale_of_activations():
    _, model = adapted(lora())
    layer = mlp_inputs(model)[0][1]
    h = torch.randn(20, 128, dtype=torch.float64) ** 3
    with torch.no_grad():
        before = Sampled(layer, h).cett(mlp_density.LEVELS // 2)
        layer.weight *= 1000
        assert Sampled(layer, h / 1000).cett(mlp_density.LEVELS // 2) == pytest.approx(
            before, rel=1e-5
        )
    assert 0 < before < 0.2


@pytest.mark.long
@pytest.mark.parametrize("percent", [2.0, 20.0])
def test_the_search_finds_what_trying_every_value_finds(percent, monkeypatch):
    monkeypatch.setattr(mlp_density, "LEVELS", 16)
    _, model = sharp()
    rows, stored = held_out(model, guessed(model))
    layers = mlp_inputs(model)
    with torch.no_grad():
        hs, weights = inputs_of(model, stored), [weight_of(layer) for _, layer in layers]
        sampled = [Sampled(layer, h) for (_, layer), h in zip(layers, hs, strict=True)]
        dense = loss_of(model, stored)

        # Two neighbours are as near as fp32 can tell, so the norms, which have a test of their own,
        # are taken over.
        norms = [one.norms for one in sampled]

        def thresholds(c):
            """Of each layer the highest whose CETT is at most c."""
            result = []
            for one, h, w in zip(sampled, hs, weights, strict=True):
                scores = h.float().abs() * one.norms
                allowed = [
                    t
                    for t in one.thresholds
                    if float(
                        ((h.where(scores < t, 0) @ w.T).norm(dim=1) / (h @ w.T).norm(dim=1)).mean()
                    )
                    <= c + 1e-6
                ]
                result.append(max(allowed))
            return tuple(result)

        values = sorted({one.cett(level) for one in sampled for level in range(17)})
        tried = {}
        for c in values:
            limits = thresholds(c)
            zeros = [0, 0]

            def left_out(index, h, limits=limits, zeros=zeros):
                h = h.where(h.float().abs() * norms[index] >= limits[index], 0)
                zeros[index] += int((h == 0).sum())
                return h

            loss = loss_of(model, stored, left_out)
            tried[c] = (
                math.exp(loss - dense),
                [zero / h.numel() for zero, h in zip(zeros, hs, strict=True)],
            )
    right = [ratio <= 1 + percent / 100 for ratio, _ in tried.values()]
    assert right == sorted(right, reverse=True)  # the search takes this for granted
    assert 1 < sum(right) < len(right) - 2
    expected = [outcome for outcome, fits in zip(tried.values(), right, strict=True) if fits][-1]
    ppl, sparsity = search(layers, rows, sampled, dense, percent)
    assert ppl["ratio"] == pytest.approx(expected[0], rel=1e-4)
    assert sparsity == pytest.approx(expected[1], abs=1e-3)
    last = sum(right)
    assert values[last - 1] - 1e-6 <= ppl["cett"] <= values[last]


def test_where_nothing_matters_all_may_be_left_out():
    _, model = adapted(lora())
    with torch.no_grad():
        for _, layer in mlp_inputs(model):
            layer.weight.zero_()
    rows, _ = held_out(model)
    actual = measured(mlp_inputs(model), rows, [0.1, 0.1], 1.0)
    assert actual["ppl"] == {"percent": 1.0, "cett": 1.0, "ratio": 1.0}
    assert actual["mean"]["ppl_sparsity"] == 1.0


# the verb


@pytest.fixture
def run(train, chats):
    settings = [
        "task.eval_fraction=0.2",
        "max_steps=12",
        "callbacks.evaluation=null",
        "adapter=deft",
    ]
    return train(f"task.path={chats}", *settings)


def test_the_verb_compares_base_and_adapted(run, warm_program):
    before = json.loads((run / "run.yaml").with_name("preflight.json").read_text())
    done = warm_program("density", f"run={run}", "ppl=5", "batch_size=5")
    assert done.returncode == 0, done.stderr
    actual = json.loads((run / "density.json").read_text())
    assert actual.keys() == {"step", "base", "adapted"}
    assert actual["step"] == 12
    # tau is the median before training
    assert actual["base"]["mean"]["above_tau"] == pytest.approx(0.5, abs=0.1)
    assert actual["adapted"]["mean"]["above_tau"] < 0.8 * actual["base"]["mean"]["above_tau"]
    assert actual["base"]["layers"].keys() == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    for name in ("base", "adapted"):
        assert actual[name]["ppl"]["ratio"] <= 1.05
        assert f"{actual[name]['mean']['cett_half']:.4f}" in done.stdout
    assert (run / "density.svg").read_text().lstrip().startswith("<?xml")
    assert before["errors"] == []


def test_the_verb_takes_a_threshold_and_another_place(run, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert density.main([f"run={run}", "tau=0", "compare=false", "ppl=0", f"json={file}"]) == 0
    actual = json.loads(file.read_text())
    assert actual.keys() == {"step", "adapted"}
    mean = actual["adapted"]["mean"]
    assert mean["above_tau"] == mean["non_zero"]
    # One or two of a layer's 11,360 activations may be sums that cancel to exactly 0. Which ones
    # depends on the order of the processor's additions.
    assert mean["non_zero"] == pytest.approx(1.0, abs=1e-3)
    assert not (run / "density.json").exists()
    for argument, message in [
        ("ppl=-1", "ppl=-1: expected a number, at least 0"),
        ("tau=small", "tau=small: expected a number"),
        ("batch_size=0", "at least 1"),
        (f"json={tmp_path / 'no' / 'x'}", "there is no folder"),
    ]:
        assert exit_code(density.main, [f"run={run}", argument]) == 2
        assert message in capsys.readouterr().err
    assert exit_code(density.main, ["run=nowhere"]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_a_run_without_a_penalty_has_the_bases_medians(train, chats, tmp_path, capsys):
    run = train(
        f"task.path={chats}", "task.eval_fraction=0.2", "max_steps=2", "callbacks.evaluation=null"
    )
    file = Path(tmp_path / "found.json")
    assert density.main([f"run={run}", "ppl=0", f"json={file}", "batch_size=2"]) == 0
    actual = json.loads(file.read_text())
    assert actual["base"]["mean"]["above_tau"] == pytest.approx(0.5, abs=0.06)
    taus = [
        [layer["tau"] for layer in actual[name]["layers"].values()] for name in ("base", "adapted")
    ]
    assert taus[0] == taus[1]
    assert all(tau > 0 for tau in itertools.chain(*taus))
