"""`adapter.from` at the level of adapters: folders of stock PEFT are read as PEFT reads them, and
refused by name where they do not fit."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from omegaconf import OmegaConf

from adapters import stock
from adapters.delta import AdapterError, Start
from tests.toys import adapters as toys
from trainer.assembly.build import instantiate
from trainer.config import compose


def settings_of(*words):
    config = compose.compose(["task.path=x.jsonl", *words])
    return OmegaConf.to_container(config, resolve=False)["adapter"]


@pytest.fixture
def folder(tmp_path):
    """A LoRA that stock PEFT trained and saved, and its logits."""
    model = peft.get_peft_model(
        toys.llama(torch.float32),
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "down_proj"],
            modules_to_save=["model.norm"],
            task_type="CAUSAL_LM",
        ),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", toys.logits(model.eval())


OURS = ["adapter=lora", "adapter.rank=4", "adapter.alpha=8"]
PEFTS = ["adapter=peft", "adapter.peft_type=LORA", "adapter.r=4", "adapter.lora_alpha=8"]
SAME = ["adapter.target_modules=[q_proj,down_proj]", "adapter.train_modules=[model.norm]"]


@pytest.mark.long
@pytest.mark.parametrize("words", [OURS, PEFTS], ids=["ours", "PEFT's"])
def test_a_stock_folder_is_the_start(words, folder):
    path, expected = folder
    node = settings_of(*words, *SAME)
    adapter = instantiate(node)
    assert adapter.stock_faults(node, stock.read_config(path)) == []
    model = adapter.attach(toys.llama(torch.float32), Start(steps=3))
    assert not torch.equal(toys.logits(model.eval()), expected)
    adapter.load_stock_folder(model, path)
    torch.testing.assert_close(toys.logits(model.eval()), expected, rtol=1e-5, atol=1e-5)
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["adapter=lora", "adapter.rank=8", "adapter.alpha=8"], "adapter.rank=8 here, r=4 there"),
        (["adapter=lora", "adapter.rank=4"], "adapter.alpha=32 here, lora_alpha=8 there"),
        ([*OURS, "adapter.rslora=true"], "adapter.rslora=true here, use_rslora=false there"),
        ([*PEFTS, "adapter.r=2"], "adapter.r=2 here, r=4 there"),
        ([*PEFTS, "adapter.use_dora=true"], "adapter.use_dora=true here, use_dora=false there"),
        (
            ["adapter=peft", "adapter.peft_type=LOHA", "adapter.r=4"],
            "adapter.peft_type=LOHA here, LORA there",
        ),
        ([*PEFTS, "adapter.init_lora_weights=pissa"], "init_lora_weights=pissa takes its start"),
        (["adapter=spiel"], "SpIEL does not read PEFT's folders: give the folder of a run"),
    ],
)
def test_another_method_or_size_is_refused_by_name(words, says, folder):
    node = settings_of(*words, "adapter.target_modules=[q_proj,down_proj]")
    faults = instantiate(node).stock_faults(node, stock.read_config(folder[0]))
    assert says in "\n".join(faults)


def test_what_ours_does_not_compute_is_refused(folder):
    path, _ = folder
    file = path / stock.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    node = settings_of(*OURS, *SAME)
    assert instantiate(node).stock_faults(node, stock.read_config(path)) == [
        "adapter.use_dora=null here, use_dora=true there"
    ]


@pytest.mark.long
@pytest.mark.parametrize("words", [OURS, PEFTS], ids=["ours", "PEFT's"])
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["adapter.target_modules=[q_proj]", SAME[1]], "down_proj.lora_A.weight is there, and not"),
        (
            ["adapter.target_modules=[q_proj,down_proj,v_proj]", SAME[1]],
            "v_proj.lora_A.weight is not there",
        ),
        ([SAME[0]], "model.norm.weight is there, and not trained here"),
    ],
)
def test_other_modules_are_refused_by_name_and_nothing_is_loaded(words, changed, says, folder):
    adapter = instantiate(settings_of(*words, *changed))
    model = adapter.attach(toys.llama(torch.float32), Start(steps=3))
    before = toys.logits(model.eval())
    with pytest.raises(AdapterError, match=says):
        adapter.load_stock_folder(model, folder[0])
    torch.testing.assert_close(toys.logits(model), before, rtol=0, atol=0)


def test_another_shape_is_refused_by_name(folder):
    adapter = instantiate(settings_of("adapter=lora", "adapter.rank=2", "adapter.alpha=8", *SAME))
    model = adapter.attach(toys.llama(torch.float32), Start())
    with pytest.raises(AdapterError, match=r"lora_A.weight is \[4, \d+\] there and \[2, \d+\]"):
        adapter.load_stock_folder(model, folder[0])


def test_a_folder_without_its_files_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"adapter_config.json cannot be read.*Give a run's"):
        stock.read_config(tmp_path)
    (tmp_path / stock.CONFIG).write_text("[1]")
    with pytest.raises(AdapterError, match="no JSON object"):
        stock.read_config(tmp_path)
