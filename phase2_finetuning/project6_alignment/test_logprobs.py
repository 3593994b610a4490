"""Checks of the log-probabilities of answers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.script import run_validation
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project6_alignment import logprobs
from phase2_finetuning.project6_alignment.logprobs import answer_logprobs, answer_odds

V = 37


def make(dtype: torch.dtype = torch.float64, **changes: Any) -> Decoder:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": V, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = Decoder(DecoderConfig(**shape | changes))
    for weight in model.parameters():
        weight.data *= 3  # odds that are far from uniform
    return model.to(dtype)


def rows(B: int = 5, T: int = 12) -> tuple[Tensor, Tensor]:
    """Return prompts of 1 to 5 tokens with answers of different lengths, filled up behind."""
    draw = torch.Generator().manual_seed(1)
    tokens, mask = torch.randint(V, (B, T), generator=draw), torch.zeros(B, T, dtype=torch.bool)
    for row in range(B):
        mask[row, 1 + row : 6 + 3 * row] = True
    return tokens, mask[:, :T]


def by_hand(model: Decoder, tokens: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same from all logits at once."""
    odds = F.log_softmax(model(tokens)[:, :-1] / temperature, dim=-1)
    found = odds.gather(2, tokens[:, 1:, None])[:, :, 0], -(odds.exp() * odds).sum(dim=-1)
    return F.pad(found[0], (1, 0)) * mask, F.pad(found[1], (1, 0)) * mask


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [10**9, 3 * V])
def test_values_and_gradients_equal_those_of_all_logits_at_once(temperature, chunk, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", chunk)  # 3 tokens at once: then logits are made twice
    model = make()
    tokens, mask = rows()
    weights = torch.randn(2, *mask.shape, dtype=torch.float64)
    grads = []
    for found in (answer_odds(model, tokens, mask, temperature), by_hand(model, tokens, mask, temperature)):
        model.zero_grad()
        (torch.stack(found) * weights).sum().backward()
        grads.append([found[0].detach(), found[1].detach(), *(w.grad.clone() for w in model.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * max(1, theirs.abs().max().item()))


@pytest.mark.parametrize("chunk", [10**9, 3 * V])
def test_without_entropies_values_and_gradients_are_the_same(chunk, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", chunk)
    model = make()
    tokens, mask = rows()
    weights = torch.randn(mask.shape, dtype=torch.float64)
    found = [answer_logprobs(model, tokens, mask, 0.7), answer_odds(model, tokens, mask, 0.7)[0]]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-13)
    grads = [torch.autograd.grad((each * weights).sum(), list(model.parameters())) for each in found]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-11)


def test_filling_changes_nothing_and_what_is_not_asked_for_is_zero():
    model, (tokens, mask) = make(), rows()
    wide = F.pad(tokens, (0, 7), value=V - 1)
    short = answer_logprobs(model, tokens, mask)
    long = answer_logprobs(model, wide, F.pad(mask, (0, 7)))
    torch.testing.assert_close(long[:, :12], short, rtol=0, atol=1e-13)
    assert not long[:, 12:].any()
    assert not short[~mask].any()
    assert (short[mask] < 0).all()


def test_in_bf16_the_head_still_computes_in_fp32():
    model, (tokens, mask) = make(torch.float32), rows()
    seen = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = answer_logprobs(model, tokens, mask)
    assert found.dtype == torch.float32
    assert seen == [torch.float32]


def test_a_mask_that_asks_for_the_first_token_or_has_another_shape_is_refused():
    model, (tokens, mask) = make(), rows()
    mask[2, 0] = True
    with pytest.raises(
        ValueError, match=r"^mask \(shape \(5, 12\)\) must have the shape of tokens \(5, 12\)"
    ):
        answer_logprobs(model, tokens, mask)
    with pytest.raises(
        ValueError, match=r"^mask \(shape \(5, 11\)\) must have the shape of tokens \(5, 12\)"
    ):
        answer_logprobs(model, tokens, mask[:, 1:])


if __name__ == "__main__":
    run_validation(__file__)
