"""Speculative decoding writes what the target alone would: token by token when greedy, in distribution when sampling."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from transformers import GenerationConfig, TemperatureLogitsWarper, TopPLogitsWarper

from adapters.delta import Start
from tests.adapters import toys
from tests.conftest import ROOT
from trainer import assembly, config
from trainer.decoding import speculative
from trainer.decoding.speculative import Place, Result, generate, places
from trainer.drafters import Draft, Drafter, DrafterError, Target

SIZES = {
    "vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "max_position_embeddings": 128, "initializer_range": 0.4, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "mistral, a window of 6": ("Mistral", {"sliding_window": 6}),
    "gemma2, a cap and a window of 5": (
        "Gemma2",
        {"sliding_window": 5, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 4},
    ),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128, "tie_word_embeddings": False}),
    "granite, scaled logits": ("Granite", {"logits_scaling": 0.25}),
}
PRESETS = sorted({path.stem for path in (ROOT / "conf" / "drafter").glob("*.yaml")} - {"none", "registers"})
PROMPT = torch.tensor([5, 9, 13, 7, 30, 22, 11])


def tiny(kind="llama", **changes):
    name, settings = MODELS[kind]
    torch.manual_seed(2)  # its texts go through many tokens
    built = getattr(transformers, f"{name}Config")(**(SIZES | settings | changes))
    made = transformers.GPT2LMHeadModel if name == "GPT2" else getattr(transformers, f"{name}ForCausalLM")
    return made(built).eval()


def alone(model, ids, count, stops=(), **settings):
    """transformers' own text."""
    asked = GenerationConfig(
        max_new_tokens=count, eos_token_id=list(stops) or None, pad_token_id=0, **{"do_sample": False} | settings
    )
    out = model.generate(
        input_ids=ids.unsqueeze(0), attention_mask=torch.ones(1, len(ids), dtype=torch.long), generation_config=asked
    )
    return out[0, len(ids) :].tolist()


class Toy(Drafter):
    """Proposes what `guess(index of the token in the text, how many)` says, and keeps what it was told."""

    offsets = 4

    def __init__(self, guess):
        super().__init__()
        self.guess = guess

    def start(self, target):
        self.hidden, self.ids, self.asked = [], [], []
        return self

    def propose(self, memory, target, hidden, ids, count, choose):
        assert memory is self
        assert len(hidden) == len(ids) >= 1
        self.hidden.append(hidden)
        self.ids.append(ids)
        self.asked.append(count)
        found = self.guess(sum(map(len, self.ids)) + 1, count)
        return Draft(torch.tensor(found, dtype=torch.long)[:count], None)


def oracle(ids, text, wrong=lambda place: False):
    """A drafter that knows the text, but for some places of it."""
    whole = ids.tolist() + text
    return Toy(lambda at, count: [(t + 1) % 41 if wrong(i) else t for i, t in enumerate(whole[at : at + count], at)])


def drafters(ids, text):
    draw = torch.Generator().manual_seed(3)
    return {
        "right": oracle(ids, text),
        "half": oracle(ids, text, lambda place: place % 2 == 0),
        "seldom wrong": oracle(ids, text, lambda place: place % 5 == 3),
        "random": Toy(lambda at, count: torch.randint(0, 41, (count,), generator=draw).tolist()),
        "few": oracle(ids, [*text[:5]]),  # it runs out of tokens
        "nothing": Toy(lambda at, count: []),
        "none": None,
    }


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_is_transformers_greedy(kind):
    model = tiny(kind)
    target = Target(model)
    text = alone(model, PROMPT, 30)
    assert len(set(text)) > 4
    for name, drafter in drafters(PROMPT, text).items():
        found = generate(target, drafter, PROMPT, 30, [])
        assert found.tokens == text, name
        assert 1 + found.steps + sum(taken for _, taken in found.drafts) == 30, name
        if name == "right":
            assert found.drafts == [(4, 4)] * 5 + [(3, 3)]
            assert found.histogram == [0, 0, 0, 1, 5]
        if name == "half":
            assert 15 < found.steps + 1 < 30
        if name in ("nothing", "none"):
            assert found.drafts == [(0, 0)] * 29


