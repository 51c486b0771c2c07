"""llama.cpp itself decodes with our draft heads: it writes the text that it writes without one, and
drafts the tokens that the drafter drafts, with its probabilities. Models of each family write the
text that transformers writes.

pip brings xllamacpp, whose wheel holds llama.cpp's server; without it the tests are skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from tests.exporting.engines import environments
from tests.exporting.test_engines import drafter_of, model_of
from tests.exporting.test_gguf import CONFIGS, written
from tests.exporting.test_gguf import model_of as model_of_family
from tests.exporting.test_gguf_drafts import CASES, tokenizer
from trainer.decoding import speculative
from trainer.drafters import Target, TargetOutput, TargetUpdate
from trainer.drafters.block import Block
from trainer.exporting import draft_head, gguf_drafts
from trainer.exporting.heads import draft_logits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

XLLAMACPP = "xllamacpp==2026.10.11549"
IDS, COUNT, DEPTH = [5, 40, 41, 17, 60, 61, 17, 80, 33], 24, 4
SHOWN = 6e-4  # the log has three decimals
SAMPLED = 10  # llama.cpp's probabilities are those among so many tokens
DRAFTED = r"draft candidate +0, pos +(\d+): +(\d+) \( *([\d.]+)\)"


@dataclass
class Decoded:
    """What llama.cpp wrote, and for each draft the text before it and (token, probability)."""

    tokens: list[int]
    drafts: list[tuple[list[int], list[tuple[int, float]]]]
    accepted: list[int]
    counted: dict[str, float]


def heads(kind, name, changes, sizes):
    """A target whose greedy text varies, and a drafter for it."""
    model = model_of(kind, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(16)
    return model, drafter_of(name, model, **changes)


def exported(model, drafter, folder, dtype="float32"):
    """Write both as GGUF files."""
    gguf_drafts.check(drafter, model)
    written(model, folder, dtype, tokenizer=tokenizer())
    serving = SimpleNamespace(base=SimpleNamespace(load_tokenizer=tokenizer), ends=[1])
    gguf_drafts.write(draft_head.canonical(drafter, model), folder, dtype, serving)


def decode(folder, kind, count=COUNT, sure=0.0):
    """Decode by llama.cpp; without a draft if `kind` is None."""
    done = start(folder, kind, count, sure)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-2000:]
    tokens, drafts = [], []
    for place, token, probability, chosen in re.findall(rf"{DRAFTED}|next token: +(\d+)", log):
        if chosen:
            tokens.append(int(chosen))
            continue
        if place == "0":
            drafts.append((IDS + tokens, []))
        drafts[-1][1].append((int(token), float(probability)))
    accepted = [int(n) for n in re.findall(r"accepted (\d+)/\d+ draft tokens", log)]
    return Decoded(tokens, drafts, accepted, json.loads((folder / "out.json").read_text()))


def start(folder, kind, count, sure):
    """Run the program."""
    python = environments.python("xllamacpp", (XLLAMACPP,))
    request = {
        "model": str(folder / "model.gguf"),
        "draft": kind and str(folder / gguf_drafts.FILE),
        "kind": kind,
        "ids": IDS,
        "count": count,
        "most": DEPTH,
        "sure": sure,
        "out": str(folder / "out.json"),
    }
    (folder / "request.json").write_text(json.dumps(request))
    return subprocess.run(
        [python, environments.HERE / "drafts_by_llama_cpp.py", folder / "request.json"],
        capture_output=True,
        timeout=600,
        encoding="utf-8",
        errors="replace",
        cwd=folder,
    )


def greedy(model, count):
    """The target's own text, without any cache."""
    ids = list(IDS)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(IDS) :]


def features(model, drafter, ids):
    """The states that a drafter reads of a text."""
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return torch.cat([states.hidden_states[layer][0] for layer in drafter.layers], dim=-1)


