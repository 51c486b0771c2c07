"""transformers' own generate with one of our drafters.

    from trainer.decoding.plugin import assist, drafting

    with assist(model, drafter):
        model.generate(**inputs, max_new_tokens=100)
    model.generate(**inputs, max_new_tokens=100, custom_generate=drafting(drafter))  # the same

`model` is the drafter's target, and the drafter comes from trainer.drafters.io.load or needs no
training. transformers verifies. Greedily its text is the one without a drafter. When sampling, a
drafted token is accepted if the target draws the same token, so the text has the target's
distribution, with all of generate's settings. Stopping criteria and stop strings are checked after
every accepted token. stop_strings needs `assist`: transformers hands no tokenizer to a
custom_generate.

It takes one sequence at a time, no beams, and chains: of a tree the first child of each node is
proposed. trainer.decoding.speculative takes more. Other ways of decoding are refused, and so are
processors of logits that depend on more than the text and its logits (trainer.decoding.criteria).
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

from trainer.decoding import criteria, positions, trees
from trainer.drafters import Draft, Drafter, DrafterError, Target, TargetUpdate
from trainer.models.cache_argument import cache_of, rolls_back
from trainer.models.heads import captured_layers, decoder_of


def refusal(model: Any) -> str | None:
    """Return why no drafter can draft for `model` in transformers' generate, or None."""
    if not rolls_back(model):
        return (
            f"{type(model).__name__} has layers whose state cannot be rolled back by some tokens,"
            " which every refused draft needs"
        )
    if model.config.is_encoder_decoder:
        return (
            f"{type(model).__name__} is an encoder-decoder: a drafter continues the sequence that"
            " the model reads, and its decoder writes another one"
        )
    peft = getattr(model, "active_peft_config", None)
    if peft is not None and peft.is_prompt_learning:
        return (
            "PEFT puts virtual tokens before the text, which generate's assisted decoding does not"
            " support"
        )
    return None


@contextlib.contextmanager
def assist(model: Any, drafter: Drafter, count: int | None = None) -> Iterator[None]:
    """Let `model.generate` use the drafter while the context is open. `count` is as for
    `drafting`."""
    plain, before = model.generate, vars(model).get("generate")

    def generate(*arguments: Any, streamer: Any = None, tokenizer: Any = None, **more: Any) -> Any:
        # transformers passes neither the streamer nor the tokenizer to custom_generate.
        decode = drafting(drafter, count, streamer)
        more = criteria.with_stop_strings(model, tokenizer, more)
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
    """Return a `custom_generate` for transformers' `generate`, with up to `count` tokens at a time,
    by default as many as the drafter can propose. `streamer` receives accepted tokens; transformers
    does not pass on generate's own argument of this name. A call raises DrafterError if drafter and
    settings do not fit."""
    known: list[Target] = []  # building a Target takes passes of the model

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
        cache = cache_of(more)
        if fault := criteria.refusal(generation_config, logits_processor, input_ids):
            raise DrafterError(fault)
        if cache is not None and cache.get_seq_length():
            raise DrafterError(
                "the cache that generate was called with holds tokens already, and a drafter reads"
                " a text from its start: leave it out"
            )
        if not known or known[0].model is not model:
            known[:] = [Target(model)]
        decoder = decoder_of(model)
        held = None if streamer is None else criteria.HeldStreamer(streamer)
        after_each = criteria.AfterEachToken(stopping_criteria, input_ids.shape[1], held)
        with captured_layers(decoder, drafter.layers) as between, _read(decoder) as hidden:
            positions.reset_tables(model)
            candidates = Candidates(
                known[0], drafter, count, generation_config.max_length, hidden, between
            )
            model._get_candidate_generator = lambda **_: candidates
            try:
                out = model._assisted_decoding(
                    input_ids,
                    logits_processor=logits_processor,
                    stopping_criteria=after_each,
                    generation_config=generation_config,
                    streamer=held,
                    **more,
                )
                return criteria.cut(out, input_ids.shape[1], after_each.length)
            finally:
                del model._get_candidate_generator

    return decode


class Candidates(CandidateGenerator):
    """A drafter as transformers' generator of candidates. Each pass of the target fills `hidden`,
    the inputs of its output head, and `between`, the states of the drafter's layers."""

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
        self.read: Tensor | None = None  # what the last pass read, from the newest token on
        self.boundary = positions.boundary(target.config)
        if self.boundary is not None and longest > self.boundary.length:
            positions.warn(target.model, self.boundary)

    @torch.no_grad()
    def get_candidates(  # type: ignore[override]
        self,
        input_ids: Int[Tensor, "1 t"],
        model_outputs: Any = None,
        is_first_iteration: bool = True,
        n_last_matches: int = 0,
        model_kwargs: Any = None,
        **_: Any,
    ) -> tuple[Int[Tensor, "1 t+n"], None]:
        if is_first_iteration:
            self.hidden.clear()
            self.between.clear()
            return input_ids, None
        ids = input_ids[0]
        most = self.most
        if self.boundary is not None:
            cached = cache_of(model_kwargs).get_seq_length()
            limit = self.boundary.draft_limit(len(ids), cached)
            most = most if limit is None else min(most, limit)
            if not most and self.boundary.kind == "dynamic":  # nothing is drafted any more
                self.hidden.clear()
                self.between.clear()
                return input_ids, None
        length = len(ids) - 1 if self.read is None else int(n_last_matches) + 1
        # A pass that crosses longrope's boundary reads the whole text again.
        count = len(self.hidden[0][0]) if self.read is None else len(self.read)
        states = self.hidden[0][0, -count:]
        if self.read is None and len(states) != length:
            raise DrafterError(
                f"the target has read {len(states)} positions and the text has {length}: there are"
                " virtual tokens"
            )
        features = (
            torch.cat([layer[0, -count:][:length] for layer in self.between], dim=-1)
            if self.between
            else states[:length, :0]
        )
        last = ids[-2:-1] if self.read is None else self.read
        update = TargetUpdate(
            states[:length],
            features,
            ids[-length:],
            ids[0] if self.read is None else None,
            (last, model_outputs.logits[0, -len(last) :]),
        )
        self.hidden.clear()
        self.between.clear()
        # The target's own token comes after the drafted ones.
        fits = max(0, min(most, self.longest - len(ids) - 1))
        drawing = trees.Drawing(self.target.config.vocab_size, fits)
        draft = self.drafter.propose(
            self.memory, self.target, update, partial(self.shape, drawing=drawing)
        )
        tokens = first_path(draft)[:fits].to(ids)
        self.read = torch.cat([ids[-1:], tokens])
        return torch.cat([input_ids, tokens.unsqueeze(0)], dim=1), None

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:
        """Do nothing: the next call's states show what was accepted."""


def first_path(draft: Draft) -> Int[Tensor, " n"]:
    """Return the tree's path of first children."""
    path, last = [], -1
    for node, parent in enumerate(draft.parents.tolist()):
        if parent == last:
            path.append(node)
            last = node
    return draft.tokens[path]


@contextlib.contextmanager
def _read(decoder: Any) -> Iterator[list[Tensor]]:
    states: list[Tensor] = []
    # The output head's inputs are not enough: for a prompt, assisted decoding computes the logits
    # of the last token only.
    handle = decoder.register_forward_hook(lambda module, args, out: states.append(out[0]))
    try:
        yield states
    finally:
        handle.remove()
