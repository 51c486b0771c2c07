"""graft shrink from the command line to a folder: whole or not at all, resumed, refused in a
line."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tests.conftest import sums, write_rows
from tests.toys.commands import exit_code
from tests.toys.families import folder_of
from trainer.shrink import main
from trainer.shrinking import making
from trainer.shrinking.families import FAMILIES, layers_of, linears_of
from trainer.shrinking.patterns import Pattern
from trainer.shrinking.sparse import Sparse

SHAPE = FAMILIES["llama"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", sums(120))
    return tmp_path


def shrink(*words):
    return exit_code(main, ["base=tiny", "task.path=rows.jsonl", "rows=60", "to=out", *words])


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.long
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_pruned_folder_is_a_plain_model_with_a_card(place, tiny, method, capsys):
    assert shrink(f"method={method}") == 0
    model = loaded("out")
    for layer in layers_of(model, SHAPE):
        for linear in linears_of(layer, SHAPE).values():
            assert Pattern.of("2:4").follows(linear.weight)
            assert linear.weight.count_nonzero() == linear.weight.numel() // 2
    assert AutoTokenizer.from_pretrained("out").chat_template == tiny.tokenizer.chat_template
    assert (place / "out/generation_config.json").exists()
    record = json.loads((place / "out/shrink.json").read_text())
    assert record["before"]["loss"] != record["after"]["loss"]
    assert record["before"]["parameters"] == record["after"]["parameters"]
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert record["after"]["nonzero"] == total - zeros
    text = (place / "out/README.md").read_text()
    assert "2:4" in text
    data = ModelCard(text).data
    assert (data.library_name, data.tags) == ("transformers", ["graft", "pruned", method])
    assert "of their spread" in text
    assert f"{record['after']['loss']:.4f}" in text
    assert f"{record['after']['loss']:.4f}" in capsys.readouterr().out
    assert sorted(path.name for path in place.iterdir()) == ["out", "rows.jsonl"]


@pytest.mark.long
def test_a_folder_with_fewer_layers_and_one_with_narrower_mlps(place):
    assert shrink("method=drop_layers", "layers=1", "score=cosine") == 0
    assert loaded("out").config.num_hidden_layers == 1
    record = json.loads((place / "out/shrink.json").read_text())
    least = min(range(2), key=lambda index: record["layers_figures"][index]["influence"])
    assert record["dropped"] == [least]
    assert shrink("to=narrow", "method=narrow", "ffn=0.5", "multiple=8", "evaluate=false") == 0
    assert loaded("narrow").config.intermediate_size == 16
    assert "loss" not in json.loads((place / "narrow/shrink.json").read_text())["after"]
    # a smaller base is a base like any other
    words = ["base=hf", "base.path=narrow", "to=both", "method=drop_layers", "layers=1"]
    assert shrink(*words) == 0
    assert loaded("both").num_parameters() < loaded("narrow").num_parameters()


@pytest.mark.long
def test_a_stopped_command_resumes_after_its_last_layer(place, monkeypatch, capsys):
    assert shrink("to=whole", "method=wanda") == 0
    pruned, change = [], Sparse.change

    def stops(self, layer):
        if pruned:
            raise KeyboardInterrupt
        pruned.append(layer)
        return change(self, layer)

    monkeypatch.setattr(Sparse, "change", stops)
    with pytest.raises(KeyboardInterrupt):
        shrink("method=wanda")
    assert not (place / "out").exists()
    assert sorted(path.name for path in (place / ".out.shrink").glob("*.safetensors")) == [
        "layer-0000.safetensors"
    ]
    # of the second try only the second layer is pruned
    pruned.clear()
    monkeypatch.setattr(
        Sparse, "change", lambda self, layer: (pruned.append(layer), change(self, layer))[1]
    )
    assert shrink("method=wanda") == 0
    assert len(pruned) == 1
    assert not (place / ".out.shrink").exists()
    expected, resumed = loaded("whole").state_dict(), loaded("out").state_dict()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    records = [json.loads((place / name / "shrink.json").read_text()) for name in ("whole", "out")]
    assert records[0]["layers_figures"] == records[1]["layers_figures"]


@pytest.mark.long
@pytest.mark.parametrize("damage", ["other settings", "a damaged layer"])
def test_a_layer_of_other_settings_or_a_damaged_one_is_made_again(place, monkeypatch, damage):
    monkeypatch.setattr(making, "write", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shrink("method=wanda", "seed=1" if damage == "other settings" else "seed=0")
    monkeypatch.undo()
    monkeypatch.chdir(place)
    if damage == "a damaged layer":
        (place / ".out.shrink/layer-0001.safetensors").write_bytes(b"{}")
    assert shrink("method=wanda") == 0
    assert shrink("to=whole", "method=wanda") == 0
    expected, again = loaded("whole").state_dict(), loaded("out").state_dict()
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def base_of(place, name, **settings):
    folder = folder_of(name, place / name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return f"base.path={folder}"


def odd_sizes(place):
    sizes = {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaConfig(**sizes, intermediate_size=24, num_hidden_layers=2).save_pretrained(place / "odd")
    return "base.path=odd"


def adapter_folder(place):
    (place / "adapter").mkdir()
    (place / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    return "base.path=adapter"


QUANTISED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
REFUSED = {
    "family": (
        lambda place: [base_of(place, "gpt2"), "method=wanda"],
        "is of the family 'gpt2', whose layers graft shrink does not know. It knows apertus,",
    ),
    "mixture of experts": (
        lambda place: [base_of(place, "mixtral"), "method=drop_layers", "layers=1"],
        "is of the family 'mixtral', whose layers",
    ),
    "packed": (
        lambda place: [base_of(place, "phi3"), "method=narrow", "ffn=0.5"],
        "method=narrow: the family 'phi3' has the MLP's projections in one packed weight",
    ),
    "quantised": (
        lambda place: [base_of(place, "llama", **QUANTISED), "method=wanda"],
        "is quantised",
    ),
    "quantising": (
        lambda place: ["base=tiny", "base.quantization=nf4", "method=wanda"],
        "base.quantization=nf4: shrinking changes plain weights",
    ),
    "adapter": (
        lambda place: [adapter_folder(place), "method=wanda"],
        "is an adapter of PEFT, not a model: set base.path=org/base",
    ),
    "pattern": (
        lambda place: [odd_sizes(place), "method=wanda", "pattern=4:8"],
        "pattern=4:8: 20 inputs are no multiple of 8 (self_attn.q_proj of the decoder layers)",
    ),
    "few rows": (
        lambda place: ["base=tiny", "method=wanda", "rows=500"],
        "rows=500: the task has 118 training rows. Use rows=118, or more data",
    ),
    "few tokens": (
        lambda place: ["base=tiny", "base.hidden_size=64", "method=wanda", "rows=1"],
        "and the states of the base have 64 numbers, which so few tokens do not show",
    ),
    "classes": (
        lambda place: ["base=tiny", "task=classification", "method=wanda"],
        "graft shrink reads texts or conversations, and this task classifies",
    ),
    "no held-out rows": (
        lambda place: ["base=tiny", "task.eval_fraction=0", "method=wanda", "rows=60"],
        "set task.eval_fraction or task.eval_path, or evaluate=false",
    ),
    "all layers": (
        lambda place: ["base=tiny", "method=drop_layers", "layers=2"],
        "layers=2: the base has 2, so at most 1 can go",
    ),
    "no neurons": (
        lambda place: ["base=tiny", "method=narrow", "ffn=0.75"],
        "ffn=0.75 of 32 neurons, in multiples of 128, is 0, which leaves none",
    ),
    "no base": (lambda place: ["method=wanda"], "base.path"),
    "exists": (
        lambda place: ["base=tiny", "method=wanda", "to=."],
        "to=. exists. Remove it, or choose another folder",
    ),
    "other option": (
        lambda place: ["base=tiny", "method=wanda", "ffn=0.5"],
        "ffn=0.5 has no effect with method=wanda, which takes pattern, density, part, search",
    ),
    "needed": (lambda place: ["base=tiny", "method=narrow"], "missing: ffn= of method=narrow"),
    "density": (
        lambda place: ["base=tiny", "method=wanda", "density=0.3"],
        "density=0.3 needs pattern=unstructured, not 2:4",
    ),
    "score": (
        lambda place: ["base=tiny", "method=narrow", "ffn=0.5", "score=angular"],
        "score=angular: method=narrow takes activation_weight or activation",
    ),
    "no width": (lambda place: ["base=tiny", "method=slice"], "missing: width= of method=slice"),
    "search": (
        lambda place: ["base=tiny", "method=narrow", "ffn=0.5", "search=evolution"],
        "search=evolution has no effect with method=narrow",
    ),
    "no search": (
        lambda place: ["base=tiny", "method=drop_layers", "layers=1", "offspring=4"],
        "offspring=4 has no effect without search=evolution",
    ),
    "all states": (
        lambda place: ["base=tiny", "method=slice", "width=0.9"],
        "width=0.9 of 16, in multiples of 32, is 0, which leaves none. Use another width=",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_shrunk_is_refused_in_a_line(place, case, capsys):
    make, message = REFUSED[case]
    if case == "classes":
        rows = [{"text": f"{n}", "label": n % 2} for n in range(80)]
        write_rows(place / "rows.jsonl", rows)
    words = make(place)
    before = sorted(place.rglob("*"))
    words = [*words, *([] if any(word.startswith("to=") for word in words) else ["to=out"])]
    assert exit_code(main, ["task.path=rows.jsonl", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "Traceback" not in said
    assert sorted(place.rglob("*")) == before


@pytest.mark.long
def test_a_pruned_base_is_refused_but_for_dropped_layers(place, capsys):
    assert shrink("method=wanda", "evaluate=false") == 0
    words = ["base=hf", "base.path=out", "evaluate=false"]
    for method in (["method=magnitude"], ["method=narrow", "ffn=0.5", "multiple=8"]):
        assert shrink(*words, "to=again", *method) == 2
        said = capsys.readouterr().err
        assert "is pruned already: 50% of self_attn.q_proj in layer 0 is zero" in said
        assert "in the pattern 2:4" in said
        assert not (place / "again").exists()
    assert shrink(*words, "to=again", "method=drop_layers", "layers=1") == 0
    weight = layers_of(loaded("again"), SHAPE)[0].mlp.down_proj.weight
    assert Pattern.of("2:4").follows(weight)


@pytest.mark.long
def test_narrower_states_and_a_search_for_layers(place, capsys):
    assert shrink("method=slice", "width=0.75", "multiple=4") == 0
    record = json.loads((place / "out/shrink.json").read_text())
    model = loaded("out")
    assert model.config.hidden_size == record["states"] == 12
    assert "after one rotation of the whole model" in capsys.readouterr().out
    words = ("to=searched", "method=drop_layers", "layers=1", "search=evolution", "generations=2")
    assert shrink(*words, "offspring=2", "base.layers=3") == 0
    record = json.loads((place / "searched/shrink.json").read_text())
    assert loaded("searched").config.num_hidden_layers == 2
    assert record["divergence"] <= record["divergence_least_influence"]
    assert record["generations"] == 2
    assert "2 generations of a search" in (place / "searched/README.md").read_text()
    assert not (place / ".searched.shrink").exists()
