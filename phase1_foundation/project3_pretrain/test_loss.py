"""Checks of the loss. --interactive prints what each token of the typed text costs SmolLM2, in nats."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.script import ask, run_validation
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.layers import DocumentAttention
from phase1_foundation.project3_pretrain.loss import (
    NO_LOSS,
    Batch,
    chunked_cross_entropy,
    language_model_loss,
)
from phase1_foundation.project3_pretrain.model import Decoder

N, C, V = 50, 12, 37


def random_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(size, C, dtype=dtype, requires_grad=True) for size in (N, V))
    targets = torch.randint(V, (N,))
    targets[[0, 7, 8, 9, 30]] = NO_LOSS
    return hidden, weight, targets


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=NO_LOSS, reduction="sum")


def small_decoder(**changes: object) -> Decoder:
    torch.manual_seed(0)
    shape = {"vocab_size": V, "block_size": 16, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    return Decoder(DecoderConfig(**shape | changes)).double()


def random_batch(documents: bool = False) -> Batch:
    torch.manual_seed(1)
    tokens = torch.randint(V, (3, 16))
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = NO_LOSS
    return Batch(
        tokens,
        targets,
        torch.arange(16).div(6, rounding_mode="floor").expand(3, 16).int() if documents else None,
    )


@pytest.mark.parametrize("rows", [1, 7, 25, 50, 1000, None])
def test_in_chunks_of_any_size_the_loss_and_its_gradients_are_the_plain_ones(rows: int | None):
    hidden, weight, targets = random_case()
    results = []
    for loss in (chunked_cross_entropy(hidden, weight, targets, rows), plain_loss(hidden, weight, targets)):
        results.append([loss, *torch.autograd.grad(3 * loss, (hidden, weight))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_batch_in_which_nothing_is_to_be_predicted_costs_nothing_and_teaches_nothing():
    hidden, weight, targets = random_case()
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(targets, NO_LOSS), 7)
    assert loss == 0
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(loss, (hidden, weight)))


class Largest(TorchDispatchMode):
    """Note the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return result


@pytest.mark.parametrize("learn", [True, False])
def test_no_more_logits_exist_at_once_than_those_of_a_chunk(learn: bool):
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 8, requires_grad=learn), torch.randn(3000, 8, requires_grad=learn)
    targets = torch.randint(3000, (512,))
    with Largest() as largest:
        loss = chunked_cross_entropy(hidden, weight, targets, rows=16)
        if learn:
            loss.backward()
    assert largest.size == 16 * 3000  # of 512 * 3000
    with Largest() as largest:
        plain_loss(hidden, weight, targets)
    assert largest.size == 512 * 3000


def test_a_second_backward_is_refused_rather_than_wrong():
    hidden, weight, targets = random_case()
    loss = chunked_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match=r"backward \(a second one\) must be asked of a new loss"):
        loss.backward()


def test_evaluation_keeps_nothing_for_a_backward_pass():
    hidden, weight, targets = random_case()
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, targets, 7)
    assert not loss.requires_grad
    assert loss.grad_fn is None


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_right_one(frozen: int):
    inputs = list(random_case()[:2])
    targets = random_case()[2]
    inputs[frozen] = inputs[frozen].detach()
    found = torch.autograd.grad(chunked_cross_entropy(*inputs, targets, 7), inputs[1 - frozen])[0]
    expected = torch.autograd.grad(plain_loss(*inputs, targets), inputs[1 - frozen])[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_losses_of_unlikely_tokens_do_not_overflow():
    hidden, weight = torch.tensor([[1000.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([1]))
    assert loss == 2000  # ln of a probability of e^-2000, which float32 cannot hold


def test_under_autocast_the_sum_stays_float32_and_near():
    """bf16 rounds each logit by up to 1/512 of it, so about 0.02 here.

    The average of N errors is far smaller.
    """
    hidden, weight, targets = random_case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, 16)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == grads[0].dtype == grads[1].dtype == torch.float32
    exact = plain_loss(hidden, weight, targets)
    assert abs(loss - exact) / N < 0.02
    for ours, theirs in zip(grads, torch.autograd.grad(exact, (hidden, weight)), strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_in_fp16_the_heads_gradient_does_not_overflow_however_many_tokens_there_are():
    """Each token adds 40 / 2: all 4,096 at once would be 81,920, which fp16 does not have."""
    hidden, weight = torch.full((4096, 8), 40.0), torch.zeros(2, 8, requires_grad=True)
    targets = torch.zeros(4096, dtype=torch.long)
    grads = []
    for rows in (4096, None):
        with torch.autocast("cpu", torch.float16):
            loss = chunked_cross_entropy(hidden, weight, targets, rows)
        grads += torch.autograd.grad(loss, weight)
    assert grads[0].isinf().any()
    torch.testing.assert_close(grads[1], torch.tensor([[-81920.0], [81920.0]]).expand(2, 8))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("documents", [True, False])
def test_the_loss_of_a_batch_is_the_sum_over_its_targets_with_its_gradients(documents: bool, tied: bool):
    model, batch = small_decoder(tied=tied), random_batch(documents)
    backend = DocumentAttention(batch.documents) if documents else None
    total, count = language_model_loss(model, batch)
    assert count == 3 * 15
    expected = F.cross_entropy(
        model(batch.tokens, backend).flatten(0, 1), batch.targets.flatten(), reduction="sum"
    )
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    names, weights = zip(*model.named_parameters(), strict=True)
    found, theirs = (torch.autograd.grad(loss, weights) for loss in (total, expected))
    for name, ours, grad in zip(names, found, theirs, strict=True):
        torch.testing.assert_close(ours, grad, rtol=1e-10, atol=1e-12, msg=name)


def test_the_first_loss_is_ln_of_the_vocabulary():
    total, count = language_model_loss(small_decoder(), random_batch())
    assert abs(float(total.detach() / count) - math.log(V)) < 0.1


def test_a_batch_moves_as_a_whole():
    for documents in (True, False):
        batch = random_batch(documents).to("meta")
        assert all(value is None or value.is_meta for value in vars(batch).values())
        assert (batch.documents is not None) == documents


def interact() -> None:
    """Print the loss of each token of the typed text after its first."""
    from phase1_foundation.project3_pretrain.weights import load_model

    model, tokenizer = load_model("smollm2-135m")
    for text in ask("text> "):
        ids = torch.tensor(tokenizer.encode(text))
        with torch.no_grad():
            losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        for token, loss in zip(ids[1:].tolist(), losses.tolist(), strict=True):
            print(f"{tokenizer.decode([token])!r:16} {loss:6.2f} {'#' * round(4 * loss)}")


if __name__ == "__main__":
    run_validation(__file__, interact)
