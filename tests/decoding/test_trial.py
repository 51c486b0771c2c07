"""A short text before training shows a target that a drafter cannot decode."""

from __future__ import annotations

import pytest
import torch

from tests.toys.heads import make
from tests.toys.mtp_bases import tiny_of
from tests.toys.speculative import made, tiny
from trainer.decoding import speculative, trial
from trainer.drafters import DrafterError


@pytest.mark.parametrize("name", ["eagle3", "kangaroo", "uno"])
def test_a_drafter_that_can_decode_passes_and_draws_nothing(name):
    model = tiny().train()
    drafter, state = made(name, model), torch.get_rng_state()
    trial.check_decoding(model, drafter)
    assert model.training
    assert not drafter.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_head_of_a_target_that_only_engines_roll_back_is_trained():
    model = tiny_of("qwen3_5_text")
    trial.check_decoding(model, make("shared", model, offsets=2))


def test_a_layer_that_reads_the_cache_again_is_refused_before_training():
    model = tiny()
    drafter = made("uno", model, "drafter.target_modules=[v_proj]")
    layer = model.model.layers[0].self_attn.v_proj

    def read_all(_, arguments):  # as a projection of compressed keys of the whole cache
        return (torch.cat([arguments[0][..., :1, :], arguments[0]], dim=-2),)

    with layer.register_forward_pre_hook(read_all) as hook:
        del hook
        with pytest.raises(DrafterError):
            trial.check_decoding(model, drafter)


def test_an_error_of_a_pass_is_one_line_that_names_the_drafter(monkeypatch):
    model = tiny()
    drafter = made("eagle3", model)
    monkeypatch.setattr(drafter, "grow", lambda *_: torch.arange(5, 3))
    expected = r"Eagle3 cannot decode with LlamaForCausalLM \(RuntimeError: .*\): set another"
    with pytest.raises(DrafterError, match=expected):
        trial.check_decoding(model, drafter)


def test_another_text_with_a_drafter_is_refused(monkeypatch):
    model, plain = tiny(), speculative.generate

    def altered(target, drafter, *more):
        result = plain(target, drafter, *more)
        return result if drafter is None else type(result)([0, *result.tokens[1:]], [], 0.0, 0.0)

    monkeypatch.setattr(speculative, "generate", altered)
    drafter = made("eagle3", model)
    with pytest.raises(DrafterError, match="writes another text with a drafter"):
        trial.check_decoding(model, drafter)
    trial.check_decoding(model.bfloat16(), drafter.bfloat16())