@pytest.mark.parametrize("name", ["lora", "rosa", "dora", "prompt_tuning", "prefix_tuning"])
def test_greedy_with_an_adapter(name):
    node = config.compose(
        [f"adapter={name}", "base=tiny", "task.path=x", *(["adapter.warmup_steps=1"] if name == "rosa" else [])]
    )
    adapter = assembly.instantiate(OmegaConf.to_container(node.adapter))
    base = toys.llama(torch.float32, tie_word_embeddings=False)
    plain = alone(base, PROMPT, 25)
    model = adapter.attach(base, Start(steps=3, data=toys.batches))
    toys.train(adapter, model, range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    model.eval()
    text = alone(model, PROMPT, 25)
    assert text != plain
    assert len(set(text)) > 4
    target = Target(model)
    for which in ("half", "random", "none"):
        assert generate(target, drafters(PROMPT, text)[which], PROMPT, 25, []).tokens == text, which


def made(name, model):
    """The drafter of conf/drafter/NAME.yaml, its weights random."""
    node = OmegaConf.to_container(config.compose([f"drafter={name}", "base=tiny", "task.path=x"]).drafter)
    drafter = assembly.instantiate(node)(model=model).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return drafter


@pytest.mark.parametrize("name", PRESETS)
def test_greedy_with_each_drafter(name):
    model = tiny("gemma2, a cap and a window of 5" if name == "mtp_medusa" else "llama")
    text = alone(model, PROMPT, 20)
    drafter = made(name, model)
    found = generate(Target(model), drafter, PROMPT, 20, [])
    assert found.tokens == text
    assert found.drafts[0][0] == drafter.offsets
    drawn = [
        generate(Target(model), drafter, PROMPT, 20, [], 1.0, 0.9, torch.Generator().manual_seed(seed)).tokens
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_does_not_draft_says_so():
    model = tiny()
    with pytest.raises(DrafterError):
        generate(Target(model), made("registers", model), PROMPT, 4, [])


@pytest.mark.parametrize("kind", ["llama", "gemma2, a cap and a window of 5"])
def test_a_drafter_is_told_each_accepted_state_once_with_the_token_after_it(kind):
    model = tiny(kind)
    text = alone(model, PROMPT, 20)
    drafter = oracle(PROMPT, text, lambda place: place % 3 == 0)
    found = generate(Target(model), drafter, PROMPT, 20, [])
    whole = torch.tensor([*PROMPT.tolist(), *text])
    told = torch.cat(drafter.ids)
    assert torch.equal(told, whole[1 : 1 + len(told)])
    assert len(told) > 20
    with torch.no_grad():
        states = model.get_decoder()(input_ids=whole.unsqueeze(0)).last_hidden_state[0]
    assert torch.allclose(torch.cat(drafter.hidden), states[: len(told)], atol=1e-4)
    assert [len(ids) for ids in drafter.ids[1:]] == [taken + 1 for _, taken in found.drafts[: len(drafter.ids) - 1]]


@pytest.mark.parametrize("place", [0, 1, 2, 4, 5, 8])
def test_a_stop_ends_the_text_where_plain_decoding_ends(place):
    model = tiny()
    text = alone(model, PROMPT, 12)
    stops = [text[place], 40]
    wanted = alone(model, PROMPT, 12, stops)
    assert wanted == text[: text.index(text[place]) + 1]
    for name, drafter in drafters(PROMPT, text).items():
        found = generate(Target(model), drafter, PROMPT, 12, stops)
        assert found.tokens == wanted, name
        if name == "right":
            assert all(proposed == taken for proposed, taken in found.drafts)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7])
def test_the_number_of_new_tokens_is_exact(limit):
    model = tiny()
    text = alone(model, PROMPT, 12)
    drafter = oracle(PROMPT, text)
    assert generate(Target(model), drafter, PROMPT, limit, []).tokens == text[:limit]
    assert all(asked >= 1 for asked in drafter.asked)


