r"""RingCache: the newest tokens and the very first ones, in constant memory, over texts without an end.

PAPERS
  [1] Efficient Streaming Language Models with Attention Sinks, Xiao et al., 2023, arXiv:2309.17453
  [2] Longformer: The Long-Document Transformer, Beltagy, Peters & Cohan, 2020, arXiv:2004.05150
  [3] RoFormer: Enhanced Transformer with Rotary Position Embedding, Su et al., 2021, arXiv:2104.09864

SYMBOLS                                           SHAPES
  window  newest tokens that are remembered         T  new tokens    n  tokens looked at
  sinks   first tokens that are, besides            B, H, Hkv, D  as in mixing.py
"""

import torch
from torch import Tensor

from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.layers import RotaryEmbedding, rotate
from phase3_core_inference.project7_kv_cache.mixing import mix


class RingCache:
    """Each token attends to the newest `window` tokens, itself among them, and to the first `sinks`.

    PAPER: [2] Sec. 3.1 (sliding window); [1] Sec. 3.1 and 3.2 (why the first tokens, and their positions).
    PAPER CONTEXT: A window alone has constant memory, and collapses as soon as the first token leaves it: [1]
        finds that most heads rest on the first tokens when they look for nothing, whatever these say. With
        four of them kept, models write on for millions of tokens.
    INTUITION: A clock face: the hand overwrites what it wrote a round ago. Four stones beside it stay.
    IMPLEMENTATION: Rotated keys carry their place, so a ring needs no order. As in [1], distances to sinks
        are counted in the cache, not in the text; keys were rotated before they came here, so instead of the
        sinks' keys, the query is turned back, for them alone ([3]: turns add up). Before the places reach
        block_size the whole window is turned back; only differences matter. Learned positions cannot turn.
    WHY: Tests hold it to full attention under a mask, for pieces of any size; `evaluate.py` shows what
        SmolLM2 makes of a window with and without sinks.
    """

    def __init__(self, config: DecoderConfig, window: int, sinks: int = 0) -> None:
        if window < 1:
            raise ValueError(f"window ({window}) must be at least 1")
        if not 0 <= sinks < config.block_size - window:
            rule = f"must be at least 0 and below block_size - window ({config.block_size - window})"
            raise ValueError(f"sinks ({sinks}) {rule}")
        self.window, self.sinks, self.block_size = window, sinks, config.block_size
        self.at_once = config.block_size - window - sinks  # most new tokens that always find places
        rope = RotaryEmbedding(config.head_width, config.block_size, config.rope_theta)
        self.rope = rope if config.positions == "rope" else None
        self.length = 0  # tokens seen
        self.turned = 0  # by which all places are smaller than in the text
        self.past: dict[int, tuple[Tensor, Tensor]] = {}  # of each layer, (B, Hkv, sinks + window, D)

    def positions(self, tokens: Tensor) -> Tensor:
        """Return a place (T,) for each new token; differences are those of the text.

        Raises ValueError for more tokens at once than can be placed.
        """
        T, kept = tokens.shape[1], self.sinks + self.window
        if self.rope is not None and self.length + T - self.turned > self.block_size:
            self._turn_back()
        if self.length + T - self.turned > self.block_size:
            rule = f"must be at most {self.block_size - self.length + self.turned} at once"
            raise ValueError(f"tokens ({T}) {rule}: block_size is {self.block_size}")
        text = torch.arange(self.length, self.length + T, device=tokens.device)
        self.text = text  # (T,) places in the text
        self.surplus = text - self.turned - text.clamp(max=kept - 1)  # distance to sinks that is not counted
        self.length += T
        return text - self.turned

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Remember k and v (B, Hkv, T, D), forgetting what they replace; mix for q (B, H, T, D)."""
        T, begin = q.shape[2], self.length - q.shape[2]
        if layer not in self.past:
            shape = (k.shape[0], k.shape[1], self.sinks + self.window, k.shape[3])
            self.past[layer] = k.new_zeros(shape), v.new_zeros(shape)
        if T == 1:  # what is remembered afterwards is what this token may see
            self._store(layer, k, v)
            n = min(self.length, self.sinks + self.window)
            keys, values = (past[:, :, :n] for past in self.past[layer])
            return self._mix(q, keys, values, None)
        places = self._places(begin)
        keys, values = (past[:, :, : len(places)] for past in self.past[layer])
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)  # (B, Hkv, n, D)
        self._store(layer, k, v)
        return self._mix(q, keys, values, self._bias(torch.cat([places.to(q.device), self.text]), q.dtype))

    def _places(self, length: int) -> Tensor:
        """Return the place in the text of each stored token, once `length` tokens were seen."""
        kept = torch.arange(min(length, self.sinks + self.window))
        if length <= self.sinks + self.window:
            return kept
        offset = (kept - self.sinks - (length - self.sinks)) % self.window  # 0: the oldest of the ring
        return torch.where(kept < self.sinks, kept, length - self.window + offset)

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the new tokens that are still remembered after the last of them."""
        text = self.text
        kept = (text < self.sinks) | (text >= self.length - self.window)
        place = torch.where(text < self.sinks, text, self.sinks + (text - self.sinks) % self.window)
        for past, new in zip(self.past[layer], (k, v), strict=True):
            past[:, :, place[kept]] = new[:, :, kept]

    def _bias(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (1, 1, T, n): 0 for what each new token may see among tokens at these places of the text."""
        text = self.text[:, None]
        seen = (places <= text) & ((places > text - self.window) | (places < self.sinks))
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return bias.masked_fill_(~seen, float("-inf"))[None, None]

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Mix; sinks, which come first among the keys, meet a query that was turned towards them."""
        sinks = min(self.sinks, self.length)
        if self.rope is None or not sinks or self.length <= self.sinks + self.window:
            return mix(q, k, v, bias)
        B, H, T, D = q.shape
        near = self._turn(q, -self.surplus)
        rows, near_rows = (x.reshape(B, k.shape[1], -1, D) for x in (q, near))  # (B, Hkv, G * T, D)
        scores = rows @ k.mT
        scores[..., :sinks] = near_rows @ k[:, :, :sinks].mT
        scores *= D**-0.5
        if bias is not None:
            scores += bias.repeat(1, 1, H // k.shape[1], 1)
        return (scores.softmax(dim=-1) @ v).reshape(B, H, T, D)

    def _turn(self, x: Tensor, by: Tensor) -> Tensor:
        """Turn (B, H, T, D) by so many places (T,), backwards where negative."""
        if self.rope is None:
            raise ValueError("positions (learned) must be rope to be turned")
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        if (self.rope.table.dtype, self.rope.table.device) != (exact, x.device):
            self.rope.to(dtype=exact, device=x.device)
        cos, sin = self.rope(by.abs())
        return rotate(x.transpose(1, 2), (cos, sin * by.sign()[:, None, None])).transpose(1, 2).to(x.dtype)

    def _turn_back(self) -> None:
        """Let the window begin right behind the sinks again, so that places stay below block_size."""
        first = max(self.sinks, self.length - self.window)  # in the text
        back = first - self.turned - self.sinks
        for keys, _ in self.past.values():
            ring = keys[:, :, self.sinks :]
            ring.copy_(self._turn(ring, torch.full((ring.shape[2],), -back, device=keys.device)))
        self.turned += back
