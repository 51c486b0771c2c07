"""The files that a server needs next to weights: the tokenizer with the chat template of training,
and the tokens that end an answer.

tokenizer*.json      the base's tokenizer. Its eos_token is the trained end token where the base's
                     own ends no trained answer, unless the template writes eos_token
chat_template.jinja  the template that rendered the rows
generation_config.json  the base's settings, with all end tokens in eos_token_id
config.json          of a merged model: the same end tokens
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from trainer.assembly.recipe import Recipe
from trainer.assembly.trained import Trained
from trainer.data.chat_template import Refused, with_defaults
from trainer.data.ends import stop_ids
from trainer.data.render import Renderer
from trainer.exporting.compare import Mismatch
from trainer.models.base import Base

log = logging.getLogger("trainer")

_PROBE = [{"role": "user", "content": "1"}]


@dataclass(frozen=True)
class Serving:
    """The prompt format of a run's model, and the tokens that end its answers."""

    base: Base
    renderer: Renderer
    ends: list[int]  # the tokens that trained answers end in, the most frequent one first

    @classmethod
    def of(cls, run: Trained | Recipe) -> Serving:
        """Return that of a run, live or loaded."""
        if isinstance(run, Recipe):
            return cls(run.base, run.data.renderer, run.ends)
        return cls(run.base, run.renderer, run.ends)

    def write(self, folder: Path, model: Any) -> None:
        """Write the tokenizer into `folder`, load it back and compare a prompt. For a model that
        writes text, write the generation settings of `model` too.

        Raises:
            Mismatch: the loaded tokenizer renders another prompt than the run.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._write_tokenizer(folder)
        if self.renderer.kind != "label":
            config = self.generation_config(model)
            try:
                config.save_pretrained(folder)
            except ValueError as error:  # the base's own settings contradict each other
                log.warning("the base's generation settings are left out: %s", error)
                GenerationConfig(
                    bos_token_id=config.bos_token_id,
                    eos_token_id=config.eos_token_id,
                    pad_token_id=config.pad_token_id,
                ).save_pretrained(folder)

    def generation_config(self, model: Any) -> GenerationConfig:
        """Return the model's generation settings with all end tokens, the trained ones first."""
        own = getattr(model, "generation_config", None)
        config = copy.deepcopy(own) if own is not None else GenerationConfig()
        rest = stop_ids(self.base.tokenizer, model, self.ends)
        config.eos_token_id = list(dict.fromkeys([*self.ends, *rest]))
        return config

    def set_ends(self, model: Any) -> None:
        """Put the end tokens into a model's config, where transformers reads them if there are no
        generation settings, and other programs always."""
        ends, config = self.generation_config(model).eos_token_id, model.config
        for part in {id(one): one for one in (config, config.get_text_config())}.values():
            part.eos_token_id = ends[0] if len(ends) == 1 else ends

    def chat_template(self, tokenizer: Any) -> str | dict[str, str]:
        """Return the template that renders a conversation as the run does, or several by name."""
        if self.renderer.template is None:
            return _joined(tokenizer)
        return with_defaults(self.renderer.template, self.renderer.variables)

    def _write_tokenizer(self, folder: Path) -> None:
        tokenizer, renderer = self.base.load_tokenizer(), self.renderer
        if renderer.kind == "conversation":
            expected = self._prompt()
            tokenizer.chat_template = self.chat_template(tokenizer)
            writes_eos = "eos_token" in str(tokenizer.chat_template)
            if self.ends and tokenizer.eos_token_id not in self.ends and not writes_eos:
                tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.ends[0])
        tokenizer.save_pretrained(folder)
        if renderer.kind != "conversation" or expected is None:
            return
        loaded: Any = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=self.base.trust_remote_code
        )
        prompt = loaded.apply_chat_template(
            _PROBE, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if prompt != expected:
            raise Mismatch(
                f"the tokenizer of {folder}, loaded back, renders the prompt {prompt} where the run"
                f" trained {expected}"
            )

    def _prompt(self) -> list[int] | None:
        """The ids of a made-up prompt, None if the template refuses it. A template that writes the
        date writes today's, as other programs will."""
        renderer = copy.copy(self.renderer)
        renderer.day = None
        renderer.use(renderer.template)
        try:
            return renderer.chat(_PROBE)
        except Refused:
            return None


def _joined(tokenizer: Any) -> str:
    """Return the template of task.chat_template=none: the messages as they are, between the tokens
    that the tokenizer puts around a text. T5's puts its end token after the text that it reads."""
    ids = tokenizer("1")["input_ids"]
    bos = "{{ bos_token }}" if ids[0] == tokenizer.bos_token_id else ""
    eos = "{{ eos_token }}" if ids[-1] == tokenizer.eos_token_id else ""
    return bos + "{% for message in messages %}{{ message['content'] }}{% endfor %}" + eos
