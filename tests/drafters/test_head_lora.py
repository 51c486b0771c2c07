"""A LoRA on every draft head against the head with W + s B A written into its weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from adapters.linear import float_weight
from tests.conftest import ROOT, sums, write_rows
from tests.test_configs import NEEDED
from tests.toys.heads import batch_of
from tests.toys.mtp_bases import tiny_of
from tests.toys.packed_rows import APART
from tests.toys.speculative import made, tiny
from trainer.assembly.trained import load_trained
from trainer.config import compose
from trainer.config.errors import ConfigError
from trainer.drafters import DrafterError, Target, head_lora
from trainer.drafters.native import NativeModule
from trainer.storage import checkpoints
from trainer.training.distill import DraftLoss
from trainer.training.finetune import FineTune

HEADS = sorted(
    {path.stem for path in (ROOT / "conf" / "drafter").glob("*.yaml")}
    - {"none", "registers", "native", "ppd", "uno"}
)
R, ALPHA = 3, 5.0


def head_of(name, model):
    """The drafter of conf/drafter/NAME.yaml with the same weights every time."""
    torch.manual_seed(1)
    return made(name, model)


def lora_on(drafter, model, modules="all-linear"):
    torch.manual_seed(3)
    head_lora.attach(drafter, model, R, ALPHA, modules)
    return drafter


def moved(drafter):
    """With a B that is not zero."""
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, tensor in drafter.state().items():
            if name.endswith(".B"):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=draw))
    return drafter


def loss_of(drafter, model):
    total, sums_ = DraftLoss(model, 7, drafter, Target(model))(batch_of(*APART))
    return total, sums_["offsets"]


def by_hand(drafter, state):
    """W + alpha / r B A in the head's own weights, one layer after the other."""
    with torch.no_grad():
        for name in {key.rpartition(".")[0] for key in state}:
            weight = dict(drafter.named_modules())[name].weight
            weight += ALPHA / R * (state[f"{name}.B"] @ state[f"{name}.A"])
    return drafter


@pytest.mark.parametrize("name", HEADS)
def test_every_head_computes_what_its_merged_weights_do(name):
    model = tiny()
    plain = head_of(name, model)
    whole = {key: tensor.clone() for key, tensor in plain.state().items()}
    drafter = lora_on(head_of(name, model), model)
    frozen = {key: p.clone() for key, p in drafter.named_parameters() if not p.requires_grad}
    # At the start it is the earlier head; then the one of the sums.
    torch.testing.assert_close(loss_of(drafter, model), loss_of(plain, model))
    moved(drafter)
    state = {key: tensor.clone() for key, tensor in drafter.state().items()}
    total, numbers = loss_of(drafter, model)
    expected, counts = loss_of(by_hand(plain, state), model)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(numbers, counts, rtol=1e-4, atol=1e-4)

    total.backward()
    groups = drafter.parameter_groups()
    learnt = {key for key, p in drafter.named_parameters() if p.grad is not None}
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for key, p in drafter.named_parameters() if key in learnt
    }
    assert {key.rpartition(".")[2] for key in learnt} == {"A", "B"}
    torch.optim.SGD(groups, lr=1.0).step()
    after = dict(drafter.named_parameters())
    assert all(torch.equal(after[key], tensor) for key, tensor in frozen.items())
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in (drafter.state(), whole)]
    assert sizes[0] < sizes[1]
    wide = [key for key in state if key.endswith(".B") and len(state[key]) == 64 + 32]
    assert not wide

    drafter.load_state(state)
    head_lora.merge(drafter)
    assert type(drafter) is type(plain)
    merged = drafter.state()
    assert merged.keys() == whole.keys()
    for key, tensor in plain.state().items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-5, atol=1e-6)
    changed = {key for key in whole if not torch.equal(merged[key], whole[key])}
    assert len(changed) == len(state) // 2
    torch.testing.assert_close(loss_of(drafter, model), (expected, counts), rtol=1e-4, atol=1e-4)
    head_lora.merge(drafter)  # without a LoRA it changes nothing
    assert all(torch.equal(drafter.state()[key], merged[key]) for key in merged)


def test_gpt2s_layers_are_transposed_and_a_read_weight_has_the_update():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 4)
    holder = made("kangaroo", tiny())
    holder.extra = layer
    lora_on(holder, tiny(), ["extra"])
    moved(holder)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    y = holder.extra(x)
    torch.testing.assert_close(x @ holder.extra.weight + holder.extra.bias, y)
    before = float_weight(layer).clone()
    head_lora.merge(holder)
    assert holder.extra is layer
    torch.testing.assert_close(layer(x), y)
    assert not torch.equal(float_weight(layer), before)


def test_a_head_of_the_base_falls_back_to_the_stock_one():
    model = tiny_of("qwen3_5_text")
    drafter = made("mtp_shared", model)
    before = {key: tensor.clone() for key, tensor in drafter.state().items()}
    moved(lora_on(drafter, model)).restore()
    head_lora.merge(drafter)
    assert all(torch.equal(drafter.state()[key], tensor) for key, tensor in before.items())
    assert NativeModule.guarded


