"""What speculators' own loader makes of a P-EAGLE folder. Run in its own environment: python
peagle_by_speculators.py FOLDER INPUTS OUT ANCHORS TOKENS.

INPUTS holds states (T, f) and ids (T,), the token after each; OUT gets its weights, and logits
(A, K, v) of the drafts after the first A positions, as its training computes them.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.models.peagle import core

folder, inputs, out, *sizes = sys.argv[1:]
anchors, tokens = map(int, sizes)
config = SpeculatorModelConfig.from_pretrained(folder)
# its default needs blocks of 128 tokens
config.transformer_layer_config._attn_implementation = "eager"
model = SpeculatorModel.from_pretrained(folder, config=config).float().eval()
arguments = load_file(inputs)
ids = arguments["ids"][None]
length = ids.shape[1]
# All positions, then each further depth of the first ones.
at = torch.cat([torch.arange(length), *[torch.arange(anchors)] * (tokens - 1)])
depth = torch.cat([torch.zeros(length).long(), torch.arange(1, tokens).repeat_interleave(anchors)])
core.generate_cod_sample_indices = lambda **_: (at, depth)
actual = {}


def measure(logits, **_):
    first = logits[0, :anchors]
    more = logits[0, length:].view(tokens - 1, anchors, -1)
    actual["logits"] = torch.cat([first[None], more]).transpose(0, 1)
    return torch.zeros(()), {}


core.compute_metrics = measure
with torch.no_grad():
    model(
        hidden_states=arguments["states"][None],
        input_ids=ids,
        document_ids=torch.zeros_like(ids),
        verifier_last_hidden_states=torch.zeros(
            1, length, config.transformer_layer_config.hidden_size
        ),
        num_depths=tokens,
    )
for name, tensor in model.state_dict().items():
    if not name.startswith("verifier_"):
        actual[f"weights.{name}"] = tensor
save_file({name: tensor.clone().contiguous() for name, tensor in actual.items()}, out)
