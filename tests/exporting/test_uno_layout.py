"""Uno's LoRA in stock PEFT computes what the drafter does at its drawn tokens."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.exporting.test_engines import D, drafter_of, model_of
from trainer.drafters import DrafterError, Target, TargetUpdate
from trainer.exporting import uno_layout
from trainer.exporting.compare import Mismatch

SMALL = {"offsets": 4, "rank": 3, "alpha": 6.0}


@torch.no_grad()
def test_stock_peft_gives_the_drafts_with_the_lora_off_at_the_text(tmp_path):
    drafter = drafter_of("uno", model_of(), **SMALL)
    assert uno_layout.write(drafter, model_of(), tmp_path, torch.float32, "org/target") < 1e-5
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6.0)
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "org/target")
    assert set(config["target_modules"]) >= {"q_proj", "o_proj", "down_proj"}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert load_file(tmp_path / "adapter_model.safetensors")[name].shape == (3, D)

    target, text = Target(model_of()), [5, 9, 13, 7]
    nothing = torch.zeros(0, 0)
    update = TargetUpdate(nothing, nothing, torch.tensor(text[1:]), torch.tensor(text[0]))
    growth = drafter.grow(drafter.start(target), target, update)
    drafted = [growth.first()]
    for k in range(3):
        drafted.append(growth.extend(torch.tensor([k]), torch.tensor([k - 1]))[0])
    vocabulary = target.config.vocab_size
    z = torch.randint(vocabulary, (3,), generator=torch.Generator().manual_seed(0))
    model = peft.PeftModel.from_pretrained(model_of(), tmp_path).eval()

    def off_at_the_text(module, args, out):  # an engine's segments: the LoRA on the last 3 rows
        plain = module.base_layer(args[0])
        return torch.cat([plain[:, :-3], out[:, -3:]], 1)

    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.register_forward_hook(off_at_the_text)
    logits = model(input_ids=torch.tensor([[*text, *z.tolist()]])).logits[0, -4:]
    torch.testing.assert_close(torch.stack(drafted), logits, rtol=1e-4, atol=1e-4)


def test_a_lora_that_peft_scales_otherwise_is_noticed(tmp_path):
    drafter = drafter_of("uno", model_of(), **SMALL)
    drafter.alpha = 60.0
    with pytest.raises(Mismatch, match="stock PEFT gives other logits"):
        uno_layout.write(drafter, model_of(), tmp_path, torch.float32, "org/target")


@pytest.mark.parametrize("to", ["speculators", "medusa", "mtp"])
def test_formats_of_heads_are_refused(to):
    model = model_of()
    drafter = drafter_of("uno", model, **SMALL)
    uno_layout.check(drafter, "sglang", model)
    with pytest.raises(DrafterError, match=f"to={to} is for draft heads .* to=sglang"):
        uno_layout.check(drafter, to, model)
