r"""Cross-entropy over a large vocabulary without ever holding all logits.

PAPERS
  [1] Liger Kernel: Efficient Triton Kernels for LLM Training, Hsu et al., 2024, arXiv:2410.10989
  [2] Cut Your Losses in Large-Vocabulary Language Models, Wijmans et al., 2024, arXiv:2411.09009

SHAPES
  B  sequences    T  tokens per sequence    N  B * T    C  n_embd    V  vocab_size
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from phase1_foundation.project3_pretrain.cpu_kernels import matmul_transposed
from phase1_foundation.project3_pretrain.layers import DocumentAttention

if TYPE_CHECKING:
    from phase1_foundation.project3_pretrain.model import Decoder

NO_LOSS = -100  # target of a token that is not to be predicted, as in torch
CHUNK_LOGITS = 2**24  # logits that exist at once
CPU_ROWS = 256  # tokens whose logits exist at once on a CPU: then they stay in its cache
FP16_ROWS = 1024  # the same in fp16, where 65,504 is the largest sum: a GradScaler comes too late to help


@dataclass
class Batch:
    """What a step learns from.

    PAPER: none; this is the seam between loader and loss.
    PAPER CONTEXT: Fine-tuning (project 4) learns from answers only, packing from several documents per row.
    INTUITION: What to read, what to answer, and where one text ends.
    IMPLEMENTATION: A target of NO_LOSS is not learned; `documents` is None where rows need no mask.
    WHY: Every later phase makes batches of its own, and the trainer does not learn of it.
    """

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64: the next token, or NO_LOSS
    documents: Tensor | None = None  # (B, T) int32: number of the document of each token

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on a device."""
        documents = None if self.documents is None else self.documents.to(device, non_blocking=True)
        tokens, targets = (t.to(device, non_blocking=True) for t in (self.tokens, self.targets))
        return type(self)(tokens, targets, documents)


def language_model_loss(model: "Decoder", batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses of all targets, in nats, and how many there are."""
    hidden = hidden_states(model, batch)  # (B, T, C)
    total = chunked_cross_entropy(hidden.flatten(0, 1), model.head.weight, batch.targets.flatten())
    return total, (batch.targets != NO_LOSS).sum()


def hidden_states(model: "Decoder", batch: Batch) -> Tensor:
    """Return what the head turns into logits, (B, T, C); no token sees another document's."""
    if batch.documents is None:
        return model.hidden(batch.tokens)
    dropout = model.config.dropout if model.training else 0.0
    return model.hidden(batch.tokens, DocumentAttention(batch.documents, dropout))


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int | None = None) -> Tensor:
    """Return the sum over N tokens of -log softmax(hidden @ weight^T)[target], `rows` tokens at a time."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if rows is None:
        most = CPU_ROWS if kind == "cpu" else FP16_ROWS if dtype == torch.float16 else len(targets)
        rows = max(1, min(most, CHUNK_LOGITS // weight.shape[0]))
    with torch.autocast(kind, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, targets, rows, dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Finds the gradients while it has the logits, so that they need not be kept or made a second time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype: torch.dtype
    ) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        matrix, total = weight.to(dtype), torch.zeros((), dtype=exact, device=hidden.device)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grads_hidden, grad_weight = [], None
        for x, y in zip(hidden.to(dtype).split(rows), targets.split(rows), strict=True):
            odds = F.log_softmax(matmul_transposed(x, matrix), dim=-1, dtype=exact)  # (rows, V)
            total += F.nll_loss(odds, y, ignore_index=NO_LOSS, reduction="sum")
            if not (want_hidden or want_weight):
                continue
            kept = (y != NO_LOSS)[:, None]
            ones = torch.ones_like(odds[:, :1])
            slope = odds.exp_().scatter_add_(1, y.clamp(min=0)[:, None], -ones).to(dtype)  # softmax - one-hot
            if want_hidden:
                grads_hidden.append(matmul_transposed(slope, matrix.T) * kept)
            if want_weight:
                grad = matmul_transposed(slope.T, (x * kept).T).to(weight.dtype)
                grad_weight = grad if grad_weight is None else grad_weight.add_(grad)
        ctx.grads = torch.cat(grads_hidden).to(hidden.dtype) if want_hidden else None, grad_weight
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise ValueError(
                "backward (a second one) must be asked of a new loss: the first used up its gradients"
            )
        grads, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.mul_(upstream) for grad in grads), None, None, None
