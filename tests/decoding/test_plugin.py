"""transformers' generate with our drafters writes what it writes without: a second decoder that
verifies them."""

from __future__ import annotations

import pytest
import torch
import transformers
from omegaconf import OmegaConf

from tests.conftest import ROOT
from tests.toys import adapters as toys
from tests.toys.speculative import p_value
from trainer.assembly.build import instantiate
from trainer.config import compose
from trainer.decoding.criteria import STATEFUL
from trainer.decoding.plugin import assist, drafting, first_path
from trainer.drafters import Draft, DrafterError, chain
from trainer.drafters.lookup import PromptLookup
from trainer.drafters.recycling import TokenRecycling
from trainer.drafters.small import SmallModel
from trainer.drafters.untrained import Untrained
from trainer.models.cache_argument import model_with_cache

PROMPT = torch.tensor([[5, 9, 13, 7, 30, 22, 11]])
TRAINED = sorted(
    {path.stem for path in (ROOT / "conf" / "drafter").glob("*.yaml")}
    - {"none", "registers", "native"}
)


@pytest.fixture
def model():
    return toys.llama(torch.float32, tie_word_embeddings=False, pad_token_id=0, eos_token_id=None)


def text(model, count=30, **settings):
    torch.manual_seed(0)
    settings = {"do_sample": False, "max_new_tokens": count} | settings
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **settings)[
        0, PROMPT.shape[1] :
    ].tolist()


def passes(model):
    """Counts the target's passes."""
    seen = []
    model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    return seen


class Scripted(Untrained):
    """Proposes a fixed text, wrong at some places, and records its updates."""

    layers = (0, 2)

    def __init__(self, whole, wrong=lambda place: False, tree=False):
        super().__init__(4)
        self.whole, self.wrong, self.tree, self.updates = whole, wrong, tree, []

    def start(self, target):
        return None

    def propose(self, memory, target, update, build):
        self.updates.append(update)
        at = sum(len(one.ids) for one in self.updates) + 1
        tokens = [(t + self.wrong(i)) % 64 for i, t in enumerate(self.whole[at : at + 4], at)]
        if self.tree:  # a sibling before each node but the first child, which is the right one
            tokens = [token for right in tokens for token in (right, (right + 1) % 64)]
            return Draft(
                torch.tensor(tokens, dtype=torch.long),
                torch.tensor([-1, -1, 0, 0, 2, 2, 4, 4][: len(tokens)]),
            )
        return chain(torch.tensor(tokens, dtype=torch.long))


@pytest.mark.parametrize("tree", [False, True])
def test_it_is_told_each_accepted_state_once_and_the_text_stays(model, tree):
    plain = text(model)
    whole = PROMPT[0].tolist() + plain
    draft_source = Scripted(whole, lambda place: place % 5 == 3, tree)
    seen = passes(model)
    with assist(model, draft_source):
        assert text(model) == plain
    assert len(seen) < 20
    assert "generate" not in vars(model)
    update = draft_source.updates
    ids = torch.cat([update[0].first.view(1), *(one.ids for one in update)])
    assert ids.tolist() == whole[: len(ids)]
    assert len(ids) > 25
    assert all(one.first is None for one in update[1:])
    with torch.no_grad():
        out = model.model(input_ids=ids[None, :-1], output_hidden_states=True)
        logits = model(input_ids=ids[None, :-1]).logits[0]
    torch.testing.assert_close(
        torch.cat([one.hidden for one in update]), out.last_hidden_state[0], atol=1e-4, rtol=1e-4
    )
    between = torch.cat([out.hidden_states[0], out.hidden_states[1]], dim=-1)[0]
    assert torch.cat([one.features for one in update]).shape == between.shape
    torch.testing.assert_close(
        torch.cat([one.features for one in update])[:, :64], between[:, :64], atol=1e-4, rtol=1e-4
    )
    position = 0
    for one in update:
        position += len(one.ids)
        tokens, arguments = one.tried
        taken = position - len(one.ids)  # the pass read from here on
        taken = position - 1 if taken == 0 else taken
        assert int(tokens[0]) == whole[taken]
        torch.testing.assert_close(arguments[0], logits[taken], atol=1e-4, rtol=1e-4)


