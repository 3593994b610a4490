r"""AdamW with its two running averages in 8 bits each.

PAPERS
  [1] 8-bit Optimizers via Block-wise Quantization, Dettmers, Lewis, Shleifer & Zettlemoyer, 2021,
      arXiv:2110.02861
  [2] Adam: A Method for Stochastic Optimization, Kingma & Ba, 2014, arXiv:1412.6980
  [3] Decoupled Weight Decay Regularization, Loshchilov & Hutter, 2017, arXiv:1711.05101 (AdamW)

SYMBOLS (code = paper)
  mean = m, square = v  running averages of the gradient and of its square [2]
  BLOCK = B             numbers that share a scale [1]
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from phase2_finetuning.project5_lora.blockwise import dequantize, dynamic_levels, quantize

BLOCK = 256  # numbers that share a scale; [1] has 2048, bitsandbytes by now 256
SMALL = 4096  # weights that have fewer numbers keep their averages in fp32, as in bitsandbytes
LEVELS = {"mean": dynamic_levels(), "square": dynamic_levels(signed=False)}


class AdamW8bit(Optimizer):
    """AdamW that remembers a quarter of what AdamW remembers.

    PAPER: [1] Sec. 2; the step, [2] Algorithm 1 with the decay of [3].
    PAPER CONTEXT: Adam keeps two fp32 numbers per weight, more than the weight itself; factoring them
        (Adafactor) changes the method. [1] keeps Adam and its settings, and stores the averages block-wise in
        8 bits.
    INTUITION: Work in full precision, file the notes in shorthand.
    IMPLEMENTATION: For one weight at a time: dequantize both averages, take Adam's step in fp32, quantize
        them again. Squares are never negative, so they have levels of their own. Departs from [1] in one
        thing: a square is not rounded down to zero, but up to the smallest level.
    WHY: 8 bytes per weight become 2.03, and where no square is that small all equals bitsandbytes to the bit.
        With gradients that differ a thousandfold within a block, a square that was rounded to zero made the
        next step of its weight hundreds of times lr; rounded up, steps stay below 3 lr (tests).
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closures here
        """Update all weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        """Move one weight: recall, Adam's step, remember."""
        state, grad = self.state[weight], weight.grad.float()  # type: ignore[union-attr]
        state["step"] = t = state.get("step", 0) + 1
        mean, square = (self._recall(weight, name) for name in LEVELS)
        (beta1, beta2), lr = group["betas"], group["lr"]
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        roots = (square.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])
        moved = weight.float() * (1 - lr * group["weight_decay"])
        weight.copy_(moved.addcdiv_(mean, roots, value=-lr / (1 - beta1**t)))
        self._remember(weight, "mean", mean)
        self._remember(weight, "square", square)

    def _recall(self, weight: Tensor, name: str) -> Tensor:
        """Return an average in fp32, in the shape of its weight; zeros at first."""
        state = self.state[weight]
        if name not in state:
            return torch.zeros_like(weight, dtype=torch.float32)
        if state[name].dtype != torch.uint8:
            return state[name]
        levels = LEVELS[name].to(weight.device)
        return dequantize(state[name], state[f"{name}_scales"], levels, BLOCK).view(weight.shape)

    def _remember(self, weight: Tensor, name: str, average: Tensor) -> None:
        """Keep an average, in 8 bits if it is not small."""
        state = self.state[weight]
        if weight.numel() < SMALL:
            state[name] = average
            return
        codes, state[f"{name}_scales"] = quantize(average, LEVELS[name].to(weight.device), BLOCK)
        state[name] = codes.clamp_(min=1) if name == "square" else codes  # level 0 is zero, and Adam divides

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state_dict(), to the bit."""
        super().load_state_dict(state_dict)  # which casts every tensor to its weight's dtype, bytes to fp32
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, weight in zip(numbers, weights, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[weight][name] = value.to(weight.device, copy=True)
