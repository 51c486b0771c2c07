"""The frozen base model: its source, its compute dtype and its tokenizer.

`Base` describes a model without holding its weights, so that everything that can be checked is
checked before they load.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
)

from trainer.config import paths
from trainer.config.errors import PANIC
from trainer.models import added_tokens, folders, prequantised
from trainer.models.generation import keep_single_answers
from trainer.models.heads import first_positions, fresh_modules
from trainer.speed.flash import isolate_packed_rows
from trainer.storage import door

PROBE = "A b, c! 12\n\n  " + "a" * 60  # words, digits, blanks, and a long word


class BaseError(ValueError):
    """The base cannot be used. The message says why and how to fix it."""


@dataclass
class Base:
    """A model as transformers loads it: `path` is a folder or a hub name."""

    path: str
    dtype: str
    attn_implementation: str
    quantization: str
    double_quant: bool
    revision: str | None = None
    trust_remote_code: bool = False
    max_length: int | None = None  # if the model's own config has none
    add_tokens: Sequence[str] = ()  # the tokenizer and the model are extended by them
    _added: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def config(self) -> Any:
        """transformers' config of the model.

        Raises:
            BaseError: there is no such model, it cannot be reached, or it comes with its own code.
        """
        if (fault := folders.adapter_fault(self.path)) is not None:
            raise BaseError(fault)
        with _explained(self):
            _refuse_devices(self.path)
            self._refuse_fetched_code()
            config = AutoConfig.from_pretrained(self.path, **self._source())
        if (fault := prequantised.fault(config)) is not None:
            raise BaseError(f"base {self.path!r} {fault}")
        return config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, with a pad token. No token is added for it: the end token serves as well,
        since padding is masked by length.

        Raises:
            BaseError: there is no tokenizer, it has neither a pad nor an end token, or it has more
                tokens than the model, other than added ones.
        """
        tokenizer = self.load_tokenizer()
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise BaseError(
                    f"the tokenizer of {self.path} has no pad token and no end-of-sequence token."
                    " Set pad_token in its tokenizer_config.json, and eos_token for a model that"
                    " writes text."
                )
            tokenizer.pad_token = tokenizer.eos_token
        # Lengths are checked row by row (trainer.data); the tokenizer's warning would name no row.
        tokenizer.model_max_length = 1 << 30
        tokenizer.without_embedding = self._without_embedding(tokenizer)
        return tokenizer

    def _without_embedding(self, tokenizer: Any) -> dict[int, str]:
        """Return the added tokens that the model has no embedding for, as Gemma 3's text models
        have none for images. A text with one of them is refused (trainer.data.encoding).

        Raises:
            BaseError: there are other tokens without one, the tokenizer itself writes such a token
                into texts, or tokens are to be added after it.
        """
        size = self.config.get_text_config().vocab_size
        beyond = {
            index: token
            for token, index in tokenizer.get_vocab().items()
            if index >= size and index not in self._added
        }
        named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        if beyond.keys() - tokenizer.added_tokens_decoder.keys() or beyond.keys() & named:
            raise BaseError(
                f"the tokenizer of {self.path} has ids up to {max(beyond)}, the model embeddings of"
                f" {size} tokens: they do not belong together, or tokens were added without"
                " resizing the model's embeddings"
            )
        if beyond and self.add_tokens:
            raise BaseError(
                f"base.add_tokens={list(self.add_tokens)}: they would come after"
                f" {min(beyond.values())!r}, for which {self.path} has no embedding, so that row"
                " would be random. Leave add_tokens out, or resize the model's embeddings first"
            )
        return beyond

    def load_tokenizer(self) -> Any:
        """Return the tokenizer as exports write it: as its files have it, with its own pad token
        and length limit, and with this base's added tokens.

        Raises:
            BaseError: there is none, or a token cannot be added.
        """
        with _explained(self):
            _refuse_devices(self.path)
            tokenizer = AutoTokenizer.from_pretrained(self.path, **self._source())
            with contextlib.suppress(Exception):  # a pattern that explodes raises no Exception
                tokenizer(PROBE)
        try:
            self._added = added_tokens.extend(tokenizer, self.add_tokens)
        except added_tokens.TokenError as error:
            raise BaseError(str(error)) from None
        return tokenizer

    @property
    def vocabulary(self) -> int:
        """The number of rows of the embedding: with added tokens, as many as they need."""
        size = self.config.get_text_config().vocab_size
        if not self.add_tokens:
            return size
        assert self.tokenizer is not None  # which numbers the added tokens
        return max(size, *(index + 1 for index in self._added))

    @functools.cached_property
    def longest(self) -> int:
        """The number of tokens of the longest sequence that the model supports. RoBERTa's positions
        start after its padding token's, so two of its 514 are never used."""
        text = self.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None)
        if positions and not hasattr(text, "rope_parameters"):
            with torch.device("meta"), contextlib.suppress(Exception):  # `config` reports faults
                positions -= first_positions(AutoModel.from_config(self.config))
        return min(filter(None, (positions, self.max_length)), default=1 << 30)

    @functools.cached_property
    def decoder_start(self) -> int | None:
        """The token that opens every answer of an encoder-decoder's decoder. None for a model that
        reads and writes one sequence.

        Raises:
            BaseError: the config of an encoder-decoder names none.
        """
        start = folders.decoder_start(self.config)
        if start is None and self.config.is_encoder_decoder:
            raise BaseError(
                f"config.json of {self.path} has no decoder_start_token_id, so its decoder's first"
                " token is not known. Set it there, as the model's authors used it"
            )
        return start

    def load(
        self,
        dtype: torch.dtype,
        labels: list[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> nn.Module:
        """Return the model in eval mode, its weights in `dtype` or quantised; with `labels`, a
        sequence classifier.

        Raises:
            BaseError: as `config`, or the weights are incomplete, or the quantisation is not
                available.
        """
        if self.attn_implementation.startswith("flash"):
            isolate_packed_rows()
        arguments: dict[str, Any] = self._source() | {"dtype": dtype}
        if self.quantization != "none":
            arguments["quantization_config"] = self._quantization(dtype)
        elif (dequantised := prequantised.dequantising(self.config)) is not None:
            arguments["quantization_config"] = dequantised
        if self.quantization != "none" or self.is_quantized:
            arguments["device_map"] = {"": device}
        with _explained(self):
            self._refuse_fetched_code()
            model, missing = self._with_attention(labels, arguments)
        keep_single_answers(model, self.path)
        if missing:
            raise BaseError(
                f"the weights of {self.path} lack {len(missing)} tensors, such as {missing[:3]}:"
                " the files are not of this model. Fetch or copy it again"
            )
        if (fault := prequantised.plain_weights(model)) is not None:
            raise BaseError(f"base {self.path!r} {fault}")
        if self.add_tokens:
            added_tokens.resize(model, self.vocabulary, self._added)
        if "device_map" not in arguments:
            model.to(device)
        for module in model.modules():
            # On a CPU with AVX512-BF16 bitsandbytes repacks a 4-bit weight at its first use in eval
            # mode, for a kernel without a backward pass. Training after an evaluation would then
            # compute wrong gradients.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model.eval()

    def _with_attention(
        self, labels: list[str] | None, arguments: dict[str, Any]
    ) -> tuple[Any, list[str]]:
        """Load with the attention that was chosen. `auto` is sdpa where the model's class has it,
        else eager: Gemma 2 caps its scores, gpt-oss has sinks, Bloom has biases by distance."""
        if self.attn_implementation != "auto":
            chosen = {"attn_implementation": self.attn_implementation}
            return self._from_pretrained(labels, arguments | chosen)
        try:
            return self._from_pretrained(labels, arguments | {"attn_implementation": "sdpa"})
        except ValueError as error:  # raised before weights are read
            if "scaled_dot_product_attention" not in str(error):
                raise
        return self._from_pretrained(labels, arguments | {"attn_implementation": "eager"})

    def _from_pretrained(
        self, labels: list[str] | None, arguments: dict[str, Any]
    ) -> tuple[Any, list[str]]:
        """Return the model as transformers loads it, and the names of tensors that its files
        lack."""
        if labels is None:
            loaded: Any = folders.text_model_class(self.config).from_pretrained(
                self.path, output_loading_info=True, **arguments
            )
            return loaded[0], sorted(loaded[1]["missing_keys"])
        names = dict(enumerate(labels))
        loaded = AutoModelForSequenceClassification.from_pretrained(
            self.path,
            id2label=names,  # sets num_labels too
            label2id={label: index for index, label in names.items()},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of a head for other classes, which is made again
            **arguments,
        )
        model = loaded[0]
        lacking = loaded[1]["missing_keys"] | {key for key, *_ in loaded[1]["mismatched_keys"]}
        model.config.pad_token_id = self.tokenizer.pad_token_id
        model.fresh_modules, foreign = fresh_modules(model, lacking)
        return model, foreign

    def skeleton(self, labels: list[str] | None = None) -> nn.Module:
        """Return the model without its weights, on the meta device."""
        config = copy.deepcopy(self.config)
        if labels is not None:
            config.num_labels = len(labels)
        config.get_text_config().vocab_size = self.vocabulary
        auto: Any = (
            folders.text_model_class(config)
            if labels is None
            else AutoModelForSequenceClassification
        )
        with torch.device("meta"), _explained(self):
            model: Any = auto.from_config(config, trust_remote_code=self.trust_remote_code)
        model.added_tokens = tuple(self._added) if self.add_tokens else ()
        return model

    @property
    def is_quantized(self) -> bool:
        """Return whether the model's own files are quantised."""
        return getattr(self.config, "quantization_config", None) is not None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A text that changes with the weights: the hub's commit, or a digest over samples of the
        local files."""
        commit = getattr(self.config, "_commit_hash", None)
        if not Path(self.path).is_dir():
            return f"{self.path}@{commit}"
        digest = hashlib.sha256((Path(self.path) / "config.json").read_bytes())
        for file in sorted(Path(self.path).glob("*.safetensors")) + sorted(
            Path(self.path).glob("*.bin")
        ):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            # 17 evenly spaced samples of 64 KiB: 14 GB of weights take milliseconds
            with file.open("rb") as stream:
                for sample in range(17):
                    stream.seek(max(0, size - 65536) * sample // 16)
                    digest.update(stream.read(65536))
        return digest.hexdigest()

    def _refuse_fetched_code(self) -> None:
        if fetched := folders.implementation_elsewhere(
            PretrainedConfig.get_config_dict(self.path, **self._source())[0]
        ):
            raise BaseError(
                f"config.json of {self.path} has {fetched}: transformers would fetch code from"
                " there. Remove the key; attention is chosen by base.attn_implementation"
            )

    def _source(self) -> dict[str, Any]:
        source = {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}
        if not Path(self.path).is_dir() and not folders.hub_answers():
            source["local_files_only"] = True  # the hub's client would retry for most of a minute
        return source

    def _quantization(self, dtype: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig

        if self.quantization == "int8":
            if (fault := prequantised.int8_fault()) is not None:
                raise BaseError(fault)
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )


def _refuse_devices(path: str) -> None:
    """Refuse a local folder with an entry that leads to a device or a FIFO."""
    try:
        door.refuse_devices(Path(path))
    except door.FolderError as error:
        raise BaseError(f"base {path!r}: {error}") from None


@contextlib.contextmanager
def _explained(base: Base) -> Iterator[None]:
    """Turn transformers' errors for a base into a BaseError that says what to do."""
    try:
        yield
    except BaseError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        path, text = base.path, str(error)
        first_line = text.splitlines()[0] if text else type(error).__name__
        if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "allocate memory" in text:
            raise
        if isinstance(error, pickle.UnpicklingError) or "Weights only load failed" in text:
            # torch's own message advises to load it all the same
            reason = (
                "its .bin file holds more than tensors and plain data, which could run code. Use"
                " its safetensors files, or ask its author for them"
            )
        elif type(error).__name__ == PANIC:
            reason = f"its tokenizer.json cannot be used: {first_line}"
        elif "trust_remote_code" in text:
            reason = (
                "it comes with its own Python code. If you trust that code, set"
                " base.trust_remote_code=true"
            )
        elif "FlashAttention" in text:
            reason = (
                f"base.attn_implementation={base.attn_implementation} is not available on this"
                f" machine: {first_line} Set base.attn_implementation=auto"
            )
        elif Path(path).is_dir():
            reason = f"the folder cannot be loaded as a language model: {first_line}"
        elif paths.looks_local(path):
            reason = paths.NO_BASE
        else:
            reason = (
                f"it is not in the hub's cache, and could not be fetched from the hub: {first_line}"
            )
        raise BaseError(f"base {path!r}: {reason}") from error
