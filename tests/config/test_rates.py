"""The rates that conf/adapter/ recommends."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from trainer.config import compose, rates


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "rate"),
    [
        (["adapter=rosa"], 7e-4),
        (["adapter=sparse"], 2e-4),
        (["adapter=spiel"], 1e-4),
        (["adapter=spiel_ma"], 2e-3),
        (["adapter=lora"], 2e-4),
        (["adapter=rslora"], 1e-4),
        (["adapter=dora"], 2e-4),
        (["adapter=shira"], 3e-4),
        (["adapter=ia3"], 3e-3),
        (["adapter=full"], 1e-5),
        (["adapter=loraplus"], None),
        (["adapter=none", "drafter=medusa"], None),
        (["+experiment=native_chat"], 2e-5),
    ],
)
def test_each_method_has_the_rate_of_its_own_rows(words, rate):
    config = OmegaConf.to_container(compose.compose([*words, "task.path=x"]), resolve=True)
    actual = rates.recommended(config)
    assert (actual and actual[0]) == rate
    if actual:
        assert actual[1]


def test_a_row_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.yaml").write_text("_target_: a.b\n# rate high: no number\n")
    monkeypatch.setattr(rates.schema, "CONF", tmp_path)
    rates._table.cache_clear()
    with pytest.raises(ValueError, match=r"mine\.yaml: a comment opens with `# rate`"):
        rates.recommended({})
    rates._table.cache_clear()