def test_heads_without_linear_layers_are_refused():
    model = tiny()
    drafter = made("uno", model)
    with pytest.raises(DrafterError, match=r"Uno has none but those that give logits"):
        lora_on(drafter, model)
    assert any(p.requires_grad for p in drafter.parameters())
    with pytest.raises(DrafterError, match=r"drafter_adapter\.target_modules has 'q_prj'.*q_proj"):
        lora_on(made("eagle3", model), model, ["q_prj"])


REFUSED = {
    "no head": (["drafter=none"], "drafter=none is none"),
    "nothing to start from": (["drafter=eagle3"], "set target.draft=FOLDER"),
    "a LoRA already": (["drafter=uno", "target.draft=x"], "this drafter has none"),
    "no rank": (["drafter=eagle3", "target.draft=x", "drafter.adapter.r=0"], "rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_say_what_is_missing(case):
    words, message = REFUSED[case]
    common = ["adapter=none", "base=tiny", "task.path=x", "drafter.adapter=lora"]
    with pytest.raises(ConfigError, match=message):
        compose.compose([*common, *words])


def test_the_names_of_the_drafters_node_are_an_alias():
    words = ["adapter=none", "base=tiny", "task.path=x", *NEEDED["drafter_adapter/lora"]]
    for asked in (
        ["drafter_adapter=lora", "drafter_adapter.rank=5"],
        ["drafter.adapter=lora", "drafter.adapter.r=5"],
        ["drafter/adapter=lora", "drafter.adapter.rank=5"],
    ):
        assert compose.compose([*words, *asked]).drafter_adapter.rank == 5


HEAD = (
    "adapter=none",
    "objective=distill",
    "drafter=eagle3",
    "drafter.offsets=2",
    "drafter.aux_layers=[0,1,2]",
    "drafter.coverage=0",
    "drafter.draft_vocab_size=64",
    "drafter.init=last_layer",
    "batch_size=4",
    "callbacks.evaluation=null",
    "report=false",
)


def test_a_run_trains_the_lora_resumes_to_the_bit_and_writes_the_merged_head(
    train, tmp_path, monkeypatch
):
    rows = f"task.path={write_rows(tmp_path / 'rows.jsonl', sums(40))}"
    head = train(rows, *HEAD, "max_steps=1", "name=head")
    settings = (
        rows,
        *HEAD,
        f"target.draft={head}",
        "drafter.adapter=lora",
        "drafter.adapter.r=2",
        "optimizer.lr=1e-2",
        "max_steps=4",
        "callbacks.checkpoints.every=2",
    )
    whole = train(*settings, "name=whole")
    with monkeypatch.context() as patch:
        step = FineTune.on_train_batch_start

        def cut(self, batch, batch_idx):
            if self.step == 3:
                raise KeyError("power")
            step(self, batch, batch_idx)

        patch.setattr(FineTune, "on_train_batch_start", cut)
        with pytest.raises(KeyError):
            train(*settings, "name=cut")
    resumed = train(*settings, "name=cut", "resume=auto")
    one, other = (
        checkpoints.load(checkpoints.chosen(run / "checkpoints", "last"))["drafter"]
        for run in (whole, resumed)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert {key.rpartition(".")[2] for key in one} == {"A", "B"}
    assert any(bool(tensor.any()) for key, tensor in one.items() if key.endswith(".B"))

    earlier = load_file(head / "drafter" / "model.safetensors")
    kept = load_file(whole / "start_head" / "model.safetensors")
    assert all(torch.equal(kept[key], earlier[key]) for key in earlier)
    trained = sum(tensor.nbytes for tensor in one.values())
    assert trained < sum(tensor.nbytes for tensor in earlier.values()) / 4
    # The earlier head may be gone: the run has its own copy.
    shutil.rmtree(head)
    written = load_file(whole / "drafter" / "model.safetensors")
    assert written.keys() == earlier.keys()
    loaded = load_trained(str(whole)).drafter
    assert loaded is not None
    state = loaded.state()
    for key, tensor in written.items():
        assert torch.equal(state[key], tensor), key
    for name in {key.rpartition(".")[0] for key in one}:
        ours = name.replace("midlayer.", "layers.0.", 1)
        expected = earlier[f"{ours}.weight"] + 32.0 / 2 * (one[f"{name}.B"] @ one[f"{name}.A"])
        torch.testing.assert_close(written[f"{ours}.weight"], expected)
    assert torch.equal(written["lm_head.weight"], earlier["lm_head.weight"])
    text = (whole / "drafter" / "README.md").read_text()
    assert "by a LoRA on an earlier head, which is merged into it here" in text
    assert "lora, rank=2" in text
    assert json.loads((whole / "drafter" / "config.json").read_text())["drafter"]["offsets"] == 2