def drafters(model):
    torch.manual_seed(3)
    other = toys.llama(torch.float32, num_hidden_layers=1, tie_word_embeddings=False)
    return {
        "lookup": PromptLookup(4),
        "recycling": TokenRecycling(64, 20),
        "small": SmallModel(other, 3),
        "itself": SmallModel(toys.llama(torch.float32, tie_word_embeddings=False), 3),
    }


@pytest.mark.long
def test_greedy_is_plain_greedy(model):
    seen = passes(model)
    plain = text(model, 24)
    assert len(set(plain)) > 4
    for name, drafter in drafters(model).items():
        seen.clear()
        for count in (None, 2):
            assert text(model, 24, custom_generate=drafting(drafter, count)) == plain, name
        if name == "itself":
            # Target looks twice how the model makes its logits
            assert len(seen) == 1 + 6 + 1 + 8 + 2 * 2


@pytest.mark.parametrize("name", TRAINED)
def test_greedy_with_each_trained_drafter(model, name):
    settings = [f"drafter={name}", "adapter=none", "base=tiny", "task.path=x"]
    node = OmegaConf.to_container(compose.compose(settings).drafter)
    drafter = instantiate(node)(model=model).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    plain = text(model, 12)
    with assist(model, drafter):
        assert text(model, 12) == plain


def test_stops_and_processors_are_generates_own(model):
    plain = text(model)
    stop = plain[7]
    expected = text(model, eos_token_id=stop)
    assert expected == plain[: plain.index(stop) + 1]
    penalised = text(model, repetition_penalty=1.3)
    assert penalised != plain
    whole = PROMPT[0].tolist() + plain
    with assist(model, Scripted(whole)):
        assert text(model, eos_token_id=stop) == expected
    with assist(model, Scripted(PROMPT[0].tolist() + penalised)):
        assert text(model, repetition_penalty=1.3) == penalised
    for limit in (1, 2, 5, 6):
        with assist(model, Scripted(whole)):
            assert text(model, limit) == plain[:limit]


def test_what_is_accepted_streams(model):
    class Streamer(transformers.generation.streamers.BaseStreamer):
        tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    plain, streamer = text(model), Streamer()
    with assist(model, Scripted(PROMPT[0].tolist() + plain)):
        text(model, streamer=streamer)
    assert streamer.tokens == [*PROMPT[0].tolist(), *plain, "end"]


@pytest.mark.long
def test_a_sampled_token_is_the_targets_whatever_is_drafted():
    model = toys.llama(
        torch.float32,
        vocab_size=7,
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=16,
        pad_token_id=0,
    )
    prompt = torch.tensor([[1, 3]])
    with torch.no_grad():
        first = model(input_ids=prompt).logits[0, -1].double().softmax(-1)
        after = (
            model(input_ids=torch.tensor([[1, 3, v] for v in range(7)]))
            .logits[:, -1]
            .double()
            .softmax(-1)
        )
    expected = first @ after
    often = int(expected.argmax())
    drafter = Scripted([often] * 9)
    actual = torch.zeros(7, dtype=torch.float64)
    torch.manual_seed(4)
    seen = passes(model)
    decode = drafting(drafter)
    for _ in range(150):
        drafter.updates.clear()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            top_k=0,
            max_new_tokens=3,
            eos_token_id=None,
            custom_generate=decode,
        )
        actual[out[0, 3]] += 1
    assert 2 * 150 < len(seen) < 3 * 150  # some were taken, not all
    assert p_value(actual, expected) > 0.01
    assert (
        p_value(actual, (expected + torch.nn.functional.one_hot(torch.tensor(often), 7)) / 2) < 1e-3
    )


def test_what_it_cannot_do_is_refused(model):
    with pytest.raises(DrafterError, match="num_beams=2"), assist(model, PromptLookup()):
        text(model, num_beams=2)
    with pytest.raises(ValueError, match="batch_size = 1"), assist(model, PromptLookup()):
        model.generate(PROMPT.repeat(2, 1), max_new_tokens=4)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=PROMPT[:, :3], **model_with_cache(model, cache))
    with (
        pytest.raises(DrafterError, match="cache that generate was called with holds tokens"),
        assist(model, PromptLookup()),
    ):
        text(model, **model_with_cache(model, cache))
    assert "generate" not in vars(model)
    assert "_get_candidate_generator" not in vars(model)