def check_drafts(model, drafter, drafts):
    """Compare drafted tokens and their probabilities with the drafter's own."""
    vocabulary = getattr(drafter, "vocabulary", None)
    for ids, drafted in drafts:
        path = torch.tensor([token for token, _ in drafted])
        with torch.no_grad():
            states = features(model, drafter, ids)[:-1]
            rows = draft_logits(drafter, Target(model), states, torch.tensor(ids), path[:-1])
        for row, (token, probability) in zip(rows, drafted, strict=True):
            most = row.topk(SAMPLED)
            names = most.indices if vocabulary is None else vocabulary[most.indices]
            own = dict(zip(names.tolist(), most.values.softmax(0).tolist(), strict=True))
            assert own[token] == pytest.approx(max(own.values()), abs=1e-5)
            assert probability == pytest.approx(own[token], abs=SHOWN)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_drafts_what_the_drafter_does(case, tmp_path):
    model, drafter = heads(*CASES[case])
    exported(model, drafter, tmp_path)
    kind = "dspark" if isinstance(drafter, Block) else "eagle3"
    drafting, plain = decode(tmp_path, kind), decode(tmp_path, None)
    assert drafting.tokens == plain.tokens == greedy(model, COUNT)
    assert len(set(plain.tokens)) > 5
    assert len(drafting.drafts) > COUNT / (DEPTH + 1)
    assert max(len(drafted) for _, drafted in drafting.drafts) == DEPTH
    check_drafts(model, drafter, drafting.drafts)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_each_family_writes_its_text(name, tmp_path):
    model = model_of_family(name)
    with torch.no_grad():
        for layer, parameter in model.named_parameters():
            if re.search("q_proj|k_proj|qkv_proj", layer):
                parameter.mul_(30)  # otherwise each position looks at all alike
    written(model, tmp_path)
    assert decode(tmp_path, None).tokens == greedy(model, COUNT)


def test_a_file_of_8_bits_is_loaded_and_writes_the_same_text(tmp_path):
    model, drafter = heads(*CASES["dspark"])
    exported(model, drafter, tmp_path, "q8_0")
    assert decode(tmp_path, "dspark").tokens == decode(tmp_path, None).tokens


def test_drafts_end_where_the_trained_head_is_not_sure(tmp_path):
    model, drafter = heads(*CASES["dspark"])
    exported(model, drafter, tmp_path)
    full = decode(tmp_path, "dspark").drafts[:-DEPTH]  # the end of the text cuts the last ones
    sure = torch.stack([predicted(model, drafter, *draft) for draft in full])
    middle = sure[:, 0].sort().values[len(sure) // 2 - 1 :][:2].mean()
    kept = (sure > middle).long().cumprod(1).sum(1).tolist()
    assert len(set(kept)) > 1
    cut = decode(tmp_path, "dspark", sure=float(middle)).drafts
    lengths = {tuple(ids): len(drafted) for ids, drafted in cut}
    assert [lengths.get(tuple(ids), 0) for ids, _ in full] == kept


def predicted(model, drafter, ids, drafted):
    """The drafter's own probability that each drafted token is accepted."""
    states = features(model, drafter, ids)[:-1]
    update = TargetUpdate(states.new_zeros(len(states), 1), states, torch.tensor(ids[1:]))
    grown = drafter.grow(drafter.start(Target(model)), Target(model), update)
    before = torch.tensor([ids[-1], *(token for token, _ in drafted[:-1])])
    with torch.no_grad():
        return drafter.acceptance_logits(grown.u, before).sigmoid()


def test_a_head_that_was_not_trained_to_be_sure_says_so(tmp_path):
    model, drafter = heads(*CASES["dflash"])
    exported(model, drafter, tmp_path)
    done = start(tmp_path, "dspark", COUNT, 0.5)
    assert "no confidence head" in done.stdout + done.stderr


@pytest.mark.parametrize("case", ["eagle3 of all tokens", "dspark"])
def test_as_many_drafts_are_accepted_as_by_our_decoder(case, tmp_path):
    model, drafter = heads(*CASES[case])
    train(model, drafter, IDS + greedy(model, COUNT))
    exported(model, drafter, tmp_path)
    kind = "dspark" if isinstance(drafter, Block) else "eagle3"
    drafting = decode(tmp_path, kind)
    own = speculative.generate(Target(model), drafter, torch.tensor(IDS), COUNT, [])
    assert drafting.tokens == own.tokens
    taken = [count for _, count in own.drafts]
    assert drafting.accepted[:-1] == taken[: len(drafting.accepted) - 1]
    assert sum(drafting.accepted) >= COUNT / 2
    assert drafting.counted["draft_n_accepted"] == pytest.approx(sum(taken), abs=1)


def train(model, drafter, ids):
    """Train a drafter on one text until it knows it."""
    torch.manual_seed(0)
    text = torch.tensor([ids])
    with torch.no_grad():
        hidden = model.model(text).last_hidden_state
    output = TargetOutput(
        hidden, text, text.index_fill(1, torch.tensor([0]), -100), torch.arange(len(ids))[None],
        hidden[:, :0], features(model, drafter, ids)[None],
    )  # fmt: skip
    trained = [parameter for parameter in drafter.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        drafter.loss(output, Target(model), 256)[0].backward()
        optimizer.step()
