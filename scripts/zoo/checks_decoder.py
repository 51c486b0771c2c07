"""Checks of models that write text: packing, generation, and draft heads."""

from __future__ import annotations

from typing import Any

import torch

from scripts.zoo.checks import Wrong, load_trained, train
from scripts.zoo.families import Place
from trainer.assembly.trained import Trained

PROMPT = "12+30="
NEW_TOKENS = 24
NO_TOKEN = 1 << 20  # an end token that no text has, so that all texts are of that length
HEADS: dict[str, tuple[str, ...]] = {
    "medusa": ("drafter=medusa", "drafter.offsets=2"),
    "eagle3": (
        "drafter=eagle3",
        "drafter.offsets=2",
        "drafter.draft_vocab_size=null",
        "drafter.aux_layers=[0,1,2]",
    ),
}


def packing(place: Place) -> str:
    """Train on packed rows. The program itself compares them with rows alone, and refuses models
    whose rows see each other."""
    packed = train(place, "name=packed", "adapter=lora", "adapter.rank=4", "packing=true")
    return _same_losses(place, packed)


@torch.no_grad()
def _same_losses(place: Place, packed: Any) -> str:
    """Compare the loss of two rows in one sequence with that of each alone."""
    run = load_trained(str(packed), fp32=True)
    rows = [torch.arange(3 + 7 * i, 20 + 7 * i) for i in range(3)]
    model: Any = run.model
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    together = model(
        input_ids=torch.cat(rows)[None], position_ids=positions[None], use_cache=False
    ).logits[0]
    alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    far = float((together - alone).abs().max() / alone.std())
    if far > 1e-3:
        raise Wrong(f"a packed row's logits differ by {far:.2g} of their spread")
    return "equal"


@torch.no_grad()
def generate(place: Place) -> str:
    """Decode greedily by the program and by transformers."""
    from trainer.decoding import speculative
    from trainer.drafters import Target

    run = load_trained(str(place.folder / "runs" / "lora"), fp32=True)
    ids = _prompt(run)
    target = Target(run.model, drafted=False)
    own = speculative.generate(target, None, ids, NEW_TOKENS, [NO_TOKEN]).tokens
    if own != (expected := _stock_text(run, ids)):
        raise Wrong(f"own {own[:8]}, transformers {expected[:8]}")
    return f"{len(own)} tokens alike"


def head(name: str) -> Any:
    """The check that trains a draft head and decodes with it: the text is that without it."""

    def check(place: Place) -> str:
        from trainer.decoding import speculative
        from trainer.drafters import Target

        folder = train(place, f"name={name}", "adapter=none", *HEADS[name])
        run = load_trained(str(folder), fp32=True)
        ids, target = _prompt(run), Target(run.model)
        drafted = speculative.generate(target, run.drafter, ids, NEW_TOKENS, [NO_TOKEN])
        if drafted.tokens != (expected := _stock_text(run, ids)):
            raise Wrong(f"drafted {drafted.tokens[:8]}, transformers {expected[:8]}")
        return f"lossless in {drafted.steps} passes"

    return check


def _prompt(run: Trained) -> torch.Tensor:
    text = run.base.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
    )
    return torch.tensor(run.base.tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def _stock_text(run: Trained, ids: torch.Tensor) -> list[int]:
    """The new tokens of transformers' own greedy loop."""
    model: Any = run.model
    out = model.generate(
        input_ids=ids[None],
        attention_mask=torch.ones_like(ids)[None],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=NO_TOKEN,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()
