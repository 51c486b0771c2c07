"""Shares of linears by a search: its masks, its budget and the pruned folder."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import sums, write_rows
from tests.toys.commands import exit_code
from tests.toys.families import model_of
from trainer.shrink import main
from trainer.shrinking import search_levels, wanda
from trainer.shrinking.divergence import Divergence
from trainer.shrinking.families import FAMILIES, layers_of, linears_of
from trainer.shrinking.patterns import Pattern
from trainer.shrinking.sparse import Sparse

CPU = torch.device("cpu")
SHAPE = FAMILIES["llama"]
ROWS = [torch.arange(3, 3 + count) for count in (9, 14, 9)]


@pytest.mark.parametrize("by", ["magnitude", "wanda"])
def test_a_candidate_runs_as_a_model_pruned_to_its_shares(by):
    model = model_of("llama").float()
    layers = layers_of(model, SHAPE)
    before = copy.deepcopy(model.state_dict())
    sparse = Sparse(by, Pattern.of("unstructured", 0.5), "all", SHAPE)
    masks = search_levels.masks(sparse, model, layers, ROWS, 0.125, CPU)
    judge = Divergence(model, layers, ROWS, CPU, masks.run_at)
    candidate = masks.uniform
    draw = random.Random(0)
    for _ in range(9):
        candidate = masks.space.swapped(candidate, draw)
    assert candidate != masks.uniform

    # by hand: the inputs of each linear in the whole model, and a share of each row
    inputs = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args: inputs.setdefault(module, []).append(args[0].flatten(0, -2))
        )
        for layer in layers
        for module in linears_of(layer, SHAPE).values()
    ]
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    pruned = copy.deepcopy(model)
    levels = iter(candidate)
    stays = 0
    for layer, twin in zip(layers, layers_of(pruned, SHAPE), strict=True):
        for name, linear in linears_of(layer, SHAPE).items():
            count = round(0.5 * linear.in_features) + next(levels) * round(
                0.125 * linear.in_features
            )
            score = linear.weight.detach().abs()
            if by == "wanda":
                score = score * torch.cat(inputs[linear]).norm(dim=0)
            least = score.topk(count, dim=-1).values[:, -1:]
            twin.get_submodule(name).weight.data.mul_(score >= least)
            assert masks.patterns(candidate)[linear].count(linear.in_features) == count
            stays += count * linear.out_features
    total = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)
    assert stays == total // 2  # the budget

    states = list(judge._after([0, 1, 2], judge.layers_of(candidate)))
    for row, state in zip(ROWS, states, strict=True):
        with torch.no_grad():
            expected = pruned.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)
    assert judge.of(candidate, [0, 1, 2]) > 0
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # put back


def test_inputs_are_those_of_the_whole_model():
    model = model_of("llama").float()
    layers = layers_of(model, SHAPE)
    sparse = Sparse("wanda", Pattern.of("unstructured", 0.5), "mlp", SHAPE)
    norms = search_levels.Norms(sparse)
    search_levels.walk(model, layers, ROWS, norms, CPU)
    seen = wanda.InputNorms()
    hook = layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: seen.add(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=row[None], use_cache=False)
    hook.remove()
    torch.testing.assert_close(norms.norms[layers[1].mlp.down_proj], seen.norms)


@pytest.mark.long
def test_a_folder_pruned_to_searched_shares(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", sums(120))
    words = ["base=tiny", "task.path=rows.jsonl", "rows=60", "pattern=unstructured", "step=0.2"]
    search = ["search=evolution", "generations=3", "offspring=4", "evaluate=false"]
    for method in ("wanda", "sparsegpt"):
        assert exit_code(main, [*words, *search, f"method={method}", f"to={method}"]) == 0
        record = json.loads((tmp_path / method / "shrink.json").read_text())
        assert record["divergence"] <= record["divergence_uniform"]
        assert record["step"] == 0.2
        shares = [share for each in record["layers_figures"] for share in each["linears"].values()]
        assert len(set(shares)) > 1
        text = (tmp_path / method / "README.md").read_text()
        assert "in 3 generations of a search" in text
        assert f"{record['divergence_uniform']:.3g}" in capsys.readouterr().out
    # each row of a linear keeps its share
    weights = load_file(tmp_path / "wanda/model.safetensors")
    for index, layer in enumerate(
        json.loads((tmp_path / "wanda/shrink.json").read_text())["layers_figures"]
    ):
        for name, share in layer["linears"].items():
            weight = weights[f"model.layers.{index}.{name}.weight"]
            assert (weight.count_nonzero(-1) == round(share * weight.shape[1])).all()


REFUSED = {
    "pattern": (["search=evolution"], "search=evolution needs pattern=unstructured"),
    "step": (
        ["search=evolution", "pattern=unstructured", "step=0.9"],
        "step=0.9: density=0.5 leaves no level",
    ),
    "no search": (["pattern=unstructured", "step=0.1"], "step=0.1 has no effect without search"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_searched_is_refused_in_a_line(tmp_path, monkeypatch, case, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", sums(40))
    words, message = REFUSED[case]
    start = ["base=tiny", "task.path=rows.jsonl", "to=out", "method=wanda"]
    assert exit_code(main, [*start, *words]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
