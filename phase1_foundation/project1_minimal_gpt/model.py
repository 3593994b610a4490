r"""GPT: a stack of attention and feed-forward blocks that predicts the next token.

PAPERS
  [1] Attention Is All You Need, Vaswani et al., 2017, arXiv:1706.03762
  [2] Improving Language Understanding by Generative Pre-Training, Radford et al., 2018 (GPT-1)
  [3] Language Models are Unsupervised Multitask Learners, Radford et al., 2019 (GPT-2)
  [4] Layer Normalization, Ba, Kiros & Hinton, 2016, arXiv:1607.06450
  [5] On Layer Normalization in the Transformer Architecture, Xiong et al., 2020, arXiv:2002.04745
  [6] Gaussian Error Linear Units (GELUs), Hendrycks & Gimpel, 2016, arXiv:1606.08415
  [7] Using the Output Embedding to Improve Language Models, Press & Wolf, 2017, arXiv:1608.05859

SYMBOLS (code = paper)                        SHAPES
  n_layer    = N       blocks [1]               B  sequences in the batch
  n_embd     = d_model residual width [1]       T  tokens per sequence, T <= block_size
  4 * n_embd = d_ff    feed-forward width [1]   C  n_embd
  weight     = g, gain; bias = b [4]            V  vocab_size
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1_foundation.project1_minimal_gpt.attention import (
    Attend,
    AttentionBackend,
    CausalAttention,
    CausalSelfAttention,
)
from phase1_foundation.project1_minimal_gpt.config import GPTConfig


class LayerNorm(nn.Module):
    """Bring every token's vector to mean 0 and variance 1, then to a learned gain and bias.

    PAPER: [4] Eq. 4 is the recurrent form; here over the C features of one token, gain and bias as in Sec. 3.
    PAPER CONTEXT: Batch normalization needs statistics of a batch: awkward for sequences of unequal length
        and different in training and use. [4] takes them over the features of one example instead.
    INTUITION: Whatever volume a vector arrives at, the next layer hears it at the same loudness.
    IMPLEMENTATION: (x - mean) / sqrt(var + 1e-5) * weight + bias, variance divided by C and not C - 1;
        torch's fused kernel, which a test holds to this formula.
    WHY: Without it the residual stream grows with depth and the learning rate that suits one layer breaks
        another; `ladder.py` shows the loss with and without.
    """

    def __init__(self, n_embd: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


class FeedForward(nn.Module):
    """Let every token think by itself about what attention brought it.

    PAPER: [1] Sec. 3.3 (Eq. 2, with ReLU); GELU is [6] Eq. of Sec. 2, taken up by [2] Sec. 4.1.
    PAPER CONTEXT: Attention only mixes values linearly. [1] puts a two-layer network, four times as wide
        (512 to 2048, Sec. 3.3), after each; two thirds of a block's weights are here.
    INTUITION: Attention gathers the facts, this looks each combination of facts up.
    IMPLEMENTATION: GELU(x) = x * Phi(x), Phi the normal distribution function, or the approximation by tanh
        of [6] Sec. 2 that GPT-2's code has; they differ by less than 0.001 (a test), but with bf16 on a CPU
        torch computes the exact one in a third of the time.
    WHY: Without the nonlinearity two matrices are one: depth would add nothing.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.approximate = "tanh" if config.gelu == "tanh" else "none"
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    """Communicate, then compute; each adds its result to the residual stream.

    PAPER: [3] Sec. 2.3: normalization moves to the input of each sub-block; analysed by [5] (Pre-LN).
    PAPER CONTEXT: [1] normalizes after the addition and needs a warm-up to survive; [5] shows that its
        gradients near the output are large at initialization, and that Pre-LN's are well-behaved.
    INTUITION: The stream is a shared notebook; a block reads a tidy copy and writes a note in the margin.
    IMPLEMENTATION: x + f(norm(x)), twice. Dropout on what is added ([2] Sec. 4.1: residual dropout).
    WHY: The plain path from output to input carries the gradient through any depth unchanged.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.n_embd, config.bias)
        self.attention = CausalSelfAttention(config)
        self.norm2 = LayerNorm(config.n_embd, config.bias)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.dropout(self.attention(self.norm1(x), attend))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class GPT(nn.Module):
    """Predict, at every position, the next token from all tokens up to it.

    PAPER: [3] Sec. 2.3, on [2] Sec. 3.1 (Eq. 2); weight tying [7]; learned positions [2] Sec. 4.1.
    PAPER CONTEXT: [2] trained such a stack to predict text, then fine-tuned it per task; [3] scaled it and
        found that predicting alone already does the tasks.
    INTUITION: Text in, and for each character a bet on the next one. Training makes the bets pay.
    IMPLEMENTATION: Weights start at normal(0, 0.02), biases at 0; the two matrices of a block that write to
        the residual stream at 0.02 / sqrt(2 * n_layer), because 2 * n_layer notes add up ([3] Sec. 2.3: 1 /
        sqrt(N)). The head is the token embedding transposed ([7]) unless `tied` is off.
    WHY: So initialized, logits are nearly 0 and the first loss is ln V, the loss of knowing nothing; a test
        bounds it.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config.n_embd, config.bias)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        self.initialize()

    def initialize(self) -> None:
        """Draw all weights anew from torch's random generator."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, tokens: Tensor, backend: AttentionBackend | None = None) -> Tensor:
        """Map token ids (B, T) to logits (B, T, V). Raises ValueError for more than block_size tokens."""
        if backend is None:
            if tokens.shape[1] > self.config.block_size:
                raise ValueError(
                    f"tokens ({tokens.shape[1]}) must be at most block_size ({self.config.block_size})"
                )
            backend = CausalAttention(self.config.attention, self.config.dropout if self.training else 0.0)
        x = self.token_embedding(tokens) + self.position_embedding(backend.positions(tokens))  # (B, T, C)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, partial(backend.attend, layer))
        return self.head(self.norm(x))  # (B, T, V)

    def count_parameters(self) -> int:
        """Return the number of weights; tied ones count once."""
        return sum(weight.numel() for weight in self.parameters())

    def flops_per_token(self) -> int:
        """Return the operations to train on one token at full context: three times the forward pass's.

        Forward: 2 per weight of each matrix, and attention's 2 * T * C for scores and as much for mixing,
        halved by causality but counted whole, as its explicit form computes them. Lookups and norms are
        left out (below 1%).
        """
        config = self.config
        matrices = (
            sum(weight.numel() for weight in self.blocks.parameters() if weight.dim() == 2)
            + self.head.weight.numel()
        )
        return 3 * (2 * matrices + config.n_layer * 4 * config.block_size * config.n_embd)
