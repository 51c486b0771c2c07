"""What holds for every method: each file of conf/adapter is put through all of these by being
there."""

from __future__ import annotations

import contextlib
import copy
import io
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from adapters.delta import Adapter, AdapterError, Start
from adapters.folded import folded
from adapters.peft_fields import config_class
from tests.conftest import ROOT
from tests.toys import adapters as toys
from trainer.assembly.build import instantiate
from trainer.config import compose

PRESETS = sorted(path.stem for path in (ROOT / "conf" / "adapter").glob("*.yaml"))
STEPS = 3

# What a preset cannot run without.
SETTINGS = {
    "mos": ["adapter.rank=3"],  # two layers of a kind share two rows
    "peft": ["adapter.peft_type=LOHA", "adapter.r=4", "adapter.target_modules=all-linear"],
    "loftq": ["base.quantization=nf4"],
    "rosa": ["adapter.warmup_steps=1"],
    "spiel": ["adapter.reselection_steps=2", "adapter.accumulation_steps=1"],
    "spiel_ma": ["adapter.reselection_steps=2", "adapter.accumulation_steps=1"],
}

NOTHING_TRAINED = {"none"}
WHOLE_BASE = {"full", "sr_ste"}
ON_NF4 = {"loftq"}  # it corrects the rounding of an NF4 base, so there has to be one
STARTS_ELSEWHERE = {
    "sr_ste": "half of the base's weights are left out from the first step",
    "prompt_tuning": "its virtual tokens are attended to from the first step",
    "prefix_tuning": "its prefix is attended to from the first step",
    "loftq": (
        "it starts nearer to the base before rounding;"
        " test_loftq_starts_nearer_to_the_unrounded_base"
    ),
}
UNMERGEABLE = {
    "prompt_tuning": "works on activations",
    "prefix_tuning": "works on activations",
    "loftq": "the base is quantised",
    "mola": "depends on the input, so no weight holds it",
}
# what a sparse delta computes again from its support and the base
WORKING = (".delta.base_values", ".delta.crow", ".delta.col")
# These take their part out of the base's weights, and PEFT finds it by an SVD or an inverse in
# fp32.
PART_TAKEN_OUT = {"pissa", "corda"}
FP32 = {
    "corda": "PEFT refuses to initialise it in float64",
    "pissa": "the part that is taken out is rounded to fp32",
    "loftq": "an NF4 base computes in fp32 at most",
}


@dataclass
class Case:
    """A preset, trained for a few steps on the toy, and what was seen on the way."""

    name: str
    adapter: Adapter
    model: Any
    base_logits: Tensor
    start_logits: Tensor
    logits: Tensor
    # the base's tensors before anything was attached, by their ids
    before: dict[int, Tensor] = field(default_factory=dict)
    # all tensors before training, by name
    attached: dict[str, Tensor] = field(default_factory=dict)


@cache
def node(name: str) -> Any:
    group = compose.compose(
        [f"adapter={name}", "base=tiny", "task.path=rows.jsonl", *SETTINGS.get(name, [])]
    )
    return OmegaConf.to_container(group.adapter)


def make(name: str, **changes: Any) -> Any:
    return instantiate(node(name) | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    toys.llama(torch.float32).save_pretrained(place)
    return place


def base_of(name: str, folder: Path) -> Any:
    if name in ON_NF4:
        return toys.quantised(folder, "nf4")
    return toys.llama(torch.float32 if name in FP32 else torch.float64)


def tensors(model: Any) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )


@pytest.fixture(scope="module", params=PRESETS)
def case(request: pytest.FixtureRequest, folder: Path) -> Case:
    name = request.param
    base = base_of(name, folder)
    before = tensors(base)
    folder_kept = {id(tensor): tensor.detach().clone() for tensor in before.values()}
    base_logits = toys.logits(base)
    torch.manual_seed(1)
    adapter = make(name)
    model = adapter.attach(base, Start(steps=STEPS, data=toys.batches)).eval()
    start_logits = toys.logits(model)
    attached = {key: tensor.detach().clone() for key, tensor in tensors(model).items()}
    if name not in NOTHING_TRAINED:
        toys.train(adapter, model, range(STEPS))
    return Case(
        name, adapter, model, base_logits, start_logits, toys.logits(model), folder_kept, attached
    )