@pytest.mark.parametrize(("count", "asked"), [(1, 1), (3, 3), (9, 4), (None, 4), (0, None)])
def test_as_many_are_asked_for_as_wanted_and_known(count, asked):
    model = tiny()
    drafter = oracle(PROMPT, alone(model, PROMPT, 12))
    generate(Target(model), drafter, PROMPT, 12, [], count=count)
    assert max(drafter.asked, default=None) == asked


def test_logits_are_made_where_they_are_needed_only():
    target = Target(tiny())
    rows, head = [], target.head
    target.head = lambda hidden: (rows.append(len(hidden)), head(hidden))[1]
    found = generate(target, Toy(lambda at, count: [0] * count), PROMPT, 8, [])
    assert rows == [1, *(proposed + 1 for proposed, _ in found.drafts)]


def test_a_recurrent_target_is_refused_before_it_writes():
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=41, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()
    target = Target(tiny())
    target.model = model
    drafter = Toy(lambda at, count: [])
    with pytest.raises(DrafterError, match=r"MambaForCausalLM has layers whose state cannot be taken back.*trainer\.generate"):
        generate(target, drafter, PROMPT, 4, [])
    assert not hasattr(drafter, "asked")


def test_a_cache_without_a_way_back_is_refused(monkeypatch):
    monkeypatch.setattr(transformers.DynamicCache, "is_croppable", False)
    target = Target(tiny())
    with pytest.raises(DrafterError, match="cannot be taken back"):
        generate(target, Toy(lambda at, count: []), PROMPT, 4, [])
    assert len(generate(target, None, PROMPT, 4, []).tokens) == 4


# Sampling from five tokens, each drawn given the last one: the chances of all texts of three can be worked out.

TOKENS, LENGTH, DRAWS = 5, 3, 1000


@pytest.fixture
def chain(monkeypatch):
    """A target that is a table: the next token's logits given the last token."""
    table = torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(5)) * 1.5
    target = Target.__new__(Target)
    target.model, target.head = None, lambda hidden: hidden @ table

    class Read:
        def __init__(self, target):
            pass

        def read(self, ids):
            return torch.nn.functional.one_hot(ids, TOKENS).float()

        def may_forget(self):
            pass

        def forget(self, count):
            pass

    monkeypatch.setattr("trainer.decoding.speculative._Text", Read)
    target.table = table
    return target


def probabilities(logits, temperature, top_p):
    """As transformers' processors and its sampling do it."""
    scores = logits.clone().unsqueeze(0)
    if temperature != 1:
        scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores[0].softmax(-1)


def joint(table, first, temperature, top_p):
    """Each text's probability, by counting all of them."""
    rows = [probabilities(row, temperature, top_p).double() for row in table]
    found = torch.zeros([TOKENS] * LENGTH, dtype=torch.float64)
    for text in itertools.product(range(TOKENS), repeat=LENGTH):
        chance, last = 1.0, first
        for token in text:
            chance, last = chance * rows[last][token], token
        found[text] = chance
    return found


class Sampler(Drafter):
    """Drafts from a table of its own, or by its best guess, with or without saying from what."""

    offsets = 2

    def __init__(self, table, greedy=False, few=False):
        super().__init__()
        self.table, self.greedy, self.few = table, greedy, few

    def start(self, target):
        return None

    def propose(self, memory, target, hidden, ids, count, choose):
        last, tokens, given = ids[-1], [], []
        for _ in range(min(count, 1) if self.few else count):
            token, q = (self.table[last].argmax(), None) if self.greedy else choose(self.table[last])
            tokens.append(token)
            given.append(q)
            last = token
        return Draft(torch.stack(tokens), None if self.greedy else torch.stack(given))


def counted(target, drafter, temperature, top_p):
    generator = torch.Generator().manual_seed(11)
    found = torch.zeros([TOKENS] * LENGTH, dtype=torch.float64)
    ids = torch.tensor([1, 3])
    for _ in range(DRAWS):
        found[tuple(generate(target, drafter, ids, LENGTH, [], temperature, top_p, generator).tokens)] += 1
    return found


