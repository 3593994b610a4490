r"""What torch leaves on the table on a CPU: faster products, RMSNorm and attention with the same results.

PAPERS
  [1] Self-attention Does Not Need O(n^2) Memory, Rabe & Staats, 2021, arXiv:2112.05682
  [2] Root Mean Square Layer Normalization, Zhang & Sennrich, 2019, arXiv:1910.07467
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEARNING = 2**21  # multiplications in a product below which a detour through Python costs more than it gains
WRITING = 2**17  # the same where no gradient is wanted
HAS_ONEDNN = torch.backends.mkldnn.is_available()  # torch knows oneDNN by an older name
LONGEST = 1024  # tokens up to which all attention weights are kept for the backward pass


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    PAPER: [2] Eq. 4.
    PAPER CONTEXT: layers.py has the idea; here is only how fast it runs.
    INTUITION: The gradient of a norm without the mean is that of LayerNorm with a mean of 0, and one term.
    IMPLEMENTATION: Without a gradient it is torch's own function. With one, torch would keep each step of
        the formula; ours keeps the input and one number per token, and borrows LayerNorm's backward kernel.
    WHY: Gradients equal those of the formula in float64 (a test).
    """
    if x.dtype != weight.dtype:  # FSDP rounds the weights, autocast the input; torch wants them equal
        both = torch.promote_types(x.dtype, weight.dtype)
        x, weight = x.to(both), weight.to(both)
    if torch.is_grad_enabled() and x.is_cpu and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, eps)
    return torch.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        zero = torch.zeros_like(scale)
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, zero, scale, weight, None, [True, True, False]
        )
        return grad_x.add_(scale * (grad @ weight).div_(len(weight))[..., None]), grad_weight, None


class Linear(nn.Linear):
    """torch's linear layer, with fp32 products on a CPU by oneDNN instead of MKL.

    PAPER: none; a matter of libraries.
    PAPER CONTEXT: torch brings two libraries of matrix products; for fp32 it asks MKL, which is slow on some
        processors, and for bf16 oneDNN.
    INTUITION: The same sum, by the colleague who is faster at it.
    IMPLEMENTATION: Only products of LEARNING or WRITING multiplications and more. The gradients are products
        too, so there is a Function of its own.
    WHY: Values and gradients equal nn.Linear's (a test); `benchmark.py` shows what it gains on your machine.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        product, least = (_Linear.apply, LEARNING) if torch.is_grad_enabled() else (_onednn, WRITING)
        if _by_onednn(x, self.weight, least) and not torch.is_autocast_enabled("cpu"):
            return product(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_x = matmul_transposed(grad, weight.T) if ctx.needs_input_grad[0] else None
        grad_weight = matmul_transposed(flat.T, x.flatten(0, -2).T) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, flat.sum(0) if ctx.has_bias else None


def matmul_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight^T + bias, by the library that is faster here."""
    return _onednn(x, weight, bias) if _by_onednn(x, weight, WRITING) else F.linear(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _by_onednn(x: Tensor, weight: Tensor, least: int) -> bool:
    return (
        x.numel() * weight.shape[0] >= least
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and HAS_ONEDNN
        and not torch.compiler.is_compiling()
    )


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mix values causally, a block of queries at a time; `mask` (B, 1, 1, T, T) is added to the scores.

    PAPER: [1] Sec. 3: queries in chunks, so that scores never exist for all of them at once.
    PAPER CONTEXT: [1] wants less memory; here it is the time that counts: scores of one block fit in a
        core's cache, and keys behind the block's last query are never multiplied.
    INTUITION: Answer the questions page by page, and read no further than the page.
    IMPLEMENTATION: The formula of project 1's explicit_attention. Queries that share a key head stand one
        below the other, so that each block is one product. Weights are kept for the backward pass, which
        [1] computes again.
    WHY: Values and gradients equal those of the formula (a test). torch's fused kernel took 35 ms of a bf16
        step of the default model on two cores, this one 17 (profiled 2026-11-20, torch 2.15).
    """
    with torch.autocast("cpu", enabled=False):
        return _BlockedAttention.apply(q, k, v, mask)


def suits_blocked_attention(q: Tensor, dropout: float) -> bool:
    """Say whether blocked_attention beats torch's fused kernel here; beyond LONGEST it takes much memory."""
    return q.is_cpu and not dropout and 1 < q.shape[2] <= LONGEST and not torch.compiler.is_compiling()


class _BlockedAttention(torch.autograd.Function):
    """Keeps the weights of each block for the backward pass; N = B * Hkv, G = H / Hkv queries share a key."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        B, H, T, D = q.shape
        G = H // k.shape[1]
        q = (q * D**-0.5).reshape(-1, G, T, D)  # (N, G, T, D)
        k, v = (t.reshape(-1, T, D) for t in (k, v))  # (N, T, D)
        mixed, kept = torch.empty_like(q), []
        for begin, end in _blocks(q):
            scores = _rows(q, begin, end) @ k[:, :end].mT  # all queries that share keys, one below the other
            if mask is None:
                future = torch.full((end - begin, end - begin), float("-inf"), dtype=q.dtype).triu_(1)
                scores.unflatten(1, (G, -1))[..., begin:] += future
            else:
                scores.view(B, -1, G, end - begin, end).add_(mask[..., begin:end, :end])
            weights = scores.softmax(dim=-1)  # (N, G * rows, end)
            mixed[:, :, begin:end] = (weights @ v[:, :end]).unflatten(1, (G, -1))
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        return mixed.view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        (B, _, T, D), G = grad.shape, q.shape[1]
        grad = grad.reshape(q.shape)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for weights, (begin, end) in zip(kept, _blocks(q), strict=True):
            rows = _rows(grad, begin, end)
            _add_product(grad_v[:, :end], weights.mT, rows)
            slope = rows @ v[:, :end].mT
            slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
            grad_q[:, :, begin:end] = (slope @ k[:, :end]).unflatten(1, (G, -1))
            _add_product(grad_k[:, :end], slope.mT, _rows(q, begin, end))
        grad_q, grad_k, grad_v = (t.view(B, -1, T, D) for t in (grad_q.mul_(D**-0.5), grad_k, grad_v))
        return grad_q, grad_k, grad_v, None


def _blocks(q: Tensor) -> list[tuple[int, int]]:
    """Return where each block of queries begins and ends; its products should fill a core's own memory."""
    T, size = q.shape[-2], 128 if q.element_size() == 2 else 64
    return [(begin, min(begin + size, T)) for begin in range(0, T, size)]


def _rows(x: Tensor, begin: int, end: int) -> Tensor:
    """Return a block of (N, G, T, D) as (N, G * rows, D)."""
    return x[:, :, begin:end].flatten(1, 2)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    torch.baddbmm(total, a, b, out=total)