def tolerance(case: Case) -> float:
    # Logits go up to 6, and sums of a hundred products are taken in another order, in each of two
    # layers.
    return 1e-4 if case.name in FP32 else 1e-12


def close(case: Case, a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=tolerance(case))


def restored(case: Case, folder: Path, **settings: Any) -> tuple[Any, Any]:
    """The case's state, through a file as a checkpoint takes it, on a fresh base."""
    file = io.BytesIO()
    torch.save(case.adapter.state(case.model), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(2)  # nothing may depend on what attaching draws
    adapter = make(case.name)
    model = adapter.attach(base_of(case.name, folder), Start(steps=STEPS, saved=state)).eval()
    adapter.load_state(model, state)
    return adapter, model


def test_it_starts_as_the_base(case):
    assert close(case, case.start_logits, case.base_logits) != (case.name in STARTS_ELSEWHERE)


def test_training_moves_the_outputs(case):
    assert torch.isfinite(case.logits).all()
    moved = float((case.logits - case.start_logits).abs().max())
    assert (moved > 100 * tolerance(case)) != (case.name in NOTHING_TRAINED)


def test_merged_weights_give_the_adapters_outputs(case):
    model = copy.deepcopy(case.model)
    if not case.adapter.mergeable:
        with pytest.raises(AdapterError, match=UNMERGEABLE[case.name]):
            case.adapter.refuse_merging()
    if case.name in UNMERGEABLE:
        with pytest.raises(AdapterError, match=UNMERGEABLE[case.name]):
            case.adapter.merge(model)
        return
    merged = case.adapter.merge(model)
    assert {type(module).__module__.partition(".")[0] for module in merged.modules()} <= {
        "torch",
        "transformers",
    }
    assert close(case, toys.logits(merged), case.logits)


def test_folded_for_a_while_it_answers_the_same(case):
    """As at an evaluation that writes texts."""
    with folded(case.model):
        assert close(case, toys.logits(case.model), case.logits)
    assert torch.equal(toys.logits(case.model), case.logits)


def test_only_the_adapter_trains(case):
    trained = {name for name, tensor in tensors(case.model).items() if tensor.requires_grad}
    assert bool(trained) != (case.name in NOTHING_TRAINED)
    frozen_state = set(case.adapter.state(case.model)["tensors"]) - trained  # counters and the like
    of_the_base = {
        name for name, tensor in tensors(case.model).items() if id(tensor) in case.before
    }
    if case.name not in WHOLE_BASE:
        assert of_the_base.isdisjoint(trained)
    alone = case.name not in WHOLE_BASE | PART_TAKEN_OUT
    # What is held in the base's weights is taken out of them here.
    with case.adapter.disabled(case.model) if alone else contextlib.nullcontext():
        now = {
            name: tensor
            for name, tensor in tensors(case.model).items()
            if not name.endswith(WORKING)
        }
        changed = {
            name for name, tensor in now.items() if not torch.equal(tensor, case.attached[name])
        }
        assert changed <= trained | frozen_state
        if alone:
            assert len({id(now[name]) for name in of_the_base}) == len(case.before)
            assert all(torch.equal(now[name], case.before[id(now[name])]) for name in of_the_base)


def test_switched_off_the_base_answers(case):
    if case.name in WHOLE_BASE:
        with pytest.raises(AdapterError, match="no base to switch back to"):
            case.adapter.disabled(case.model)
        return
    with case.adapter.disabled(case.model):
        alone = toys.logits(case.model)
    if case.name in PART_TAKEN_OUT:
        assert close(case, alone, case.base_logits)
    else:
        assert torch.equal(alone, case.base_logits)
    assert torch.equal(toys.logits(case.model), case.logits)


def test_a_state_restores_it_bit_by_bit(case, folder):
    adapter, model = restored(case, folder)
    assert torch.equal(toys.logits(model), case.logits)
    again, once_more = restored(Case(case.name, adapter, model, *[case.logits] * 3), folder)
    assert torch.equal(toys.logits(once_more), case.logits)
    if case.name not in WHOLE_BASE:
        with again.disabled(once_more):
            assert close(case, toys.logits(once_more), case.base_logits)


def continued(name: str, folder: Path, cut: int | None) -> Tensor:
    """The logits after STEPS + 2 steps, of which those from `cut` on are those of another model
    that took over the state of the adapter and of its optimiser."""
    steps = STEPS + 2
    torch.manual_seed(1)
    adapter = make(name)
    model = adapter.attach(base_of(name, folder), Start(steps=steps, data=toys.batches))
    optimizer = toys.optimiser(adapter, model)
    toys.train(adapter, model, range(steps if cut is None else cut), optimizer)
    if cut is None:
        return toys.logits(model)
    file = io.BytesIO()
    torch.save([adapter.state(model), optimizer.state_dict()], file)
    random = torch.get_rng_state()
    file.seek(0)
    state, moments = torch.load(file, weights_only=True)
    torch.manual_seed(2)
    other = make(name)
    model = other.attach(base_of(name, folder), Start(steps=steps, saved=state))
    optimizer = toys.optimiser(other, model)
    other.load_state(model, state)
    optimizer.load_state_dict(moments)
    torch.set_rng_state(random)
    toys.train(other, model, range(cut, steps), optimizer)
    return toys.logits(model)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in PRESETS if name not in NOTHING_TRAINED])