def p_value(found, wanted):
    """Of Pearson's χ², texts expected less than five times taken together. 0 where a text came that cannot be."""
    if found[wanted == 0].sum() > 0:
        return 0.0
    expected = wanted * found.sum()
    often = expected >= 5
    a = torch.cat([found[often], found[~often].sum().view(1)])
    b = torch.cat([expected[often], expected[~often].sum().view(1)])
    a, b = a[b > 0], b[b > 0]
    return float(torch.special.gammaincc(torch.tensor((len(a) - 1) / 2).double(), ((a - b) ** 2 / b).sum() / 2))


def drafting(table):
    other = torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(6)) * 2
    return {
        "as the target": Sampler(table),
        "otherwise": Sampler(other),
        "against": Sampler(-table),
        "by its best guess": Sampler(other, greedy=True),
        "by the target's best guess": Sampler(table, greedy=True),
        "one at a time": Sampler(other, few=True),
    }


@pytest.mark.parametrize(
    ("name", "temperature", "top_p"),
    [
        *((name, 1.0, 1.0) for name in drafting(torch.zeros(TOKENS, TOKENS))),
        ("otherwise", 0.7, 0.8),
    ],
)
def test_sampled_texts_are_distributed_as_the_targets(chain, name, temperature, top_p):
    found = counted(chain, drafting(chain.table)[name], temperature, top_p)
    assert p_value(found, joint(chain.table, 3, temperature, top_p)) > 0.01
    assert p_value(found, joint(chain.table, 3, 1.3, 1.0)) < 1e-6


def test_a_rule_that_refills_from_p_is_noticed(chain, monkeypatch):
    right = speculative._sampled

    def from_p(p, draft, generator):
        """Behind a refused token a draw from p, not from what is left of it."""
        found, following = right(p, draft, generator)
        own = torch.multinomial(p[len(found) - 1], 1, generator=generator)
        return [*found[:-1], int(own)], torch.cat([following[:-1], own])

    monkeypatch.setattr(speculative, "_sampled", from_p)
    found = counted(chain, drafting(chain.table)["otherwise"], 1.0, 1.0)
    assert p_value(found, joint(chain.table, 3, 1.0, 1.0)) < 1e-6


def test_a_draft_of_the_targets_own_distribution_is_always_taken(chain):
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        found = generate(chain, Sampler(chain.table), torch.tensor([1]), 9, [], 0.9, 0.95, generator)
        assert all(proposed == taken for proposed, taken in found.drafts)


def test_how_often_a_draft_is_taken_is_what_p_and_q_share(chain):
    other = Sampler(torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(6)) * 2)
    generator = torch.Generator().manual_seed(0)
    results = [generate(chain, other, torch.tensor([2, 3]), 3, [], 1.0, 1.0, generator, count=1) for _ in range(1000)]
    firsts = [result.drafts[0] for result in results]
    p, q = chain.table.softmax(-1).double(), other.table.softmax(-1).double()
    shared = float((p[3] * torch.minimum(p, q).sum(-1)).sum())
    assert abs(sum(taken for _, taken in firsts) / 1000 - shared) < 4 * (shared * (1 - shared) / 1000) ** 0.5


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.7)])
def test_without_a_drafter_the_draws_are_those_of_transformers(temperature, top_p):
    model = tiny()
    torch.manual_seed(7)
    wanted = alone(model, PROMPT, 20, do_sample=True, top_k=0, temperature=temperature, top_p=top_p)
    torch.manual_seed(7)
    assert generate(Target(model), None, PROMPT, 20, [], temperature, top_p).tokens == wanted


def test_a_sampled_text_repeats_with_its_generator():
    target = Target(tiny())
    texts = [
        generate(target, Toy(lambda at, n: [3] * n), PROMPT, 15, [], 1.0, 1.0, torch.Generator().manual_seed(seed)).tokens
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_place_counts_what_was_proposed_what_stood_after_right_ones_and_what_was_taken():
    results = [Result([], [(3, 3), (3, 0), (3, 2)], 0, 0), Result([], [(3, 1), (1, 1), (0, 0)], 0, 0)]
    assert places(results) == [Place(5, 5, 4), Place(4, 3, 2), Place(4, 2, 1)]
    assert results[1].histogram == [1, 2]
    assert places([]) == []
