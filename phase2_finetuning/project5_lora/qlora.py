r"""QLoRA: the frozen matrices in four bits, gradients through them, adapters beside them.

PAPERS
  [1] QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers, Pagnoni, Holtzman & Zettlemoyer, 2023,
      arXiv:2305.14314

SHAPES
  x (..., in)    y (..., out)    weight (out, in)
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from phase1_foundation.project3_pretrain.cpu_kernels import matmul_transposed
from phase2_finetuning.project5_lora.modules import swap_linears
from phase2_finetuning.project5_lora.nf4 import NF4

BLOCKS = r"blocks\..*"  # what [1] quantizes: every linear layer of the blocks; not embeddings, not the head


def quantize_linears(model: nn.Module, where: str = BLOCKS, double: bool = True) -> list[str]:
    """Put an NF4Linear in the place of each linear layer whose name fits; return the names."""
    return swap_linears(model, lambda _, linear: NF4Linear(linear, double), where)


class NF4Linear(nn.Module):
    """A linear layer that is stored in NF4 and never trained, and lets gradients through.

    PAPER: [1] Eq. 5 and 6 (Sec. 3): Y = X doubleDequant(c1, c2, W) + X L1 L2; this is the first term.
    PAPER CONTEXT: Quantized weights had been for inference: rounding has no useful gradient, so what is
        stored so cannot learn. [1] needs no gradient of the stored weights. It trains a LoRA beside them and
        wants from them only dE/dX, for the layers below.
    INTUITION: A printed book cannot be corrected, but it can be read from both ends, and notes go beside it.
    IMPLEMENTATION: Storage is NF4, arithmetic is x's dtype: the matrix is made anew for each product,
        forward and backward, and dropped. Only the four-bit form is remembered in between; neither x nor the
        matrix is. Two dequantizations per step are the price in time (benchmark.py).
    WHY: The gradient of x is that through the dequantized matrix, to rounding (a test). Saving that matrix
        for the backward pass, as autograd would, holds 32 bits per weight in every layer at once.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, double: bool = True) -> None:
        """Quantize the weights of a linear layer; `double` quantizes the scales as well."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, tensor in NF4.quantize(linear.weight, double).tensors().items():
            self.register_buffer(name, tensor)
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    @property
    def matrix(self) -> NF4:
        """The weights, as they are stored."""
        return NF4((self.out_features, self.in_features), **self._buffers)  # type: ignore[arg-type]

    def dequantize(self) -> Tensor:
        """Return the weights, (out, in) fp32."""
        return self.matrix.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype of x, or of autocast."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            y: Tensor = _FrozenProduct.apply(x.to(dtype), self.matrix)
            return y if self.bias is None else y + self.bias.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device, but stay exact: .to(torch.bfloat16) must not round what scales many weights."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Return the shape, for print(model)."""
        return f"{self.in_features} to {self.out_features}, bias={self.bias is not None}"


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: NF4) -> Tensor:
        ctx.matrix = matrix
        return matmul_transposed(x, matrix.dequantize(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return matmul_transposed(grad, ctx.matrix.dequantize(grad.dtype).T), None