def test_a_resumed_run_takes_the_same_steps(name, folder):
    assert torch.equal(continued(name, folder, 2), continued(name, folder, None))


def test_a_state_of_another_shape_is_refused_and_changes_nothing(case):
    state = copy.deepcopy(case.adapter.state(case.model))
    if not state["tensors"]:
        return
    first = next(iter(state["tensors"]))
    state["tensors"] = {name: tensor + 1 for name, tensor in state["tensors"].items()}
    state["tensors"][first] = torch.cat([state["tensors"][first]] * 2)
    with pytest.raises(AdapterError, match="does not fit this model"):
        case.adapter.load_state(case.model, state)
    assert torch.equal(toys.logits(case.model), case.logits)


# of PEFT's own AdaLoRA files
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys.*lora_E:RuntimeWarning")
def test_stock_peft_loads_what_is_saved(case, folder, tmp_path):
    if not case.adapter.exportable:
        with pytest.raises(AdapterError, match="xport"):
            case.adapter.save(case.model, tmp_path, "base", "CAUSAL_LM")
        return
    case.adapter.save(case.model, tmp_path, "base", "CAUSAL_LM")
    loaded = peft.PeftModel.from_pretrained(base_of(case.name, folder), tmp_path).eval()
    assert close(case, toys.logits(loaded), case.logits)


def test_a_wrong_target_names_the_choices(case, folder):
    takes = "target_modules" in node(case.name)
    if node(case.name)["_target_"] == "adapters.peft.Peft":
        takes = "target_modules" in config_class(node(case.name)["peft_type"]).fields
    if not takes:
        return
    for wrong in (["q_proj", "q_porj"], "nowhere.*"):
        adapter = make(case.name, target_modules=wrong)
        with pytest.raises(AdapterError, match=r"(q_porj|nowhere).*q_proj \(2x\), k_proj \(2x\)"):
            adapter.attach(base_of(case.name, folder), Start(steps=STEPS, data=toys.batches))


def test_a_state_holds_nothing_of_the_base(case):
    if case.name in WHOLE_BASE:
        return
    base = [tensor for name, tensor in tensors(case.model).items() if id(tensor) in case.before]
    stored = case.adapter.state(case.model)
    held = list(stored["tensors"].values()) + list(stored["extra"].get("initial", {}).values())
    addresses = {tensor.data_ptr() for tensor in base}
    assert all(tensor.data_ptr() not in addresses for tensor in held)
    for tensor in held:
        assert not any(
            tensor.shape == other.shape and torch.equal(tensor, other)
            for other in [*base, *case.before.values()]
        )


@pytest.mark.long
def test_loftq_starts_nearer_to_the_unrounded_base(folder):
    exact = toys.logits(toys.llama(torch.float32))
    rounded = base_of("loftq", folder)
    before = (toys.logits(rounded) - exact).abs().mean()
    model = make("loftq", r=32, lora_alpha=32).attach(rounded, Start()).eval()
    assert (toys.logits(model) - exact).abs().mean() < 0.5 * before
