r"""Decoder: GPT-2 or the Llama family by configuration, in one class.

PAPERS
  [1] Language Models are Unsupervised Multitask Learners, Radford et al., 2019 (GPT-2)
  [2] LLaMA: Open and Efficient Foundation Language Models, Touvron et al., 2023, arXiv:2302.13971
  [3] Training Deep Nets with Sublinear Memory Cost, Chen et al., 2016, arXiv:1604.06174

SHAPES
  B  sequences in the batch    C  n_embd
  T  tokens per sequence       V  vocab_size
"""

import math
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from phase1_foundation.project1_minimal_gpt.attention import Attend, AttentionBackend
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.cpu_kernels import Linear
from phase1_foundation.project3_pretrain.layers import (
    FeedForward,
    GroupedCausalAttention,
    GroupedQueryAttention,
    RMSNorm,
    RotaryEmbedding,
    Rotation,
    SwiGLU,
)


def make_norm(config: DecoderConfig) -> nn.Module:
    """Return the norm of the residual stream."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


def make_embedding(rows: int, width: int) -> nn.Embedding:
    """Return a table without values; torch's own constructor would draw them, only to be drawn anew."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Block(nn.Module):
    """Attention, then feed-forward; each adds its result to the residual stream.

    PAPER: [1] Sec. 2.3 (normalization before each sub-layer); [2] Sec. 2.2.
    PAPER CONTEXT: The same skeleton carries both families; [2] changes the norm, the positions and the
        feed-forward.
    INTUITION: Communicate, then compute.
    IMPLEMENTATION: As project 1's Block; here the configuration chooses the parts.
    WHY: Whatever a later phase changes (LoRA, quantized or sharded layers), it changes inside these parts.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm1 = make_norm(config)
        self.attention = GroupedQueryAttention(config)
        self.norm2 = make_norm(config)
        kind = SwiGLU if config.mlp == "swiglu" else FeedForward
        self.feed_forward = kind(config.n_embd, config.mlp_width, config.bias)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.dropout(self.attention(self.norm1(x), rotation, attend))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class Decoder(nn.Module):
    """Predict, at every position, the next token from all tokens up to it.

    PAPER: [1] Sec. 2.3 and [2] Sec. 2.2, by configuration; recomputing activations, [3] Sec. 4.
    PAPER CONTEXT: [2] gathers what had proved itself since [1] (RMSNorm, SwiGLU, rotary positions), and
        nearly every open model since has had that shape.
    INTUITION: One machine with exchangeable parts, so that GPT-2's and SmolLM2's weights run in the same
        code.
    IMPLEMENTATION: `hidden` stops before the head, so that the loss can make logits in chunks. With
        `checkpointing` a block's insides are dropped and made again when the gradient comes by ([3]).
    WHY: Logits and gradients equal those of transformers' GPT2, Llama and Qwen3 in float64 (tests).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = make_embedding(config.vocab_size, config.n_embd)
        self.position_embedding = self.rope = None
        if config.positions == "learned":
            self.position_embedding = make_embedding(config.block_size, config.n_embd)
        else:
            self.rope = RotaryEmbedding(config.head_width, config.block_size, config.rope_theta)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        self.initialize()

    def tie(self) -> None:
        """Make the head the token embedding, if it is to be; to_empty() and assigned weights part them."""
        if self.config.tied:
            self.head.weight = self.token_embedding.weight

    @classmethod
    def from_weights(cls, config: DecoderConfig, weights: dict[str, Tensor]) -> Self:
        """Return a Decoder around these tensors; no random weights are drawn, no memory is used twice."""
        with torch.device("meta"):
            model = cls(config)
        if config.tied:
            weights = weights | {"head.weight": weights["token_embedding.weight"]}
        model.load_state_dict(weights, assign=True)
        model.tie()
        if model.rope is not None:
            model.rope = RotaryEmbedding(config.head_width, config.block_size, config.rope_theta)
        return model

    def initialize(self) -> None:
        """Draw all weights anew from torch's random generator, as GPT-2 does."""
        if self.head.weight.is_meta:  # a shape without memory
            return
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
            else:
                nn.init.ones_(weight)

    def forward(self, tokens: Tensor, backend: AttentionBackend | None = None) -> Tensor:
        """Map token ids (B, T) to logits (B, T, V). Raises ValueError for more than block_size tokens."""
        return self.head(self.hidden(tokens, backend))

    def hidden(self, tokens: Tensor, backend: AttentionBackend | None = None) -> Tensor:
        """Map token ids (B, T) to what the head turns into logits, (B, T, C)."""
        config = self.config
        if backend is None:
            if tokens.shape[1] > config.block_size:
                raise ValueError(
                    f"tokens ({tokens.shape[1]}) must be at most block_size ({config.block_size})"
                )
            backend = GroupedCausalAttention(dropout=config.dropout if self.training else 0.0)
        positions = backend.positions(tokens)
        x = self.token_embedding(tokens)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        rotation = self.rope(positions) if self.rope is not None else None
        x = self.dropout(x)
        recompute = config.checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            attend = partial(backend.attend, layer)
            if recompute:
                x = checkpoint(block, x, rotation, attend, use_reentrant=False)
            else:
                x = block(x, rotation, attend)
        return self.norm(x)

    def count_parameters(self) -> int:
        """Return the number of weights; tied ones count once."""
        return sum(weight.numel() for weight in self.parameters())

    def flops_per_token(self) -> int:
        """Return the operations to train on one token at full context: three times the forward pass's."""
        config = self.config
        matrices = (
            sum(weight.numel() for weight in self.blocks.parameters() if weight.dim() == 2)
            + self.head.weight.numel()
        )
        attention = config.n_layer * 4 * config.block_size * config.n_head * config.head_width
        return 3 * (2 * matrices + attention)
