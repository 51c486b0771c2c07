"""Ask a run's model.

    python -m trainer.generate run=FOLDER[@last|best|STEP] prompt="..." [system="..."] [compare=true] [max_new_tokens=256]
                               [temperature=0] [top_p=1] [seed=0] [draft=true] [drafter=run] [small=null]

prompt=- reads standard input. The answer streams; compare=true shows the base's answer beside it. temperature=0 is greedy.

The run's drafter, where it has one, drafts what the model then verifies: the same text in less time, or sampled, one of the same
distribution; draft=false does without. drafter=lookup copies from the text so far, drafter=recycling proposes what the model nearly
said before, and drafter=small small=PATH asks a smaller model of the same tokens: none of them needs training.
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
from transformers import GenerationConfig, TextStreamer

from trainer import assembly
from trainer.decoding.plugin import assist, refusal
from trainer.drafters import Drafter, DrafterError
from trainer.drafters.lookup import PromptLookup
from trainer.drafters.recycling import TokenRecycling
from trainer.drafters.small import small_model
from trainer.tokens import Renderer, stop_ids

DRAFTERS = ("run", "lookup", "recycling", "small")


class _Told(TextStreamer):
    """Hands text on as it comes."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.tell(text)


def sampling(options: dict[str, Any], stops: list[int], pad: int, **more: Any) -> GenerationConfig:
    """transformers' settings for a verb's temperature, top_p and max_new_tokens."""
    sampled = options["temperature"] > 0
    # transformers would draw from the 50 likeliest tokens only.
    chances = {"temperature": options["temperature"], "top_p": options["top_p"], "top_k": 0} if sampled else {}
    return GenerationConfig(
        do_sample=sampled, max_new_tokens=options["max_new_tokens"], eos_token_id=stops, pad_token_id=pad, **chances, **more
    )


def unknown_drafter(options: dict[str, Any]) -> str | None:
    """What is wrong with a verb's options drafter and small."""
    if options["drafter"] not in DRAFTERS:
        return f"drafter={options['drafter']}: one of {', '.join(DRAFTERS)}"
    if (options["drafter"] == "small") != (options["small"] is not None):
        return "drafter=small and small=PATH, the small model's folder or its name on the hub, are given together"
    return None


def check_drafter(config: dict[str, Any], options: dict[str, Any]) -> None:
    """Before a run's model is loaded, whether it has the drafter that is asked for.

    Raises:
        DrafterError: it has none.
    """
    if options["drafter"] == "run" and not config.get("drafter"):
        raise DrafterError(
            f"run={options['run']} has no drafter. Train one beside the adapter, python -m trainer ... drafter=mtp_shared, or give "
            "one that needs no training, drafter=lookup or drafter=recycling"
        )


def drafter_of(found: assembly.Trained, options: dict[str, Any]) -> Drafter | None:
    """What a verb's options drafter and small ask for; None where the run has no drafter that proposes.

    Raises:
        BaseError, DrafterError: the small model cannot be loaded, or has other tokens.
    """
    if options["drafter"] == "run":
        if found.drafter is None or not found.drafter.proposes:
            return None
        # In the target's dtype: autocast would convert fp32 weights anew for every draft.
        return found.drafter.to(found.model.get_input_embeddings().weight.dtype)  # type: ignore[operator, union-attr]
    if options["drafter"] == "lookup":
        return PromptLookup()
    if options["drafter"] == "recycling":
        return TokenRecycling(found.model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    weight = next(found.model.parameters())
    return small_model(options["small"], found.base, weight.dtype, weight.device)


def answer(
    model: Any, ids: list[int], tokenizer: Any, stops: list[int], options: dict[str, Any], tell: Callable[[str], None]
) -> None:
    """One answer to one prompt, told piece by piece."""
    torch.manual_seed(options["seed"])
    settings = sampling(options, stops, tokenizer.pad_token_id)
    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, streamer=_Told(tokenizer, tell)
    )


def main(argv: list[str]) -> int:
    """The verb; see the module's text."""
    from trainer import config, failures

    known = {
        "run": ..., "prompt": ..., "system": None, "compare": False, "max_new_tokens": 256, "temperature": 0.0, "top_p": 1.0, "seed": 0,
        "draft": True, "drafter": "run", "small": None,
    }  # fmt: skip
    options = config.arguments(argv, known, __doc__ or "")
    for name, fits, said in (
        ("max_new_tokens", options["max_new_tokens"] >= 1, "at least 1"),
        ("temperature", options["temperature"] >= 0, "at least 0"),
        ("top_p", 0 < options["top_p"] <= 1, "above 0, at most 1"),
    ):
        if not fits:
            return config.bad(f"{name}={options[name]}: {said}")
    if fault := unknown_drafter(options):
        return config.bad(fault)
    assembly.quiet()
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = assembly.trained(options["run"], device)
        if found.task.kind == "label":
            print("this run trained a classifier, which writes no text. Use: python -m trainer.evaluate", file=sys.stderr)
            return config.EXIT_BAD_INPUT
        tokenizer = found.base.tokenizer
        prompt = sys.stdin.read() if options["prompt"] == "-" else str(options["prompt"])
        if found.task.kind == "conversation":
            system = [{"role": "system", "content": options["system"]}] if options["system"] else []
            ids = Renderer(tokenizer, found.task).chat([*system, {"role": "user", "content": prompt}])
        else:
            ids = tokenizer(prompt)["input_ids"]
        if not ids:
            return config.bad("the prompt is empty, and this model starts from at least one token")
        stops = stop_ids(tokenizer, found.model.generation_config.eos_token_id, [])  # type: ignore[union-attr]
        if not options["compare"]:
            with _drafting(found, options):
                answer(found.model, ids, tokenizer, stops, options, lambda text: print(text, end="", flush=True))
            print()
            return 0
        _side_by_side(found, ids, tokenizer, stops, options)
    except Exception as error:
        return failures.told(error)
    return 0


def _side_by_side(found: assembly.Trained, ids: list[int], tokenizer: Any, stops: list[int], options: dict[str, Any]) -> None:
    texts = {"base": "", "adapted": ""}

    def shown() -> Table:
        table = Table(*texts, expand=True)
        table.add_row(*map(Text, texts.values()))  # an answer may hold [brackets]
        return table

    console = get_console()
    with Live(shown(), console=console) if console.is_terminal else contextlib.nullcontext() as live:
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
def _drafting(found: assembly.Trained, options: dict[str, Any]) -> Any:
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
def _base_alone(found: assembly.Trained) -> Any:
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
