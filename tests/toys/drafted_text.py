"""The text that a tiny target writes, decoded with a drafter, and a drafter trained on it."""

from __future__ import annotations

import torch

from trainer.decoding.speculative import Sampling, Strategy, generate, generate_batch
from trainer.drafters import TargetOutput
from trainer.models.heads import captured_hidden, captured_layers, decoder_of

PROMPTS = [torch.tensor([5, 9, 13, 7]), torch.tensor([40, 41]), torch.tensor([3])]
TOKENS = 40  # of the text that is trained


def check_lossless(drafter, target, shape):
    """Assert that a drafter changes no token, alone and in a batch. Return the results of the first
    prompt: (alone, in a batch)."""
    plain = [result.tokens for result in generate_batch(target, None, PROMPTS, 20, [])]
    how = Strategy(shape)
    alone = generate(target, drafter, PROMPTS[0], 20, [], strategy=how)
    assert alone.tokens == plain[0]
    together = generate_batch(target, drafter, PROMPTS, 20, [], strategy=how)
    assert [result.tokens for result in together] == plain
    drawn = Sampling(1.0, 1.0, seed=3)
    sampled = [generate(target, drafter, PROMPTS[0], 20, [], drawn, how).tokens for _ in range(2)]
    assert sampled[0] == sampled[1]
    assert len(sampled[0]) == 20
    return alone, together[0]


def written(target, layers=()):
    """The target's continuation of the first prompt, and its pass over both with their states."""
    prompt, model = PROMPTS[0], target.model
    text = generate(target, None, prompt, TOKENS, []).tokens
    ids = torch.cat([prompt, torch.tensor(text)])
    labels = ids.clone()
    labels[: len(prompt)] = -100
    with (
        torch.no_grad(),
        captured_hidden(model.get_output_embeddings()) as hidden,
        captured_layers(decoder_of(model), layers) as between,
    ):
        model(input_ids=ids[None])
    output = TargetOutput(
        hidden[0],
        ids[None],
        labels[None],
        torch.arange(len(ids))[None],
        hidden[0][:, :0],
        torch.cat(list(between), dim=-1) if layers else None,
    )
    return text, output


def train(drafter, output, target, steps, lr):
    optimizer = torch.optim.Adam(drafter.train().parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        drafter.loss(output, target, 64)[0].backward()
        optimizer.step()


def tokens_of_a_step(drafter, output, target):
    """The expected number of tokens that a step of greedy decoding yields, by the training's
    numbers."""
    numbers = drafter.eval().loss(output, target, 64)[1]
    return 1 + float((numbers[:, 4] / numbers[:, 1]).sum())


def check_it_learns(drafter, target):
    """Assert that, trained on one text, the acceptance in decoding is that of training."""
    text, output = written(target, drafter.layers)
    train(drafter, output, target, 60, 3e-3)
    accepted = tokens_of_a_step(drafter, output, target)
    assert accepted > 3.5  # of 4
    result = generate(target, drafter, PROMPTS[0], TOKENS, [])
    assert result.tokens == text
    assert len(result.drafts) <= -(-(TOKENS - 1) // (accepted - 0.6))
