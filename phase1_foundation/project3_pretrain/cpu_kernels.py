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
WRITING = 2**19  # the same where no gradient is wanted
HAS_ONEDNN = torch.backends.mkldnn.is_available()  # which torch knows by an older name
LONGEST = 1024  # tokens whose attention weights are kept for the backward pass


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""
    if x.dtype != weight.dtype:  # torch's fused kernel wants them equal
        x = x.to(torch.promote_types(x.dtype, weight.dtype))
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
    IMPLEMENTATION: Only large products (WORTHWHILE); the gradients are products too, so a Function of its
        own.
    WHY: Values and gradients equal nn.Linear's (a test); `benchmark.py` shows what it gains on your machine.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        learn = torch.is_grad_enabled()
        if _by_onednn(x, self.weight, LEARNING if learn else WRITING) and not torch.is_autocast_enabled("cpu"):
            return (_Linear.apply if learn else _onednn)(x, self.weight, self.bias)
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
    """Mix values causally, a block of queries at a time; `mask` (B, 1, 1, T, T) is added to the scores."""
    with torch.autocast("cpu", enabled=False):
        return _BlockedAttention.apply(q, k, v, mask)


def suits_blocked_attention(q: Tensor, dropout: float) -> bool:
    """Say whether blocked_attention beats torch's fused kernel here; beyond LONGEST it takes much memory."""
    return q.is_cpu and not dropout and 1 < q.shape[2] <= LONGEST and not torch.compiler.is_compiling()


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        T, D = q.shape[-2:]
        q = (q * D**-0.5).unflatten(1, (k.shape[1], -1))  # (B, Hkv, H / Hkv, T, D)
        mixed, kept = torch.empty_like(q), []
        for begin, end in _blocks(q):
            scores = (
                _rows(q, begin, end) @ k[..., :end, :].mT
            )  # of all queries that share keys, one below the other
            scores = scores.unflatten(2, (-1, end - begin))  # (B, Hkv, H / Hkv, rows, end)
            if mask is None:
                future = torch.full((end - begin, end - begin), float("-inf"), dtype=q.dtype).triu_(1)
                scores[..., begin:] += future
            else:
                scores += mask[..., begin:end, :end]
            weights = scores.softmax(dim=-1).flatten(2, 3)
            mixed[..., begin:end, :] = (weights @ v[..., :end, :]).view(*q.shape[:3], -1, D)
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        return mixed.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        grad, D = grad.unflatten(1, (k.shape[1], -1)), q.shape[-1]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for weights, (begin, end) in zip(kept, _blocks(q), strict=True):
            rows = _rows(grad, begin, end)
            grad_v[..., :end, :] += weights.mT @ rows
            slope = rows @ v[..., :end, :].mT
            slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
            grad_q[..., begin:end, :] = (slope @ k[..., :end, :]).view(*q.shape[:3], -1, D)
            grad_k[..., :end, :] += slope.mT @ _rows(q, begin, end)
        return grad_q.mul_(D**-0.5).flatten(1, 2), grad_k, grad_v, None


def _blocks(q: Tensor) -> list[tuple[int, int]]:
    """Return where each block of queries begins and ends; its products should fill a core's own memory."""
    T, size = q.shape[-2], 128 if q.element_size() == 2 else 64
    return [(begin, min(begin + size, T)) for begin in range(0, T, size)]


def _rows(x: Tensor, begin: int, end: int) -> Tensor:
    """Return a block of (B, Hkv, H / Hkv, T, D) as (B, Hkv, H / Hkv * rows, D)."""
    return x[..., begin:end, :].flatten(2, 3)
