r"""NF4: four bits per weight, at the levels where a normal distribution has its mass.

PAPERS
  [1] QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers, Pagnoni, Holtzman & Zettlemoyer, 2023,
      arXiv:2305.14314
  [2] 8-bit Optimizers via Block-wise Quantization, Dettmers, Lewis, Shleifer & Zettlemoyer, 2021,
      arXiv:2110.02861

SYMBOLS (code = paper)
  LEVELS      = q_i  the 16 values of the data type [1]
  scales      = c_2  the constants of the first quantization, one per 64 weights [1]
  fine_scales = c_1  those of the second, one per 256 scales [1]

SHAPES
  n  weights of a matrix, row by row;  blocks = n / 64, rounded up
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from phase2_finetuning.project5_lora.blockwise import dequantize, dynamic_levels, quantize, rescale

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale
OUTERMOST = 0.9677083  # probability of the largest level: (1 - 1/32 + 1 - 1/30) / 2, in the authors' 7 digits


def normal_float_levels() -> Tensor:
    """Return the 16 values of NF4, ascending, (16,) fp32.

    PAPER: [1] Sec. 3, Eq. 4 and what follows it; the values themselves, App. E.
    PAPER CONTEXT: Four-bit integers space their 16 levels evenly, four-bit floats by powers of two. But the
        weights of a trained layer are nearly normal ([1] App. F): many small ones, few large ones.
    INTUITION: Place 16 shops so that each serves as many people, not as many kilometres.
    IMPLEMENTATION: Quantiles at evenly spaced probabilities, for the positive half (8 levels) and the
        negative half (7) apart, so that zero is a level of its own; all divided by the largest. A quantile at
        probability 1 is infinite; OUTERMOST is where the authors' code begins instead. Their probabilities
        are fp32, and so are these: the 16 numbers are equal to the bit.
    WHY: On normal weights in blocks of 64 the squared error is 27% below that of four-bit integers (-7 to 7),
        and 24% below that of four-bit floats (a test).
    """
    positive, negative = (torch.linspace(OUTERMOST, 0.5, count + 1)[:-1].double() for count in (8, 7))
    zero = torch.zeros(1, dtype=torch.float64)
    quantiles = torch.cat([-torch.special.ndtri(negative), zero, torch.special.ndtri(positive).flip(0)])
    levels = quantiles.float()
    return levels / levels.max()


LEVELS = normal_float_levels()
SCALE_LEVELS = dynamic_levels()
PAIRS = torch.cartesian_prod(LEVELS, LEVELS).view(torch.float64).flatten()  # the two weights of each byte


@dataclass
class NF4:
    """A matrix in about 4.13 bits per weight.

    PAPER: [1] Sec. 3 (double quantization); blocks, [2] Sec. 2.1.
    PAPER CONTEXT: Small blocks are precise, but a 32-bit scale per 64 weights is half a bit per weight: 4 GB
        in a model of 65 billion. [1] quantizes the scales too, to 8 bits in blocks of 256: 0.127 bits.
    INTUITION: Abbreviate the footnotes as well as the text.
    IMPLEMENTATION: Two codes in a byte, the first in the high half, as in bitsandbytes. Scales are positive:
        their mean is subtracted so that both signs are used, then the dynamic data type of [2] takes them
        ([1] says 8-bit floats; its code takes this one). The padding of an odd matrix is a code for zero.
    WHY: Bytes and weights equal bitsandbytes' (tests), so what was quantized there means the same here.
    """

    shape: tuple[int, ...]
    packed: Tensor  # (n / 2,) uint8, rounded up
    scales: Tensor  # (blocks,): fp32, or uint8 codes of them
    fine_scales: Tensor | None = None  # (blocks / 256,) fp32, rounded up
    offset: Tensor | None = None  # () fp32, the mean of the scales

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight: Tensor, double: bool = True) -> Self:
        """Return the nearest NF4 of a tensor. Raises ValueError where a weight is no finite number."""
        codes, scales = quantize(weight, _on(LEVELS, weight), BLOCK)
        high, low = F.pad(codes, (0, len(codes) % 2), value=7).view(-1, 2).unbind(1)
        packed, shape = high << 4 | low, tuple(weight.shape)
        if not double:
            return cls(shape, packed, scales)
        offset = scales.mean()
        return cls(shape, packed, *quantize(scales - offset, _on(SCALE_LEVELS, weight), SCALE_BLOCK), offset)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix."""
        scales = self.scales
        if self.fine_scales is not None and self.offset is not None:
            levels = _on(SCALE_LEVELS, scales)
            scales = dequantize(scales, self.fine_scales, levels, SCALE_BLOCK) + self.offset
        # one look-up of 8 bytes per packed byte brings two fp32 weights
        both = torch.index_select(_on(PAIRS, scales), 0, self.packed.int()).view(torch.float32)
        n = torch.Size(self.shape).numel()
        return rescale(both[:n], scales, BLOCK).view(self.shape).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is to be kept, by name."""
        named = {name: getattr(self, name) for name in ("packed", "scales", "fine_scales", "offset")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def _on(table: Tensor, like: Tensor) -> Tensor:
    """Return a table where it is needed."""
    return table.to(like.device)
