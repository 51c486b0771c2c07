"""Ranks and densities for a budget, against counts by hand; what cannot be met."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.conftest import sums, write_rows
from tests.studies.test_pieces import make
from trainer.config.errors import ConfigError
from trainer.studies import budget
from trainer.studies.plan import Data, Method

# Layers of base=tiny: two of (q, k, v, o, gate, up, down) with these (in, out).
COMMON = ["base=tiny", "lightning=cpu"]


def study(tmp_path, methods, parameters, **changes):
    rows = write_rows(tmp_path / "rows.jsonl", sums(20))
    data = {"sums": Data(["task=sft", f"task.path={rows}", "task.eval_fraction=0.2"], [], 0, 8, 8)}
    made = {name: Method(words, None, solve, [1e-3]) for name, (words, solve) in methods.items()}
    first = next(iter(made))
    known = {"data": data, "methods": made, "parameters": parameters, "overrides": COMMON}
    return make(tmp_path, **known | {"baseline": first} | changes)


@pytest.mark.long
def test_each_method_gets_the_budget(tmp_path):
    methods = {
        "lora": (["adapter=lora"], True),
        "rslora": (["adapter=rslora"], True),
        "rosa": (["adapter=rosa"], True),
        "sparse": (["adapter=sparse"], True),
        "spiel": (["adapter=spiel"], True),
        "full": (["adapter=full"], False),
        "nine": (["adapter=lora", "adapter.rank=9"], False),
    }
    smallest = {"lora": (["adapter=lora", "adapter.rank=1"], True)}
    probe = budget.solve(study(tmp_path, smallest, None))
    one = probe.counts["lora"]
    solved = budget.solve(study(tmp_path, methods, 8 * one))
    assert solved.solved["lora"] == ["adapter.rank=8"]
    assert solved.counts["lora"] == 8 * one
    assert solved.solved["rosa"][0] == "adapter.rank=4"  # half of the budget
    for name in ("rosa", "sparse", "spiel"):
        assert solved.counts[name] == pytest.approx(8 * one, abs=70)
    assert solved.counts["rslora"] == 8 * one
    small = budget.solve(study(tmp_path, {"shira": (["adapter=shira"], True)}, 2 * one))
    assert small.solved["shira"] == ["adapter.r=2"]
    assert small.counts["shira"] == 2 * one
    assert solved.counts["full"] > 8 * one
    assert solved.solved["nine"] == []
    assert solved.counts["nine"] == 9 * one
    words = budget.words_of(solved, "rosa", solved.data["sums"])
    assert [word for word in words if "density" in word][-1] == solved.solved["rosa"][-1]


def test_a_later_word_replaces_an_earlier_one(tmp_path):
    plain = study(tmp_path, {"lora": (["adapter=lora", "logger=tensorboard"], True)}, None)
    words = budget.words_of(plain, "lora", plain.data["sums"])
    assert [word for word in words if word.startswith("logger")] == ["logger=tensorboard"]
    assert budget.last_of_each(["a=1", "+b=2", "a=3", "b=4"]) == ["a=3", "b=4"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "parameters", "message"),
    [
        (["adapter=lora"], 10, "adapter.rank=1 has .* trained parameters already, more than 10"),
        (["adapter=sparse"], 10**9, "adapter.density=1 has .*, fewer than 1,000,000,000"),
        (["adapter=full"], 999, "adapter=full trains all weights, not parameters=999: set"),
        (
            ["adapter=dora"],
            1000,
            "cannot be met: adapter.r=1 gives .*, and no other value comes nearer",
        ),
        (["adapter=ia3"], 999, "neither rank nor density to solve for parameters=999"),
        (["adapter=none"], None, "adapter=none trains nothing"),
        (["adapter=rosa", "adapter.target_modules=[nothere]"], None, "'nothere', which matches no"),
        (["adapter=lore"], None, "adapter=lore: there is no such choice. Did you mean lora?"),
    ],
)
def test_what_cannot_be_met_is_reported_by_method(tmp_path, words, parameters, message):
    with pytest.raises(ConfigError, match=f"^methods.mine: .*{message}"):
        budget.solve(
            study(tmp_path, {"lora": (["adapter=lora"], False), "mine": (words, True)}, parameters)
        )


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "solve", "message"),
    [
        ("lora", True, "share=0.3 divides .* and it has only adapter.rank: leave share out"),
        ("sparse", True, "share=0.3 divides .* and it has only adapter.density: leave share out"),
        ("rosa", False, "share=0.3 is for methods whose size is solved for parameters: leave it"),
        ("rosa", None, "share=0.3 is for methods whose size is solved for parameters: leave it"),
    ],
)
def test_a_share_without_two_parts_to_solve_is_refused(tmp_path, words, solve, message):
    parameters = None if solve is None else 4000
    whole = study(tmp_path, {"mine": ([f"adapter={words}"], solve is not False)}, parameters)
    method = replace(whole.methods["mine"], share=0.3)
    with pytest.raises(ConfigError, match=message):
        budget.solve(replace(whole, methods={"mine": method}))


@pytest.mark.long
def test_data_without_validation_rows_are_refused(tmp_path):
    plain = study(tmp_path, {"lora": (["adapter=lora"], True)}, None)
    data = plain.data["sums"]
    none = replace(data, overrides=[*data.overrides, "task.eval_fraction=0"])
    with pytest.raises(ConfigError, match=r"^data.sums: there are no validation rows to choose by"):
        budget.solve(replace(plain, data={"sums": none}))
    missing = replace(data, test=["task.eval_path=nothere.jsonl"])
    with pytest.raises(ConfigError, match=r"^data.sums: test: .*nothere\.jsonl"):
        budget.solve(replace(plain, data={"sums": missing}))
    with pytest.raises(ConfigError, match=r"^data.sums: choose=los is no metric of this task"):
        budget.solve(replace(plain, choose="los"))
    with pytest.raises(ConfigError, match=r"^data.sums: choose=exact_match .* \(set .*generate\)"):
        budget.solve(replace(plain, choose="exact_match", mode="max"))
    with pytest.raises(ConfigError, match=r"^data.sums: choose=accuracy is better when higher"):
        budget.solve(replace(plain, choose="accuracy"))
    with pytest.raises(ConfigError, match=r"^data.sums: callbacks.evaluation is null"):
        budget.solve(replace(plain, overrides=[*COMMON, "callbacks.evaluation=null"]))
