"""Ask a run's model.

    python -m trainer.generate run=FOLDER[@last|best|STEP] prompt="..." [system="..."]
    [compare=true] [max_new_tokens=256]
                               [temperature=0] [top_p=1] [seed=0] [draft=true] [drafter=run]
                               [small=null]

prompt=- reads standard input. The answer streams; compare=true shows the base's answer beside it.
temperature=0 is greedy.

The run's drafter, where it has one, drafts what the model then verifies: the same text in less
time, or sampled, one of the same distribution; draft=false does without. drafter=lookup copies from
the text so far, drafter=recycling proposes what the model nearly said before, and drafter=small
small=PATH asks a smaller model of the same tokens: none of them needs training.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich import get_console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from trainer.assembly import quiet
from trainer.assembly.chosen_drafter import drafter_of, sampling, unknown_drafter
from trainer.assembly.trained import Trained, load_trained
from trainer.data.render import Renderer, stop_ids
from trainer.decoding.plugin import assist, refusal
from trainer.drafters import DrafterError


class _Told(TextStreamer):
    """Hands text on as it comes."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.tell(text)


def answer(
    model: Any,
    ids: list[int],
    tokenizer: Any,
    stops: list[int],
    options: dict[str, Any],
    tell: Callable[[str], None],
) -> None:
    """One answer to one prompt, told piece by piece."""
    torch.manual_seed(options["seed"])
    settings = sampling(options, stops, tokenizer.pad_token_id)
    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=settings,
        streamer=_Told(tokenizer, tell),
    )


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from trainer.config.errors import EXIT_BAD_INPUT, bad
    from trainer.config.options import arguments
    from trainer.session import failures

    known = {
        "run": ...,
        "prompt": ...,
        "system": None,
        "compare": False,
        "max_new_tokens": 256,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
        "draft": True,
        "drafter": "run",
        "small": None,
    }
    options = arguments(argv, known, __doc__ or "")
    for name, fits, said in (
        ("max_new_tokens", options["max_new_tokens"] >= 1, "at least 1"),
        ("temperature", options["temperature"] >= 0, "at least 0"),
        ("top_p", 0 < options["top_p"] <= 1, "above 0, at most 1"),
    ):
        if not fits:
            return bad(f"{name}={options[name]}: {said}")
    if fault := unknown_drafter(options):
        return bad(fault)
    quiet.quiet()
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = load_trained(options["run"], device)
        if found.task.kind == "label":
            print(
                "this run trained a classifier, which writes no text. Use: python -m"
                " trainer.evaluate",
                file=sys.stderr,
            )
            return EXIT_BAD_INPUT
        tokenizer = found.base.tokenizer
        prompt = sys.stdin.read() if options["prompt"] == "-" else str(options["prompt"])
        if found.task.kind == "conversation":
            system = [{"role": "system", "content": options["system"]}] if options["system"] else []
            ids = Renderer(tokenizer, found.task).chat(
                [*system, {"role": "user", "content": prompt}]
            )
        else:
            ids = tokenizer(prompt)["input_ids"]
        if not ids:
            return bad("the prompt is empty, and this model starts from at least one token")
        stops = stop_ids(tokenizer, found.model.generation_config.eos_token_id, [])  # type: ignore[union-attr]
        if not options["compare"]:
            with _drafting(found, options):
                answer(
                    found.model,
                    ids,
                    tokenizer,
                    stops,
                    options,
                    lambda text: print(text, end="", flush=True),
                )
            print()
            return 0
        _side_by_side(found, ids, tokenizer, stops, options)
    except Exception as error:
        return failures.report_and_exit_code(error)
    return 0


def _side_by_side(
    found: Trained, ids: list[int], tokenizer: Any, stops: list[int], options: dict[str, Any]
) -> None:
    texts = {"base": "", "adapted": ""}

    def shown() -> Table:
        table = Table(*texts, expand=True)
        table.add_row(*map(Text, texts.values()))  # an answer may hold [brackets]
        return table

    console = get_console()
    with (
        Live(shown(), console=console) if console.is_terminal else contextlib.nullcontext()
    ) as live:
        for name in texts:

            def tell(text: str, name: str = name) -> None:
                texts[name] += text
                if live is not None:
                    live.update(shown())

            with _base_alone(found) if name == "base" else _drafting(found, options) as model:
                answer(model, ids, tokenizer, stops, options, tell)
    if not console.is_terminal:
        console.print(shown())


@contextlib.contextmanager
def _drafting(found: Trained, options: dict[str, Any]) -> Any:
    """The model, drafting where it can."""
    drafter = drafter_of(found, options) if options["draft"] else None
    fault = refusal(found.model)
    if drafter is not None and fault and options["drafter"] != "run":
        raise DrafterError(fault)
    if drafter is None or fault:
        yield found.model
        return
    with assist(found.model, drafter):
        yield found.model


@contextlib.contextmanager
def _base_alone(found: Trained) -> Any:
    try:
        switched = found.adapter.disabled(found.model)
    except ValueError:  # full fine-tuning has no base to switch back to
        dtype = next(found.model.parameters()).dtype
        yield found.base.load(dtype, None, next(found.model.parameters()).device)
        return
    with switched:
        yield found.model


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
