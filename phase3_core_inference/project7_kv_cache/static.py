r"""StaticCache: new tokens for all sequences in shapes that never change, so that a step can be recorded.

PAPERS
  [1] Efficiently Scaling Transformer Inference, Pope et al., 2022, arXiv:2211.05102
  [2] PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph Compilation,
      Ansel et al., 2024 (ASPLOS)

SHAPES
  B  sequences, one per slot    T  new tokens of each
  H, Hkv, D, S  as in mixing.py
"""

import torch
from torch import Tensor

from phase3_core_inference.project7_kv_cache.mixing import mix
from phase3_core_inference.project7_kv_cache.slots import SlotCache

LEAST = 128  # places that attention looks at on a GPU, at least; from there it doubles
OPERATIONS = torch.library.Library("llm_course", "FRAGMENT")
SIGNATURE = OPERATIONS.define(
    "mix_seen(Tensor q, Tensor keys, Tensor values, Tensor bias, Tensor seen) -> Tensor"
)


@torch.library.impl(OPERATIONS, "mix_seen", "CPU")
def mix_seen(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
    """Mix over the first `seen` places, a number in a tensor: to a compiler, a step like any other."""
    n = int(seen)
    return mix(q, keys[:, :, :n], values[:, :, :n], bias[..., :n]).contiguous()


@torch.library.register_fake("llm_course::mix_seen", lib=OPERATIONS)
def _(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
    return q.new_empty(q.shape)  # what a compiler needs to know of the result


class StaticCache:
    """The memory of a SlotCache, when each of its sequences gets as many new tokens as the others.

    PAPER: [2] for what a compiler makes of a step; prefill and decode as two phases, [1] Sec. 2.
    PAPER CONTEXT: A step for one token has hundreds of small operations, and asking for them takes as long
        as doing them. A compiler fuses them, and a GPU replays a recorded step (a CUDA graph) as one; both
        want the same shapes and the same memory each time, which a cache that grows does not have.
    INTUITION: A form with fixed boxes can be filled in by a machine.
    IMPLEMENTATION: Lengths are numbers on the device, advanced by the step itself. Attention looks at the
        first `extent` places of every slot and masks those beyond a sequence's end. `reserve` sets extent to
        the next power of two, so that a text meets only a few of them.
    WHY: Prompts of unequal length come in through the SlotCache, unpadded, and go on here; a test holds the
        logits to those without a cache, and a compiled step to an uncompiled one.
    """

    def __init__(self, memory: SlotCache) -> None:
        self.memory = memory
        self.keys, self.values = memory.keys, memory.values
        self.known = list(memory.lengths)
        self.lengths = torch.tensor(memory.lengths, device=memory.device)  # (B,) the same, on the device
        self.rows = torch.arange(memory.slots, device=memory.device)[:, None]  # (B, 1)
        self.extent, self.on_cpu = memory.capacity, memory.device.type == "cpu"

    def synchronize(self) -> None:
        """Take over what the SlotCache read in the meantime."""
        if self.known != self.memory.lengths:
            self.lengths.copy_(torch.tensor(self.memory.lengths))
            self.known = list(self.memory.lengths)

    def reserve(self, tokens: int = 1) -> int:
        """Make room for so many new tokens in each slot; return the extent, which rarely changes.

        From here on they count as remembered. Raises ValueError if they do not fit.
        """
        self.synchronize()
        longest = max(self.memory.lengths) + tokens
        if longest > self.memory.capacity:
            raise ValueError(f"tokens ({longest}) must be at most length ({self.memory.capacity})")
        self.memory.lengths = [length + tokens for length in self.memory.lengths]
        self.known = list(self.memory.lengths)
        if not self.on_cpu:
            self.extent = min(self.memory.capacity, max(LEAST, 1 << (longest - 1).bit_length()))
        return self.extent

    def positions(self, tokens: Tensor) -> Tensor:
        """Return the place (B, T) of each new token of (B, T)."""
        T = tokens.shape[1]
        self.places = self.lengths[:, None] + torch.arange(T, device=tokens.device)  # (B, T)
        self.seen = self.lengths.add_(T).amax()
        every = torch.arange(self.extent, device=tokens.device)
        future = (every > self.places[..., None])[:, None]  # (B, 1, T, extent)
        self.bias = torch.zeros(future.shape, dtype=self.keys[0].dtype, device=tokens.device)
        self.bias = self.bias.masked_fill(future, float("-inf"))
        return self.places

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Remember k and v (B, Hkv, T, D) and mix for q (B, H, T, D)."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self.rows, :, self.places] = k.transpose(1, 2)
        values[self.rows, :, self.places] = v.transpose(1, 2)
        if self.on_cpu:
            return torch.ops.llm_course.mix_seen(q, keys, values, self.bias, self.seen)
        return mix(q, keys[:, :, : self.extent], values[:, :, : self.extent], self.bias)
