r"""The parts of a Llama: RMSNorm, rotary positions, SwiGLU, grouped-query attention; and the document mask.

PAPERS
  [1] Root Mean Square Layer Normalization, Zhang & Sennrich, 2019, arXiv:1910.07467
  [2] RoFormer: Enhanced Transformer with Rotary Position Embedding, Su et al., 2021, arXiv:2104.09864
  [3] GLU Variants Improve Transformer, Shazeer, 2020, arXiv:2002.05202
  [4] GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints,
      Ainslie et al., 2023, arXiv:2305.13245
  [5] Query-Key Normalization for Transformers, Henry et al., 2020, arXiv:2010.04245
  [6] The Llama 3 Herd of Models, Grattafiori et al., 2024, arXiv:2407.21783
  [7] LLaMA: Open and Efficient Foundation Language Models, Touvron et al., 2023, arXiv:2302.13971

SHAPES
  B  sequences in the batch    C  n_embd       H    query heads
  T  tokens per sequence       D  head_dim     Hkv  key and value heads
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1_foundation.project1_minimal_gpt.attention import Attend, CausalAttention
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.cpu_kernels import (
    Linear,
    blocked_attention,
    rms_norm,
    suits_blocked_attention,
)

Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, (T, 1, D) or (B, T, 1, D)


class RMSNorm(nn.Module):
    """Bring every vector to root mean square 1, then to a learned gain.

    PAPER: [1] Eq. 4 (Sec. 4); in a Llama before each sub-layer, [7] Sec. 2.2.
    PAPER CONTEXT: LayerNorm subtracts the mean and divides by the deviation. [1] asks which of the two helps,
        finds that the rescaling does, and leaves the mean out.
    INTUITION: Turn the volume to one level, and leave the melody alone.
    IMPLEMENTATION: x / sqrt(mean(x^2) + eps) * weight, in fp32 even where the products run in bf16.
    WHY: One pass over the data less than LayerNorm, and nothing lost; a test holds it to transformers' Llama.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        return rms_norm(x, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """Say where a token stands by turning its queries and keys.

    PAPER: [2] Sec. 3.2.2; the form without a matrix, Sec. 3.4.2; speeds theta^(-2i/D) as there.
    PAPER CONTEXT: GPT-2 learns a vector per position: nothing relates position 7 to 8, and there is no
        1025th.
    INTUITION: Each pair of features is the hand of a clock. Two hands that were turned by m and n differ by
        m - n: the score knows only how far apart two tokens are.
    IMPLEMENTATION: Feature i is paired with i + D / 2, as in transformers' files, not with its neighbour as
        in [2]; the same up to the order of features. Cosines and sines of all positions are made once, in
        float64.
    WHY: Queries and keys keep their length, no weights are needed; a test shows that shifting all positions
        changes no score.
    """

    table: Tensor

    def __init__(self, head_dim: int, length: int, theta: float = 10_000.0) -> None:
        super().__init__()
        self.head_dim, self.length, self.theta = head_dim, length, theta
        self.register_buffer("table", torch.empty(0), persistent=False)
        self._apply(lambda tensor: tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Make the table anew where the module goes.

        A rounded one (half) or a lost one (meta) is of no use.
        """
        super()._apply(fn, recurse)
        if not self.table.is_meta:
            dtype = torch.float64 if self.table.dtype == torch.float64 else torch.float32
            pair = torch.arange(0, self.head_dim, 2, dtype=torch.float64)
            speed = self.theta ** (-pair / self.head_dim)  # radians per token, from 1 down to about 1 / theta
            angles = torch.arange(self.length, dtype=torch.float64).outer(
                speed
            )  # on the CPU: not all have float64
            table = torch.stack([angles.cos(), angles.sin()], dim=1)  # (length, 2, D / 2)
            self.table = table.to(dtype).to(self.table.device)
        return self

    def forward(self, positions: Tensor) -> Rotation:
        """Map positions (T,) or (B, T) to the rotation of their tokens."""
        cos, sin = self.table[positions].unsqueeze(-3).unbind(-2)  # (T, 1, D / 2) or (B, T, 1, D / 2)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn (B, T, H, D) by its tokens' positions."""
    cos, sin = rotation
    x = x.to(cos.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class SwiGLU(nn.Module):
    """Let every token think by itself, one half of the thought opening and closing the other.

    PAPER: [3] Eq. 6 (Sec. 2); in a Llama, [7] Sec. 2.2.
    PAPER CONTEXT: [3] replaces the first matrix and its nonlinearity by the product of two matrices'
        results, one of them through Swish, and trains many variants on the same budget (Tables 1 and 2).
    INTUITION: One matrix says what could be said, the other how loud.
    IMPLEMENTATION: down(silu(gate(x)) * up(x)); gate and up are one matrix, one product instead of two. Three
        matrices of two thirds the width have as many weights as GPT-2's two.
    WHY: The lower loss in [3] has no theory there ("we attribute their success to divine benevolence").
    """

    def __init__(self, n_embd: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.fused = {"gate_up.weight": (hidden, hidden)}  # rows of each matrix in it, for Muon and for files
        self.gate_up = Linear(n_embd, 2 * hidden, bias=bias)
        self.down = Linear(hidden, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class FeedForward(nn.Module):
    """GPT-2's feed-forward: up to four times the width, GELU, and down again.

    PAPER: project 1's FeedForward has the papers (Vaswani 2017, Sec. 3.3; Hendrycks & Gimpel 2016).
    PAPER CONTEXT: What [3] compares its gated layers with.
    INTUITION: Attention gathers the facts, this looks each combination of facts up.
    IMPLEMENTATION: The tanh form of GELU, always, as GPT-2's weights were trained with it.
    WHY: With it this class loads GPT-2; a test holds it to transformers'.
    """

    def __init__(self, n_embd: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.up = Linear(n_embd, hidden, bias=bias)
        self.down = Linear(hidden, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class GroupedQueryAttention(nn.Module):
    """Causal self-attention in which several query heads share a key and a value head.

    PAPER: [4] Sec. 2.2; normalized queries and keys, [5] Sec. 3, in the form of Qwen3 (RMSNorm with a gain).
    PAPER CONTEXT: While writing, every token reads all keys and values of the past from memory. One shared
        head makes that small but costs quality; [4] shows that a few heads have nearly all of both
        advantages.
    INTUITION: Many readers, each with a question of their own, share a few indexes.
    IMPLEMENTATION: q, k and v come out of one matrix. Queries and keys are turned before the backend sees
        them, so a cache stores turned keys.
    WHY: SmolLM2 has 9 query and 3 key heads: a third of the cache. The backend decides how to share.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.n_head, self.kv_heads, self.head_dim = config.n_head, config.kv_heads, config.head_width
        rows = tuple(heads * self.head_dim for heads in (self.n_head, self.kv_heads, self.kv_heads))
        self.fused = {"qkv.weight": rows}  # rows of each matrix in it, for Muon and for files
        self.qkv = Linear(config.n_embd, sum(rows), bias=config.bias)
        self.proj = Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        B, T, _ = x.shape
        H, Hkv = self.n_head, self.kv_heads
        qk, v = self.qkv(x).view(B, T, -1, self.head_dim).split([H + Hkv, Hkv], dim=2)  # (B, T, H + Hkv, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([H, Hkv], dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k = qk.to(v.dtype).split([H, Hkv], dim=2)
        mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, H, T, D)
        return self.proj(mixed.transpose(1, 2).reshape(B, T, -1))


class GroupedCausalAttention(CausalAttention):
    """Project 1's backend for fewer key heads than query heads.

    PAPER: [4] Fig. 2.
    PAPER CONTEXT: Query head h reads key head h // (H / Hkv).
    INTUITION: The past of the sequence, as in project 1; only the keys are shared.
    IMPLEMENTATION: torch's fused kernel shares keys itself (enable_gqa). For bf16 on a CPU that kernel is
        the slower one (project 1's benchmark), so there the queries are cut into blocks and the formula is
        written out.
    WHY: Copying keys to all heads would undo what [4] gains.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix causally; the same for every layer."""
        if suits_blocked_attention(q, self.dropout):
            return blocked_attention(q, k, v)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout, is_causal=True, enable_gqa=grouped
        )


class DocumentAttention:
    """The backend for several documents in one row: each token attends to its own document's past.

    PAPER: [6] Sec. 3.2: a mask that prevents attention between documents of one sequence.
    PAPER CONTEXT: Rows are filled with documents so that no place is wasted; plain causal attention then
        reads across their borders. [6] found the mask to matter little in standard pretraining, and much
        for long sequences.
    INTUITION: Several letters in one envelope; each is answered for itself.
    IMPLEMENTATION: Equal document numbers and causal; positions start at 0 in each document.
    WHY: A packed row gives the same logits as its documents alone, to rounding; a test compares them.
    """

    def __init__(self, documents: Tensor, dropout: float = 0.0) -> None:
        self.dropout = dropout
        self.allowed = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        place = torch.arange(documents.shape[1], device=documents.device)
        begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        self.place = place - (place * begins).cummax(dim=1).values  # (B, T)
        self.added: Tensor | None = None

    def positions(self, tokens: Tensor) -> Tensor:
        """Return each token's position in its document."""
        return self.place

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix within each document, causally."""
        if suits_blocked_attention(q, self.dropout):
            return blocked_attention(q, k, v, self.bias(q.dtype))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.allowed, dropout_p=self.dropout, enable_gqa=grouped
        )

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Return 0 where a token may attend and minus infinity elsewhere, (B, 1, 1, T, T).

        Made once for all layers.
        """
        if self.added is None or self.added.dtype != dtype:
            shape, device = self.allowed.shape, self.allowed.device
            self.added = torch.zeros(shape, dtype=dtype, device=device).masked_fill_(
                ~self.allowed, float("-inf")
            )[:, None]
        return self.added
