r"""Causal self-attention, the only part of a GPT in which tokens see each other.

PAPERS
  [1] Attention Is All You Need, Vaswani et al., 2017, arXiv:1706.03762
  [2] Improving Language Understanding by Generative Pre-Training, Radford et al., 2018 (GPT-1)

SYMBOLS (code = paper)                    SHAPES
  n_embd   = d_model  residual width        B  sequences in the batch
  n_head   = h        heads per block       T  tokens per sequence, T <= block_size
  head_dim = d_k      width of one head     C  n_embd;  H  n_head;  D  head_dim = C / H
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1_foundation.project1_minimal_gpt.config import GPTConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> mixed values, all (B, H, T, D)


class AttentionBackend(Protocol):
    """What is attended to, and what is remembered; the model itself only computes queries, keys and values.

    PAPER: none; this is the seam of the course. The scheduler/kernel split of serving engines is its model.
    PAPER CONTEXT: A KV cache (project 7), paged memory (11), a tree of guesses (12) or a ring of machines
        (24) all change only which keys a query meets. Most codebases fork the model for each of them.
    INTUITION: The model asks "mix these values for me"; the backend decides over which past.
    IMPLEMENTATION: `positions` places the new tokens in their sequences, `attend` mixes. Both see only new
        tokens; a backend that wants the past keeps it. `layer` counts from 0, so one object can serve all
        layers.
    WHY: One model class carries thirty projects; the test gives it a backend and gets the same logits.
    """

    def positions(self, tokens: Tensor) -> Tensor:
        """Return the position of each token of (B, T), in a shape that broadcasts to (B, T)."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q (B, H, T, D) and k, v (B, Hkv, T, D) of the new tokens to mixed values (B, H, T, D)."""
        ...


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    r"""Return softmax(q k^T / sqrt(D), future masked) v, every step written out; shapes (B, H, T, D).

    PAPER: [1] Eq. 1 (Sec. 3.2.1); the mask, Sec. 3.2.3.
    PAPER CONTEXT: [1] masks the decoder's softmax by setting illegal connections to minus infinity, so that
        all T predictions of a sequence train in parallel and none can peek at its own answer.
    INTUITION: Row t of the (T, T) weights says how much token t takes from tokens 0..t; each row sums to 1.
    IMPLEMENTATION: Scaling q instead of the scores touches T * D numbers instead of T * T; adding a mask of
        0 and -inf is one more pass. Dropout falls on the weights, as in GPT-2's code.
    WHY: A dot product of D unit-variance terms has variance D ([1], footnote 4); unscaled, softmax starts
        near one-hot where its gradient vanishes. The test measures that spread with and without the
        division.
    """
    T, D = q.shape[-2:]
    mask = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)  # 0 where allowed
    scores = (q * D**-0.5) @ k.transpose(-2, -1) + mask  # (B, H, T, T)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return weights @ v


class CausalAttention:
    """The backend used when none is given: each token attends to itself and all before it.

    PAPER: [1] Sec. 3.2.3 (masked attention); decoder-only as in [2] Sec. 3.1.
    PAPER CONTEXT: [2] drops the encoder of [1]: one stack reads and writes, trained to predict the next
        token.
    INTUITION: A sentence read left to right, with everything so far in view.
    IMPLEMENTATION: "explicit" is the formula above; "sdpa" is torch's fused kernel, which gives the same
        numbers without ever storing the (T, T) scores (how: project 10).
    WHY: Neither always wins: at context 256 on a CPU the fused kernel does in fp32 and the explicit one in
        bf16 (benchmark.py), so it is a switch.
    """

    def __init__(self, kind: str = "sdpa", dropout: float = 0.0) -> None:
        self.kind, self.dropout = kind, dropout

    def positions(self, tokens: Tensor) -> Tensor:
        """Return 0, 1, ..., T - 1."""
        return torch.arange(tokens.shape[1], device=tokens.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix (B, H, T, D) causally; the same for every layer."""
        if self.kind == "explicit":
            return explicit_attention(q, k, v, self.dropout)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)


class CausalSelfAttention(nn.Module):
    r"""Mix into every position what it finds useful at positions up to its own.

    PAPER: [1] Eq. 1 (Sec. 3.2.1); several heads, Sec. 3.2.2; the mask, Sec. 3.2.3.
    PAPER CONTEXT: Translators were recurrent: one word per step, no parallel training, and
        distant words many steps apart. [1] keeps attention alone: one step apart (Table 1).
    INTUITION: A position asks a question (query). Every earlier position has a label (key)
        and a content (value). The better label and question agree, the more content flows.
    IMPLEMENTATION: One matrix makes q, k, v of all heads at once, where [1] has 3h small
        ones; same numbers, one matmul. Row vectors, so scores are q @ k^T.
    WHY: q.k sums head_dim products of unit variance, so its spread grows as sqrt(head_dim)
        ([1], footnote 4). Dividing by it keeps softmax away from its flat ends.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.fused = {"qkv.weight": 3 * (config.n_embd,)}  # rows of each matrix in it, for Muon

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (t.view(heads).transpose(1, 2) for t in self.qkv(x).split(C, dim=2))  # (B, H, T, D)
        mixed = attend(q, k, v)  # (B, H, T, D)
        return self.proj(mixed.transpose(1, 2).reshape(B, T, C))  # heads side by side
