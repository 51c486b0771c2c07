"""A fast tokenizer as the metadata of a GGUF file.

llama.cpp splits texts by rules that are compiled into it, and the file names one. The name is found
from the tokenizer's own regular expression; a tokenizer with another one is refused, since a wrong
name would split texts otherwise without a message.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gguf

from adapters.delta import AdapterError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name of a rule -> the regular expression of tokenizer.json
RULES = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
    "tekken": rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH}",
    "gpt-4o": rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_START}{_UPPER}+{_LOWER}*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASH}",
}


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer as a GGUF file describes it. `model` is gpt2 (bytes) or llama
    (sentencepiece)."""

    model: str
    rule: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    ids: dict[str, int]  # bos, eos, unk, pad
    adds_bos: bool
    adds_space: bool

    def add(self, writer: gguf.GGUFWriter, ends: list[int], template: str | None) -> None:
        """Add it to a file, with the trained end token and the chat template."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.adds_space)
        if self.merges:
            writer.add_token_merges(self.merges)
        ids = self.ids | ({"eos": ends[0]} if ends else {})
        for name, number in ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.adds_bos)
        if template is not None:
            writer.add_chat_template(template)


def of(tokenizer: Any, size: int) -> Vocabulary:
    """Return the vocabulary of a fast tokenizer, of the model's `size`.

    Raises:
        AdapterError: llama.cpp has no rule for it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {}
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise AdapterError(
            f"to=gguf: the tokenizer is {model.get('type') or type(tokenizer).__name__}, expected"
            " BPE. Use to=merged and llama.cpp's convert_hf_to_gguf.py"
        )
    sentencepiece = bool(model.get("byte_fallback"))
    rule = "default" if sentencepiece else _rule(content.get("pre_tokenizer") or {})
    special = {token["id"]: token["special"] for token in content.get("added_tokens") or []}
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges and not sentencepiece:
        raise AdapterError(
            "to=gguf: the tokenizer is BPE without merges, and llama.cpp refuses such a file."
            " Use to=merged, which transformers, vLLM and SGLang load"
        )
    tokens, kinds = [], []
    for number in range(max(size, max(words.keys() - special.keys(), default=0) + 1)):
        word = words.get(number)
        tokens.append(f"[PAD{number}]" if word is None else word)
        kinds.append(_type(word, special.get(number), sentencepiece))
    if len(tokens) > size:
        raise AdapterError(
            f"the tokenizer has {len(tokens):,} tokens, and the model {size:,}: llama.cpp needs a"
            " row for each"
        )
    named = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id",
             "pad": "pad_token_id"}  # fmt: skip
    ids = {name: getattr(tokenizer, key, None) for name, key in named.items()}
    first = tokenizer("a")["input_ids"][:1]
    return Vocabulary(
        "llama" if sentencepiece else "gpt2",
        rule,
        tokens,
        kinds,
        merges,
        _scores(tokens, merges) if sentencepiece else [],
        {name: number for name, number in ids.items() if isinstance(number, int)},
        bool(first) and first[0] == ids["bos"],
        "▁" in json.dumps(content.get("normalizer"), ensure_ascii=False)
        and "Prepend" in json.dumps(content.get("normalizer")),
    )


def _rule(splitting: dict[str, Any]) -> str:
    """Return llama.cpp's name of a pre-tokenizer.

    Raises:
        AdapterError: it has none.
    """
    steps = splitting.get("pretokenizers") or [splitting]
    kinds = [step.get("type") for step in steps]
    own = [
        step for step in steps if step.get("type") == "ByteLevel" and step.get("use_regex", True)
    ]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and own:
        return "smollm"
    if kinds == ["ByteLevel"] and own:
        return "gpt-2"
    patterns = [
        step.get("pattern", {}).get("Regex") for step in steps if step.get("type") == "Split"
    ]
    if kinds == ["Split", "ByteLevel"] and not own:
        for name, pattern in RULES.items():
            if patterns == [pattern]:
                return name
    raise AdapterError(
        "to=gguf: llama.cpp has no name for how this tokenizer splits texts"
        f" ({', '.join(map(str, kinds))}). Use to=merged and its convert_hf_to_gguf.py"
    )


def _type(word: str | None, special: bool | None, sentencepiece: bool) -> int:
    if word is None:
        return int(gguf.TokenType.UNUSED)
    if sentencepiece and len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
        return int(gguf.TokenType.BYTE)
    if special is None:
        return int(gguf.TokenType.NORMAL)
    return int(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Give each token the rank of its first merge, negated: llama.cpp joins the pair whose result
    has the highest score."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]
