"""A token is drawn with the chance that it has, and a template is given its options."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jinja2 import Environment

from tasks.reading import DataError
from trainer.evaluation import responses


def test_a_drawn_token_has_the_chance_that_it_should_have():
    scores = torch.tensor([[0.3, -torch.inf, 1.5, -2.0, 0.3]])
    count = 20000
    u = (np.arange(count)[:, None] + 0.5) / count
    drawn = responses.Drawn(u, 4)(
        torch.zeros(count, 4, dtype=torch.int64), scores.expand(count, -1)
    ).argmax(-1)
    share = torch.bincount(drawn, minlength=5) / count
    torch.testing.assert_close(share, scores[0].softmax(-1), rtol=0, atol=1.0 / count)


@pytest.mark.parametrize("u", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_what_can_be_drawn(u):
    scores = torch.tensor([[-torch.inf, 0.1, 0.2, -torch.inf]])
    drawn = responses.Drawn(np.full((1, 1), u), 2)(torch.zeros(1, 2, dtype=torch.int64), scores)
    assert drawn.argmax().item() == (1 if u == 0 else 2)
    assert drawn.isfinite().sum() == 1


@pytest.mark.parametrize("value", [True, False, None, 3, 0.5, "a 'quoted' word"])
def test_a_template_reads_the_options_at_its_head(value):
    built = responses.template_with("{% if x == wanted %}yes{% endif %}", {"x": value})
    assert Environment().from_string(built).render(wanted=value) == "yes"
    both = responses.template_with({"default": "{{ x }}", "tool_use": "{{ y }}"}, {"x": value})
    assert {name: Environment().from_string(text).render() for name, text in both.items()} == {
        "default": str(value),
        "tool_use": "",
    }


def test_options_that_no_template_reads_are_refused():
    assert responses.template_with(None, {}) is None
    with pytest.raises(DataError, match=r"template.x: there is no chat template"):
        responses.template_with(None, {"x": 1})
    with pytest.raises(DataError, match=r"template.y: the chat template never reads 'y'"):
        responses.template_with("{{ x }}", {"x": 1, "y": 2})
