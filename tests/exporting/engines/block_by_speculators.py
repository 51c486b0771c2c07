"""What speculators' own loader makes of a block drafter's folder. Run in its own environment:
python block_by_speculators.py FOLDER INPUTS OUT ANCHORS.

INPUTS holds states (T, f) and ids (T,); OUT gets its weights, and of the blocks at the anchors
1 .. A logits (A, K, V) and, if it predicts them, acceptances (A, K), as its training computes them.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.models.dspark import core

folder, inputs, out, anchors = sys.argv[1:]
config = SpeculatorModelConfig.from_pretrained(folder)
# its default needs blocks of 128 tokens
config.transformer_layer_config._attn_implementation = "eager"
model = SpeculatorModel.from_pretrained(folder, config=config).float().eval()
actual = {}


def measure(logits, targets, confidence, *_, **__):
    actual["logits"] = logits.view(int(anchors), config.block_size, -1)
    if confidence is not None:
        actual["confidence"] = confidence.view(int(anchors), config.block_size).sigmoid()
    return torch.zeros(()), {}


core.compute_metrics = measure
arguments = load_file(inputs)
ids = arguments["ids"][None]
trained = torch.zeros_like(ids)
trained[:, 1 : 1 + int(anchors)] = 1
with torch.no_grad():
    model(
        hidden_states=arguments["states"][None],
        input_ids=ids,
        loss_mask=trained,
        verifier_last_hidden_states=torch.zeros(
            1, ids.shape[1], config.transformer_layer_config.hidden_size
        ),
        document_ids=torch.zeros_like(ids),
        max_anchors=int(anchors),
    )
for name, tensor in model.state_dict().items():
    if not name.startswith(("verifier_", "embed_tokens", "lm_head")):
        actual[f"weights.{name}"] = tensor
save_file({name: tensor.clone().contiguous() for name, tensor in actual.items()}, out)
