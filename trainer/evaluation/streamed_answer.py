"""One answer of a run's model, streamed as it is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich import get_console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from tasks.reading import DataError
from trainer.assembly.chosen_drafter import drafter_of, generation_config
from trainer.assembly.trained import Trained
from trainer.config.decoding_options import DrafterOptions, SamplingOptions
from trainer.config.shown import shown
from trainer.data.encoding import continued_ids
from trainer.data.stops import Stops
from trainer.decoding import positions
from trainer.decoding.merged import merged
from trainer.decoding.plugin import assist, refusal
from trainer.drafters import DrafterError


class _Streamer(TextStreamer):
    """Pass text on as it is decoded. The beginning of a text in `ends` is held back until it is
    clear that the answer does not end there."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], ends: Sequence[str]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.ends, self.held = write, ends, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text, self.held = self.held + text, ""
        if any(end in text for end in self.ends):
            text = text[: min(text.find(end) for end in self.ends if end in text)]
        elif not stream_end:
            heads = [end[:length] for end in self.ends for length in range(1, len(end))]
            self.held = max((head for head in heads if text.endswith(head)), key=len, default="")
            text = text.removesuffix(self.held)
        self.write(text)


def prompt_ids(run: Trained, prompt: str, system: str | None) -> tuple[list[int], Stops]:
    """(the prompt's token ids, the stop tokens).

    Raises:
        DataError: the run writes no text, it has no place for a system prompt, or the prompt is
            empty.
        Refused: the chat template refuses the prompt.
    """
    if run.task.kind == "label":
        raise DataError("this run trained a classifier, which writes no text. Use: graft evaluate")
    tokenizer = run.base.tokenizer
    if run.task.kind == "conversation":
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        ids = run.renderer.chat(messages)
    else:
        if system:
            raise DataError("system=... has no effect: this run was trained on plain text")
        ids = continued_ids(tokenizer, prompt)
    if not ids:
        raise DataError("the prompt is empty, and this model starts from at least one token")
    return ids, run.stops


def answer(
    model: Any,
    ids: list[int],
    tokenizer: Any,
    stops: list[int],
    options: SamplingOptions,
    max_new_tokens: int,
    write: Callable[[str], None],
) -> None:
    """Answer one prompt, and call `write` with each piece of text."""
    torch.manual_seed(options.seed)
    count = positions.new_tokens(model, len(ids), max_new_tokens)
    settings = generation_config(
        options.temperature, options.top_p, count, stops, tokenizer.pad_token_id
    )
    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=settings,
        streamer=_Streamer(tokenizer, write, Stops.of(stops).texts),
        **Stops.of(stops).arguments(),
    )


def compare(
    run: Trained,
    ids: list[int],
    stops: list[int],
    options: SamplingOptions,
    max_new_tokens: int,
    drafter: DrafterOptions | None,
) -> None:
    """Show the base's answer and the adapted model's in two columns. The adapted model decodes with
    the requested drafter; None is without one."""
    texts = {"base": "", "adapted": ""}

    def table() -> Table:
        table = Table(*texts, expand=True)
        table.add_row(*map(Text, texts.values()))  # an answer may hold [brackets]
        return table

    console = get_console()
    with (
        Live(table(), console=console) if console.is_terminal else contextlib.nullcontext()
    ) as live:
        for name in texts:

            def write(text: str, name: str = name) -> None:
                texts[name] += shown(text)  # Live prints it by itself
                if live is not None:
                    live.update(table())

            with _base(run) if name == "base" else drafting(run, drafter) as model:
                answer(model, ids, run.base.tokenizer, stops, options, max_new_tokens, write)
    if not console.is_terminal:
        console.print(table())


@contextlib.contextmanager
def drafting(run: Trained, options: DrafterOptions | None) -> Iterator[Any]:
    """Yield the model, with the requested drafter if there is one that can draft.

    Raises:
        DrafterError: another drafter than the run's is requested, and this model takes none.
    """
    drafter = drafter_of(run, options) if options is not None else None
    fault = refusal(run.model)
    if options is not None and drafter is not None and fault and options.drafter != "run":
        raise DrafterError(fault)
    if drafter is None or fault:
        with merged(run.model):
            yield run.model
        return
    with merged(run.model), assist(run.model, drafter):
        yield run.model


@contextlib.contextmanager
def _base(run: Trained) -> Iterator[Any]:
    try:
        switched = run.adapter.disabled(run.model)
    except ValueError:  # full fine-tuning has no base to switch back to
        dtype = next(run.model.parameters()).dtype
        yield run.base.load(dtype, None, next(run.model.parameters()).device)
        return
    with switched:
        yield run.model
