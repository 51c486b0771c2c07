"""LitGPT's LoRA model in a loop of our own that does what its finetune/lora.py does, with
`--convert` its checkpoint from ours.

Not `litgpt finetune_lora` itself: that has no gradient clipping, no constant rate, and no way to
start from given adapter values. What is its own: the conversion, Fabric's precision and set-up,
litgpt.lora.GPT with the head in chunks of 128 positions, and chunked_cross_entropy. With bf16-true
Fabric makes everything bf16, the adapters too, whatever adapter_dtype says.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import litgpt.config
import measuring
import torch

NAME = "graft-bench"


def config_of(folder: Path) -> dict[str, Any]:
    """Return LitGPT's fields for a Llama of transformers.

    Raises:
        SystemExit: another architecture.
    """
    hf = json.loads((folder / "config.json").read_text("utf-8"))
    if hf["model_type"] != "llama" or hf["rope_parameters"]["rope_type"] != "default":
        raise SystemExit(
            "only Llamas without scaled rotary embeddings are converted here, not"
            f" model_type={hf['model_type']!r}"
        )
    return {
        "name": NAME,
        "hf_config": {"org": "", "name": NAME},
        "block_size": hf["max_position_embeddings"],
        "vocab_size": hf["vocab_size"],
        "padded_vocab_size": hf["vocab_size"],
        "n_layer": hf["num_hidden_layers"],
        "n_head": hf["num_attention_heads"],
        "n_embd": hf["hidden_size"],
        "n_query_groups": hf["num_key_value_heads"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
        "intermediate_size": hf["intermediate_size"],
        "rope_base": int(hf["rope_parameters"]["rope_theta"]),
        "norm_eps": hf["rms_norm_eps"],
    }


def convert(spec: dict[str, Any], out: Path) -> None:
    """Write OUT/lit_model.pth with LitGPT's converter."""
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    source = Path(spec["model"])
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not (out / file.name).exists():
            os.symlink(file.resolve(), out / file.name)
    litgpt.config.name_to_config[NAME] = config_of(source)
    convert_hf_checkpoint(out, model_name=NAME, dtype=spec["dtype"])


def begin(spec: dict[str, Any], model: Any) -> None:
    """Give the adapters the values of the start; LitGPT has those of q, k and v one above the
    other."""
    from safetensors.torch import load_file

    start = load_file(spec["start"])
    with torch.no_grad():
        for number, block in enumerate(model.transformer.h):
            place = f"base_model.model.model.layers.{number}"
            parts = {
                block.attn.qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                block.attn.proj: ["self_attn.o_proj"],
                block.mlp.fc_1: ["mlp.gate_proj"],
                block.mlp.fc_2: ["mlp.up_proj"],
                block.mlp.proj: ["mlp.down_proj"],
            }
            for layer, names in parts.items():
                layer.lora_A.copy_(
                    torch.cat([start[f"{place}.{name}.lora_A.weight"] for name in names])
                )
                layer.lora_B.copy_(
                    torch.cat([start[f"{place}.{name}.lora_B.weight"] for name in names])
                )


def main() -> None:
    spec = measuring.read()
    folder = Path(spec["litgpt"])
    if "--convert" in sys.argv:
        convert(spec, folder)
        return
    import lightning
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy, load_checkpoint

    precision: Any = (
        "bf16-mixed"
        if spec["autocast"]
        else "bf16-true"
        if spec["dtype"] == "bfloat16"
        else "32-true"
    )
    fabric = lightning.Fabric(accelerator=spec["device"], devices=1, precision=precision)
    fabric.seed_everything(spec["seed"], verbose=False)
    config = Config.from_file(
        folder / "model_config.yaml",
        lora_r=spec["rank"],
        lora_alpha=spec["alpha"],
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
        lora_head=False,
    )
    with fabric.init_module():
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = fabric.setup_optimizers(
        torch.optim.AdamW(trained, lr=spec["lr"], weight_decay=0.0, fused=True)
    )
    load_checkpoint(fabric, model, folder / "lit_model.pth", strict=False)
    begin(spec, model)
    model.max_seq_length = max(
        -(-len(row["input_ids"]) // 8) * 8 for batch in measuring.rows(spec) for row in batch
    )
    model.train()
    clock = measuring.Clock(spec)
    for batch in measuring.batches(spec):
        logits = model(batch["input_ids"], lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, batch["labels"][..., 1:])
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(loss.item())
    clock.write(precision=precision)


if __name__ == "__main__":
    main()
