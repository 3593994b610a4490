r"""HeavyHitterCache: keep the newest tokens and those that drew most attention so far; an experiment.

PAPERS
  [1] H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models,
      Zhang et al., 2023, arXiv:2306.14048

SYMBOLS (code = paper)                                SHAPES
  budget = k  tokens that a head remembers              T  new tokens    n  tokens remembered
  score       attention drawn so far, summed            B, H, Hkv, D  as in mixing.py
"""

import torch
from torch import Tensor

from phase1_foundation.project3_pretrain.config import DecoderConfig


class HeavyHitterCache:
    """Remember `budget` tokens in each head: the newest half, and of the others those looked at most.

    PAPER: [1] Algorithm 1 (greedy eviction by accumulated attention scores), Sec. 4.
    PAPER CONTEXT: [1] finds attention sparse, and few tokens to draw most of it, early and for good; so it
        lets the others go and reports the quality of the full cache at a fifth of its size.
    INTUITION: A desk with room for twenty papers. Yesterday's stay, and of the older ones those that were
        picked up most often.
    IMPLEMENTATION: Heads that share keys vote together. Scores are exact, since weights are written out; no
        fused kernel shows them. Half of the budget is for the newest, as in [1]. Tokens are taken one by
        one, in prompts too, so that what is kept does not depend on how they came; that is slow.
    WHY: A test holds it to full attention under the mask that the rule gives. Whether the rule pays,
        `evaluate.py` measures beside a window of the same size: see the README.
    """

    def __init__(self, config: DecoderConfig, budget: int) -> None:
        if budget < 2:
            raise ValueError(f"budget ({budget}) must be at least 2")
        self.budget, self.recent = budget, budget - budget // 2
        self.length = 0  # tokens seen
        self.past: dict[int, tuple[Tensor, Tensor]] = {}  # of each layer, (B, Hkv, budget + 1, D)
        self.score: dict[int, Tensor] = {}  # of each layer, (B, Hkv, budget + 1)
        self.place: dict[int, Tensor] = {}  # likewise: where in the text the token stands

    def positions(self, tokens: Tensor) -> Tensor:
        """Return where the new tokens stand, (T,)."""
        self.length += tokens.shape[1]
        return torch.arange(self.length - tokens.shape[1], self.length, device=tokens.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Remember k and v (B, Hkv, T, D), forgetting what the rule says; mix for q (B, H, T, D)."""
        B, H, T, D = q.shape
        if layer not in self.past:
            shape = (B, k.shape[1], self.budget + 1)
            self.past[layer] = k.new_zeros(*shape, D), v.new_zeros(*shape, D)
            self.score[layer] = torch.zeros(
                shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
            )
            self.place[layer] = torch.zeros(shape, dtype=torch.long, device=q.device)
        rows = q.unflatten(1, (k.shape[1], -1)) * D**-0.5  # (B, Hkv, G, T, D)
        mixed = torch.empty_like(rows)
        for token in range(T):
            text = self.length - T + token
            new = k[:, :, token], v[:, :, token]  # (B, Hkv, D)
            mixed[..., token, :] = self._step(layer, text, rows[..., token, :], *new)
        return mixed.flatten(1, 2)

    def _step(self, layer: int, text: int, rows: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take the token at place `text`, with queries (B, Hkv, G, D): store, mix, add up scores."""
        (keys, values), score, place = self.past[layer], self.score[layer], self.place[layer]
        if text <= self.budget:
            spot = torch.full_like(place[..., :1], text)
        else:  # all places are taken: the least looked at of those that are not new goes, in each head
            old = place <= text - 1 - self.recent
            spot = score.masked_fill(~old, float("inf")).argmin(dim=-1, keepdim=True)  # (B, Hkv, 1)
        across = spot[..., None].expand(-1, -1, 1, k.shape[-1])
        keys.scatter_(2, across, k[:, :, None])
        values.scatter_(2, across, v[:, :, None])
        score.scatter_(2, spot, 0.0)
        place.scatter_(2, spot, text)
        n = min(text, self.budget) + 1
        weights = (rows @ keys[:, :, :n].mT).softmax(dim=-1)  # (B, Hkv, G, n)
        score[..., :n] += weights.sum(dim=2, dtype=score.dtype)
        return weights @ values[:, :, :n]
