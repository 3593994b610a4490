r"""How likely a model finds an answer, token by token: what every loss of this project is made of.

PAPERS
  [1] Direct Preference Optimization: Your Language Model is Secretly a Reward Model, Rafailov et al., 2023,
      arXiv:2305.18290 (DPO)
  [2] DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, Shao et al., 2024,
      arXiv:2402.03300 (GRPO)
  [3] Training Deep Nets with Sublinear Memory Cost, Chen et al., 2016, arXiv:1604.06174
  [4] MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention, MiniMax, 2025,
      arXiv:2506.13585

SHAPES
  B  rows: a prompt, its answer, filling    C  n_embd
  T  tokens of the longest row              N  tokens of all answers together    V  vocab_size
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from phase1_foundation.project3_pretrain.loss import CHUNK_LOGITS
from phase1_foundation.project3_pretrain.model import Decoder


def answer_logprobs(model: Decoder, tokens: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each token of the answers, (B, T); 0 outside of the mask."""
    return _answer_odds(model, tokens, mask, temperature, entropy=False)[0]


def answer_odds(
    model: Decoder, tokens: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Return log-probabilities and entropies, in nats, of the tokens that the mask (B, T) names, else 0.

    PAPER: log pi(y | x) of [1] Eq. 7 is the sum over a row; the ratios of [2] Eq. 3 are of single entries.
    PAPER CONTEXT: Supervised training needs the sum over all tokens and nothing else. Here each answer's,
        or each token's, enters a formula of its own before anything is added up.
    INTUITION: Reread the answer and note at each word how much it was expected.
    IMPLEMENTATION: Entry t belongs to tokens[b, t], given those before it, so it stands where a rollout has
        its own. Rows are filled up behind, where causal attention never looks, so there is no padding mask.
        Only the answers' tokens meet the head, in chunks whose logits are made again on the way back ([3]),
        and never in 16 bits: [4] found that to part the odds of trainer and writer.
    WHY: Logits are the largest tensor: 32 rows of 512 tokens and 49,152 words are 3.2 GB, and softmax keeps
        as much again. A test holds values and gradients to those of all logits at once.
    """
    logprobs, entropies = _answer_odds(model, tokens, mask, temperature, entropy=True)
    return logprobs, entropies


def _answer_odds(
    model: Decoder, tokens: Tensor, mask: Tensor, temperature: float, entropy: bool
) -> list[Tensor]:
    if tokens.shape != mask.shape or bool(mask[:, 0].any()):
        rule = (
            f"must have the shape of tokens {tuple(tokens.shape)} and leave out the first: nothing is before"
        )
        raise ValueError(f"mask (shape {tuple(mask.shape)}) {rule}")
    hidden = model.hidden(tokens[:, :-1])[mask[:, 1:]]  # (N, C)
    rows = max(1, CHUNK_LOGITS // model.config.vocab_size)
    judge = partial(_judge, model, temperature=temperature, entropy=entropy)
    if torch.is_grad_enabled() and len(hidden) > rows:
        judge = partial(checkpoint, judge, use_reentrant=False)
    pairs = zip(hidden.split(rows), tokens[mask].split(rows), strict=True)
    found = torch.cat([judge(x, y) for x, y in pairs], dim=1)  # (1 or 2, N)
    return [found.new_zeros(mask.shape).masked_scatter(mask, values) for values in found]


def _judge(model: Decoder, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Tensor:
    """Map (N, C) and targets (N,) to log-probabilities and, if asked, entropies: (1 or 2, N)."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = model.head(hidden.to(model.head.weight.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if not entropy:
        return -F.cross_entropy(logits, targets, reduction="none")[None]
    odds = F.log_softmax(logits, dim=-1)
    return torch.stack([odds.gather(1, targets[:, None])[:, 0], -(odds.exp() * odds).sum(dim=-1)])
