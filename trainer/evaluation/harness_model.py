"""lm-eval's own wrapper of transformers' models, over a model in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

from trainer.data.render import Renderer
from trainer.data.stops import Stops
from trainer.storage.progress import Progress


def make(*arguments: Any) -> Any:
    """Return the model for lm-eval; the arguments are those of `Run`."""
    from lm_eval.models.huggingface import HFLM  # an extra, which not everyone has

    return type("RunLM", (Run, HFLM), {})(*arguments)


class Run:
    """The part of the wrapper that is ours, in front of lm-eval's HFLM. Chats are written by the
    template that the run was trained with, and answers end where those of the run do."""

    def __init__(
        self,
        model: nn.Module,
        renderer: Renderer,
        stops: Stops,
        batch_size: int,
        before_batch: Callable[[], None],
    ):
        # HFLM sets the padding token of its tokenizer
        tokenizer = copy.deepcopy(renderer.tokenizer)
        # It ties the weights again, which would undo a trained output layer of its own.
        wrapper: Any = super()
        with mock.patch.object(model, "tie_weights"):
            wrapper.__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.template, self.stops = renderer.templates.get("default"), stops
        self.before_batch = before_batch
        self.progress: Progress | None = None

    def get_model_info(self) -> dict[str, Any]:
        """Ask no hub for a model that is in memory."""
        return {}

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a chat. Without `add_generation_prompt` it ends with the content of
        its last message, which the model continues."""
        assert self.template is not None
        text, _ = self.template.render(chat_history, None, {}, prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        return text[: text.rindex(last) + len(last)]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Score continuations, with progress in the log."""
        wrapper: Any = super()
        return self._counted(wrapper.loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, with progress in the log."""
        wrapper: Any = super()
        return self._counted(wrapper.loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate answers, up to the texts that end one."""
        wrapper: Any = super()
        answers = self._counted(wrapper.generate_until, requests)
        return [self.stops.without_end(answer) for answer in answers]

    def _counted(self, answer: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
        if self.progress is not None:  # within another kind of request
            return answer(requests, disable_tqdm=True)
        try:
            with Progress("lm-eval", len(requests), "requests") as self.progress:
                return answer(requests, disable_tqdm=True)
        finally:
            self.progress = None

    def _count(self, rows: int) -> None:
        self.before_batch()
        progress = self.progress
        if progress is not None and progress.total is not None:
            progress.advance(min(rows, progress.total - progress.done))

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._count(len(inps))
        wrapper: Any = super()
        return wrapper._model_call(inps, *args, **kwargs)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        self._count(len(context))
        ends = {"eos_token_id": [*self.stops]} if self.stops else {}
        wrapper: Any = super()
        return wrapper._model_generate(
            context, max_length, [*stop, *self.stops.texts], **options | ends
        )
