"""Checks of the noise: how large it is, on what, and that it is gone when it should be."""

import math

import pytest
import torch

from common.script import run_validation
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.loss import NO_LOSS, Batch
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project4_instruction_tuning.config import TuneConfig
from phase2_finetuning.project4_instruction_tuning.neftune import NEFTune, text_lengths
from phase2_finetuning.project4_instruction_tuning.sft import answer_loss

ALPHA, LENGTHS, PADDING, C = 5.0, [3, 40, 9], 12, 64
T = sum(LENGTHS) + PADDING


def a_batch(rows: int = 16) -> Batch:
    """Return rows of three texts and padding."""
    draw = torch.Generator().manual_seed(0)
    numbers = [number for number, size in enumerate(LENGTHS, start=1) for _ in range(size)] + [0] * PADDING
    documents = torch.tensor([numbers] * rows, dtype=torch.int32)
    tokens = torch.randint(1, 17, (rows, T), generator=draw)
    return Batch(tokens, tokens.roll(-1, 1).masked_fill(documents == 0, NO_LOSS), documents)


def a_model(**settings) -> Decoder:
    torch.manual_seed(0)
    shape = {"vocab_size": 17, "block_size": T, "n_layer": 1, "n_head": 2, "n_embd": C}
    return Decoder(DecoderConfig(**shape | settings))


def noise_in(model: Decoder, batch: Batch) -> torch.Tensor:
    """Return what is added to the embeddings while the loss is computed."""
    seen = []
    clean = model.token_embedding(batch.tokens).detach()

    def look(model, batch):
        seen.append(model.token_embedding(batch.tokens).detach())
        return answer_loss(model, batch)

    NEFTune(look, ALPHA)(model, batch)
    return seen[0] - clean


def test_each_text_gets_noise_of_its_own_length():
    batch = a_batch(rows=200)
    noise = noise_in(a_model().train(), batch)
    assert text_lengths(batch)[0].tolist() == [3] * 3 + [40] * 40 + [9] * 9 + [12] * 12
    for number, size in enumerate(LENGTHS, start=1):
        bound = ALPHA / math.sqrt(size * C)
        part = noise[batch.documents == number]
        assert 0.98 * bound < part.abs().max() <= bound * (1 + 1e-6)
        whole = part.view(200, -1).norm(dim=1).mean().item()  # of a text's noise, all tokens together
        assert whole == pytest.approx(ALPHA / math.sqrt(3), rel=0.02)


def test_noise_is_that_of_transformers():
    neftune = pytest.importorskip("transformers.integrations.neftune")
    model, batch = a_model().train(), a_batch()
    batch.documents = None  # theirs knows rows only
    torch.manual_seed(7)
    ours = noise_in(model, batch)
    clean = model.token_embedding(batch.tokens)
    model.token_embedding.neftune_noise_alpha = ALPHA
    torch.manual_seed(7)
    theirs = neftune.neftune_post_forward_hook(model.token_embedding, (batch.tokens,), clean) - clean
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_only_training_is_disturbed():
    model, batch = a_model(), a_batch()
    loss = NEFTune(answer_loss, ALPHA)
    model.eval()
    assert torch.equal(loss(model, batch)[0], answer_loss(model, batch)[0])
    model.train()
    (first, count), (second, _) = loss(model, batch), loss(model, batch)
    assert first != second  # new noise each time
    assert count == answer_loss(model, batch)[1]
    assert torch.equal(NEFTune(answer_loss, 0.0)(model, batch)[0], answer_loss(model, batch)[0])


def test_a_seed_repeats_the_noise():
    model, batch = a_model().train(), a_batch()
    sums = []
    for _ in range(2):
        torch.manual_seed(3)
        sums.append(NEFTune(answer_loss, ALPHA)(model, batch)[0])
    assert torch.equal(*sums)


def test_nothing_stays_on_the_model_even_after_an_error():
    model, batch = a_model().train(), a_batch()

    def fail(model, batch):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        NEFTune(fail, ALPHA)(model, batch)
    NEFTune(answer_loss, ALPHA)(model, batch)
    assert not model.token_embedding._forward_hooks


def test_a_tied_head_gets_no_noise():
    model = a_model()
    assert model.head.weight is model.token_embedding.weight
    weights = []

    def look(model, batch):
        weights.append(model.head.weight.detach().clone())
        return answer_loss(model, batch)

    NEFTune(look, ALPHA)(model.train(), a_batch())
    assert torch.equal(weights[0], model.head.weight)


def test_recomputed_activations_meet_the_same_noise():
    batch, grads = a_batch(), []
    for checkpointing in (False, True):
        model = a_model(checkpointing=checkpointing).train().double()
        torch.manual_seed(1)
        NEFTune(answer_loss, ALPHA)(model, batch)[0].backward()
        grads.append([weight.grad for weight in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_noise_and_compilation_do_not_go_together():
    with pytest.raises(ValueError, match=r"neftune_alpha \(5.0\) must be 0 with --compile"):
        TuneConfig(neftune_alpha=5.0, compile=True).validate_config()


if __name__ == "__main__":
    run_validation(__file__)
