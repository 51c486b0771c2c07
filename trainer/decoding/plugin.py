"""transformers' own generate with one of our drafters.

    from trainer.decoding.plugin import assist, drafting

    with assist(model, drafter):
        model.generate(**inputs, max_new_tokens=100)
    model.generate(**inputs, max_new_tokens=100, custom_generate=drafting(drafter))  # the same

`model` is the drafter's target, and the drafter trainer.drafters.io.load's or one that needs no
training. transformers verifies: greedily its text is the one without a drafter; sampling, a drafted
token is taken where the one that the target draws is the same, so that the text is the target's in
distribution, under all of generate's settings. It takes one sequence at a time, no beams, and
chains: of a tree the first child of each node is proposed. trainer.decoding.speculative takes more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from trainer.decoding import trees
from trainer.drafters import Draft, Drafter, DrafterError, News, Target
from trainer.models.heads import captured_layers


def refusal(model: Any) -> str | None:
    """Why no drafter can draft for `model` in transformers' generate, whatever it is."""
    if getattr(model, "_is_stateful", False):
        return (
            f"{type(model).__name__} has layers whose state cannot be taken back by some tokens,"
            " which every refused draft asks for"
        )
    peft = getattr(model, "active_peft_config", None)
    if peft is not None and peft.is_prompt_learning:
        return (
            "PEFT's virtual tokens stand before the text, of which generate's assisted decoding"
            " does not know"
        )
    return None


@contextlib.contextmanager
def assist(model: Any, drafter: Drafter, count: int | None = None) -> Iterator[None]:
    """While open, `model.generate` drafts. `count` is as for `drafting`."""
    plain, before = model.generate, vars(model).get("generate")

    def generate(*arguments: Any, streamer: Any = None, **more: Any) -> Any:
        # transformers gives the prompt to the streamer, and does not hand it on to what
        # custom_generate names.
        decode = drafting(drafter, count, streamer)
        return plain(*arguments, streamer=streamer, custom_generate=decode, **more)

    model.generate = generate
    try:
        yield
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before


def drafting(
    drafter: Drafter, count: int | None = None, streamer: Any = None
) -> Callable[..., Any]:
    """What transformers' `generate` takes as `custom_generate`, with up to `count` tokens at a
    time, by default as many as the drafter can. `streamer` is fed what is accepted; generate's own
    argument of this name is not handed on by transformers. The call raises DrafterError where the
    drafter and what is asked for do not go together."""
    known: list[Target] = []  # finding out how a model makes its logits takes passes of it

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **more: Any,
    ) -> Any:
        if fault := refusal(model):
            raise DrafterError(fault)
        cache = more.get("past_key_values")
        if generation_config.num_beams > 1:
            raise DrafterError(
                f"num_beams={generation_config.num_beams}: a drafter drafts one text at a time,"
                " num_beams=1"
            )
        if cache is not None and cache.get_seq_length():
            raise DrafterError(
                "past_key_values holds tokens already, and a drafter reads a text from its start:"
                " leave it out"
            )
        if not known or known[0].model is not model:
            known[:] = [Target(model)]
        decoder = model.get_decoder()
        with captured_layers(decoder, drafter.layers) as between, _read(decoder) as hidden:
            candidates = Candidates(
                known[0], drafter, count, generation_config.max_length, hidden, between
            )
            model._get_candidate_generator = lambda **_: candidates
            try:
                return model._assisted_decoding(
                    input_ids,
                    logits_processor=logits_processor,
                    stopping_criteria=stopping_criteria,
                    generation_config=generation_config,
                    streamer=streamer,
                    **more,
                )
            finally:
                del model._get_candidate_generator

    return decode


class Candidates(CandidateGenerator):
    """A drafter as transformers' assisted decoding asks for candidates. `hidden` and `between` are
    filled by each pass of the target, with what its output head reads and with the states of the
    drafter's layers."""

    requires_model_outputs = True
    model_kwargs_overrides: dict[str, Any] = {}

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        count: int | None,
        longest: int,
        hidden: list[Tensor],
        between: list[Tensor],
    ):
        self.target, self.drafter, self.longest = target, drafter, longest
        self.most = drafter.depth if count is None else min(count, drafter.depth)
        self.hidden, self.between = hidden, between
        self.memory, self.shape = drafter.start(target), trees.chain(self.most)
        self.read: Tensor | None = None  # what the last pass read, from its newest known token on

    @torch.no_grad()
    def get_candidates(  # type: ignore[override]
        self,
        input_ids: Int[Tensor, "1 t"],
        model_outputs: Any = None,
        is_first_iteration: bool = True,
        n_last_matches: int = 0,
        **_: Any,
    ) -> tuple[Int[Tensor, "1 t+n"], None]:
        if is_first_iteration:
            self.hidden.clear()
            self.between.clear()
            return input_ids, None
        ids = input_ids[0]
        length = len(ids) - 1 if self.read is None else int(n_last_matches) + 1
        states = self.hidden[0][0]
        if self.read is None and len(states) != length:
            raise DrafterError(
                f"the target has read {len(states)} positions and the text has {length}: there are"
                " virtual tokens"
            )
        features = (
            torch.cat([layer[0, :length] for layer in self.between], dim=-1)
            if self.between
            else states[:length, :0]
        )
        last = ids[-2:-1] if self.read is None else self.read
        news = News(
            states[:length],
            features,
            ids[-length:],
            ids[0] if self.read is None else None,
            (last, model_outputs.logits[0, -len(last) :]),
        )
        self.hidden.clear()
        self.between.clear()
        # the target's own token comes on top
        fits = max(0, min(self.most, self.longest - len(ids) - 1))
        drawing = trees.Drawing(self.target.config.vocab_size, fits)
        draft = self.drafter.propose(
            self.memory, self.target, news, partial(self.shape, drawing=drawing)
        )
        tokens = first_path(draft)[:fits].to(ids)
        self.read = torch.cat([ids[-1:], tokens])
        return torch.cat([input_ids, tokens.unsqueeze(0)], dim=1), None

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:
        """Nothing: a drafter learns of what was taken by the next call's states."""


def first_path(draft: Draft) -> Int[Tensor, " n"]:
    """A tree's tokens from the newest one down, the first child of each."""
    path, node = [], -1
    for place, parent in enumerate(draft.parents.tolist()):
        if parent == node:
            path.append(place)
            node = place
    return draft.tokens[path]


@contextlib.contextmanager
def _read(decoder: Any) -> Iterator[list[Tensor]]:
    kept: list[Tensor] = []
    # Assisted decoding asks for the logits of a prompt's last token only, and so does the output
    # head read no more.
    handle = decoder.register_forward_hook(lambda module, args, out: kept.append(out[0]))
    try:
        yield kept
    finally:
        handle.remove()
