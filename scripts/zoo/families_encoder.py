"""Encoders, which classify, and encoder-decoders, which also answer a prompt: two layers of width
32 each, with tokenizers over bytes."""

from __future__ import annotations

import functools
from typing import Any

from scripts.zoo import checks_encoder
from scripts.zoo.families import Family

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
POSITIONS = 64
# special tokens at 0, 1, 2 and 3, in the order of the originals, and what stands around a text and
# around a pair of texts
STYLES = {
    "bert": (
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    "roberta": (["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "t5": (["<pad>", "</s>", "<unk>"], "$A </s>", "$A </s> $B </s>"),
    "gemma": (["<pad>", "<eos>", "<bos>", "<unk>"], "<bos> $A", "<bos> $A <bos> $B"),
}


def configs() -> dict[str, tuple[Any, str, str]]:
    """(config, auto class of the checkpoint, tokenizer style) by family. The checkpoints are of the
    pretrained model, so a classifier's head, and a pooler where they have none, is missing."""
    return _encoders() | _pairs()


def _encoders() -> dict[str, tuple[Any, str, str]]:
    import transformers as t

    bert = {"max_position_embeddings": POSITIONS}
    roberta = {
        "max_position_embeddings": POSITIONS + 2,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    relative = {"position_biased_input": False, "relative_attention": True, "position_buckets": 8}
    masked = "AutoModelForMaskedLM"
    return {
        "bert": (t.BertConfig(**SMALL, **bert), masked, "bert"),
        "roberta": (t.RobertaConfig(**SMALL, **roberta), masked, "roberta"),
        "xlm_roberta": (t.XLMRobertaConfig(**SMALL, **roberta), masked, "roberta"),
        "distilbert": (
            t.DistilBertConfig(
                vocab_size=300, dim=32, n_layers=2, n_heads=4, hidden_dim=64, **bert
            ),
            masked,
            "bert",
        ),
        "electra": (t.ElectraConfig(**SMALL, **bert, embedding_size=16), "AutoModel", "bert"),
        "albert": (t.AlbertConfig(**SMALL, **bert, embedding_size=16), masked, "bert"),
        "deberta_v2": (
            t.DebertaV2Config(**SMALL, **bert, **relative, pos_att_type=["p2c", "c2p"]),
            masked,
            "bert",
        ),
        "modernbert": (
            t.ModernBertConfig(
                **SMALL,
                **bert,
                pad_token_id=0,
                cls_token_id=2,
                sep_token_id=3,
                bos_token_id=2,
                eos_token_id=3,
            ),
            masked,
            "bert",
        ),
    }


def _pairs() -> dict[str, tuple[Any, str, str]]:
    import transformers as t

    pairs = "AutoModelForSeq2SeqLM"
    t5 = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    t5 |= {"decoder_start_token_id": 0}
    bart = {"vocab_size": 300, "d_model": 32, "max_position_embeddings": POSITIONS}
    for side in ("encoder", "decoder"):
        bart |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    return {
        "t5": (t.T5Config(**t5), pairs, "t5"),
        "flan_t5": (
            t.T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
            pairs,
            "t5",
        ),
        "bart": (t.BartConfig(**bart, forced_eos_token_id=2), pairs, "roberta"),
        "mbart": (t.MBartConfig(**bart, forced_eos_token_id=2), pairs, "roberta"),
        "mt5": (t.MT5Config(**t5), pairs, "t5"),
        "marian": (
            t.MarianConfig(**bart, pad_token_id=1, eos_token_id=2, decoder_start_token_id=1),
            pairs,
            "roberta",
        ),
        "pegasus": (
            t.PegasusConfig(**bart, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0),
            pairs,
            "t5",
        ),
        "t5gemma": (_t5gemma(), pairs, "gemma"),
    }


# of these transformers has no sequence classifier
ANSWER_ONLY = ("marian", "pegasus")


def _t5gemma() -> Any:
    import transformers as t

    side = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": POSITIONS}
    side |= {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
    side |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return t.T5GemmaConfig(encoder=dict(side), decoder=dict(side), vocab_size=300)


def tokenizer(style: str) -> Any:
    """A tokenizer of bytes with the special tokens of a family, and what it puts around a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials, around, around_pair = STYLES[style]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    over_bytes = Tokenizer(models.BPE({t: i for i, t in enumerate(specials + alphabet)}, []))
    over_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    over_bytes.decoder = decoders.ByteLevel()
    over_bytes.add_special_tokens([AddedToken(token, special=True) for token in specials])
    ids = {token: i for i, token in enumerate(specials)}
    over_bytes.post_processor = processors.TemplateProcessing(
        single=around,
        pair=around_pair,
        special_tokens=[(t, ids[t]) for t in specials if t in around],
    )
    roles = {
        "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"},
        "roberta": {
            "bos_token": "<s>",
            "cls_token": "<s>",
            "sep_token": "</s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
        "t5": {"eos_token": "</s>", "unk_token": "<unk>"},
        "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
    }[style]
    types = ["token_type_ids"] if style == "bert" else []
    return PreTrainedTokenizerFast(
        tokenizer_object=over_bytes,
        model_input_names=["input_ids", *types, "attention_mask"],
        pad_token="[PAD]" if style == "bert" else "<pad>",
        **roles,
    )


def rows() -> list[dict[str, Any]]:
    """Sums, and a class of each, which can be written as an answer too."""
    return [{"text": f"{a}+{7 * a % 31}=", "label": "ab"[a % 2]} for a in range(24)]


def families() -> list[Family]:
    """The table's families of encoders and encoder-decoders. These come twice: they answer prompts,
    and as NAME_classify they classify."""
    result = []
    pairs = _pairs()
    for name, (_, auto, style) in configs().items():
        config, words = functools.partial(_config, name), functools.partial(tokenizer, style)
        classify, answer = (checks_encoder.of(task) for task in ("classify", "answer"))
        if name in pairs:
            result.append(Family(name, "pairs", config, auto, answer, rows, words))
        if name in ANSWER_ONLY:
            continue
        title = f"{name}_classify" if name in pairs else name
        group = "pairs" if name in pairs else "encoder"
        result.append(Family(title, group, config, auto, classify, rows, words))
    return result


def _config(name: str) -> Any:
    return configs()[name][0]
