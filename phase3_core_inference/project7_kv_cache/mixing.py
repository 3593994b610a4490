r"""Attention of new tokens over a remembered past: the arithmetic that all caches of this project share.

PAPERS
  [1] Fast Transformer Decoding: One Write-Head is All You Need, Shazeer, 2019, arXiv:1911.02150
  [2] GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints,
      Ainslie et al., 2023, arXiv:2305.13245
  [3] Self-attention Does Not Need O(n^2) Memory, Rabe & Staats, 2021, arXiv:2112.05682

SHAPES
  B  sequences                       H    query heads               D  head_dim
  T  new tokens of each              Hkv  key and value heads       W  keys that the bias is about,
  S  tokens to look at, the new      G    query heads per key          the last ones of S
     ones are the last of them            head = H / Hkv
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

BLOCK = 128  # queries whose scores are held at once: their products should fill a core's own memory
SHORT = 512  # keys up to which torch's fused kernel is the faster one for 16-bit numbers on a CPU


def mix(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mix values (B, Hkv, S, D) for queries (B, H, T, D); `bias` (B|1, 1, T|1, W) is added to scores.

    PAPER: [1] Sec. 3: one head of keys for all queries; [2] Sec. 2.2: one for each group of them.
    PAPER CONTEXT: Writing reads all keys and values for every token and does little with each: [1] finds
        that this reading, not the arithmetic, takes the time, and lets all heads share what is read.
    INTUITION: Several people have a question for one book: leaf through it once, for all of them.
    IMPLEMENTATION: The G heads of a group become rows of one matrix, (B, Hkv, G * T, D): no key is copied,
        none is read twice. In 16 bits on a CPU torch's fused kernel falls behind where keys are many; there
        the formula is written out.
    WHY: With torch's own switch for shared keys, enable_gqa, one token over 250 takes four times as long on
        a CPU in bf16 (benchmark.py).
    """
    B, H, T, D = q.shape
    rows = q.reshape(B, k.shape[1], -1, D)  # (B, Hkv, G * T, D)
    if bias is not None and bias.shape[2] > 1:  # a row of it for each row of queries
        bias = bias.repeat(1, 1, H // k.shape[1], 1)
    if q.is_cpu and q.element_size() == 2 and B * k.shape[2] > SHORT:
        scores = (rows * D**-0.5) @ k.mT  # (B, Hkv, G * T, S)
        if bias is not None:
            scores[..., -bias.shape[3] :] += bias
        mixed = scores.softmax(dim=-1) @ v
    else:
        if bias is not None:
            bias = F.pad(bias, (k.shape[2] - bias.shape[3], 0))
        mixed = F.scaled_dot_product_attention(rows, k, v, attn_mask=bias)
    return mixed.reshape(B, H, T, D)


def mix_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mix for queries (B, H, T, D) of the newest T among S tokens: each sees all tokens up to itself.

    PAPER: [3]: attention a block of queries at a time, with the same result.
    PAPER CONTEXT: A prompt that comes in pieces meets keys of earlier pieces: a triangle behind a rectangle.
        Libraries do not agree on what "causal" means then: torch's is_causal puts the triangle at the first
        key, which shows a later piece the wrong past.
    INTUITION: Whoever comes late still hears all that was said before.
    IMPLEMENTATION: On a CPU a block of queries takes the keys up to its last one, so that nearly half of
        the scores of a first piece are never computed. On a GPU torch's kernel, told where the triangle is.
    WHY: A test cuts prompts anywhere and gets the same logits.
    """
    T, S = q.shape[2], k.shape[2]
    if T == 1:
        return mix(q, k, v)
    if not q.is_cpu:
        place = {"is_causal": True} if T == S else {"attn_mask": causal_lower_right(T, S)}
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **place)
    mixed = torch.empty_like(q)
    for begin in range(0, T, BLOCK):
        end = min(begin + BLOCK, T)
        seen = S - T + end
        bias = future_bias(end - begin, q)
        mixed[:, :, begin:end] = mix(q[:, :, begin:end], k[:, :, :seen], v[:, :, :seen], bias)
    return mixed


def future_bias(tokens: int, like: Tensor) -> Tensor:
    """Return (1, 1, tokens, tokens): minus infinity where the key comes after the query, else 0."""
    bias = torch.full((tokens, tokens), float("-inf"), dtype=like.dtype, device=like.device)
    return bias.triu_(1)[None, None]


def length_bias(lengths: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return (B, 1, 1, width): minus infinity at the places from lengths (B,) on, else 0."""
    beyond = torch.arange(width, device=lengths.device) >= lengths[:, None]  # (B, width)
    return torch.zeros(beyond.shape, dtype=dtype, device=lengths.device).masked_fill_(beyond, float("-inf"))[
        :, None, None
    ]