def test_the_first_path_of_a_tree():
    draft = Draft(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([-1, -1, 1, 0, 3]))
    assert first_path(draft).tolist() == [1, 4, 5]
    assert first_path(chain(torch.tensor([], dtype=torch.long))).tolist() == []


def test_every_criterion_is_asked_after_each_accepted_token(model, tiny):
    plain = text(model)
    whole = PROMPT[0].tolist() + plain

    class Until(transformers.StoppingCriteria):
        """Stops after some calls, and remembers the lengths that it was asked for."""

        def __init__(self, calls):
            self.calls, self.lengths = calls, []

        def __call__(self, input_ids, scores, **_):
            self.lengths.append(input_ids.shape[1])
            return torch.tensor([len(self.lengths) >= self.calls])

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    for calls in (1, 2, 5, 6, 9):
        streamer, drafted, alone = Streamer(), Until(calls), Until(calls)
        assert text(model, stopping_criteria=[alone]) == plain[:calls]
        with assist(model, Scripted(whole)):
            out = model.generate(
                PROMPT,
                attention_mask=torch.ones_like(PROMPT),
                do_sample=False,
                max_new_tokens=30,
                stopping_criteria=[drafted],
                output_scores=True,
                return_dict_in_generate=True,
                streamer=streamer,
            )
        assert out.sequences[0].tolist() == whole[: 7 + calls]
        assert streamer.tokens == whole[: 7 + calls]
        assert drafted.lengths == alone.lengths
        assert len(out.scores) == calls
        assert out.past_key_values.get_seq_length() == 7 + calls - 1


def test_stop_strings_end_the_text_where_they_do_without_a_drafter(model, tiny):
    plain = text(model)
    words = tiny.tokenizer
    string = words.decode(plain[4:6])
    settings = {"stop_strings": [string], "tokenizer": words}
    expected = text(model, **settings)
    assert len(expected) < len(plain)
    with assist(model, Scripted(PROMPT[0].tolist() + plain)):
        assert text(model, **settings) == expected
        config = transformers.GenerationConfig(stop_strings=[string], pad_token_id=0)
        assert text(model, generation_config=config, tokenizer=words) == expected
        with pytest.raises(DrafterError, match="give generate"):
            text(model, stop_strings=[string])


class Counting(transformers.LogitsProcessor):
    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"guidance_scale": 1.5}, "guidance_scale=1.5 reads a second text"),
        ({"prompt_lookup_num_tokens": 3}, "these settings choose assisted generation"),
        ({"logits_processor": [Counting()]}, "Counting depends on more than the text"),
    ],
)
def test_what_reads_other_state_is_refused(model, settings, match):
    with pytest.raises(DrafterError, match=match), assist(model, PromptLookup()):
        text(model, **settings)


def test_each_processor_of_transformers_is_known():
    from transformers.generation import logits_process as module

    known = {
        name
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, transformers.LogitsProcessor)
    }
    stateless = {
        "AlternatingCodebooksLogitsProcessor",
        "BarkEosPrioritizerLogitsProcessor",
        "DiaEOSChannelFilterLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "LogitsProcessor",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
        "WatermarkLogitsProcessor",
    }
    assert known == stateless | STATEFUL


def test_llama4_whose_decoder_is_the_model_itself(model):
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24}
    config = transformers.Llama4TextConfig(
        **sizes,
        vocab_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=2,
        attention_chunk_size=16,
        initializer_range=0.4,
        pad_token_id=0,
        eos_token_id=None,
    )
    llama4 = transformers.Llama4ForCausalLM(config).eval()
    plain = text(llama4)
    draft_source = Scripted(PROMPT[0].tolist() + plain, lambda place: place % 5 == 3)
    draft_source.layers = ()
    for drafter in (draft_source, PromptLookup()):
        with assist(llama4, drafter):
            assert text(llama4) == plain
