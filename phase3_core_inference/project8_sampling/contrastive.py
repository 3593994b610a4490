r"""Two contrasts: a token against what was said already (search), a model against a weaker one (decoding).

PAPERS
  [1] A Contrastive Framework for Neural Text Generation, Su et al., 2022, arXiv:2202.06417
  [2] Contrastive Decoding: Open-ended Text Generation as Optimization, Li et al., 2022, arXiv:2210.15097

SHAPES
  T  tokens so far    C  n_embd    V  vocab_size    R  rows
"""

import math
from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from phase1_foundation.project3_pretrain.generate import GrowingCache
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project8_sampling.beam_search import check_length, choose_rows


@torch.no_grad()
def contrastive_search(
    model: Decoder,
    prompt: list[int],
    max_new_tokens: int,
    alpha: float = 0.6,
    top_k: int = 4,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yield tokens that are likely and yet unlike all that stands before them; the stop token comes last.

    PAPER: [1] Sec. 3.2, the equation of contrastive search.
    PAPER CONTEXT: A text that repeats itself has tokens whose representations are nearly equal. [1] subtracts
        that likeness from the odds, and needs no randomness.
    INTUITION: Among the few words that fit, take the one that sounds least like an echo.
    IMPLEMENTATION: Score (1 - alpha) p - alpha (largest cosine to an earlier token's last hidden state) of
        the k likeliest tokens; all k run as one batch on copies of the cache, of which the winner's stays.
    WHY: A test computes the same without any cache; alpha = 0 is greedy.
    """
    check_length(model, prompt, max_new_tokens)
    if not 0 <= alpha <= 1 or top_k < 1:
        raise ValueError(f"alpha ({alpha}) must be between 0 and 1, and top_k ({top_k}) at least 1")
    cache, device = GrowingCache(), next(model.parameters()).device
    past = model.hidden(torch.tensor([prompt], device=device), cache)[0]  # (T, C)
    logits = model.head(past[-1])
    for _ in range(max_new_tokens):
        odds, tokens = logits.float().softmax(dim=0).topk(min(top_k, len(logits)))
        choose_rows(cache, [0] * len(tokens))
        hidden = model.hidden(tokens[:, None], cache)[:, 0]  # (k, C)
        echo = (F.normalize(hidden, dim=1) @ F.normalize(past, dim=1).T).amax(dim=1)
        best = int(((1 - alpha) * odds - alpha * echo).argmax())
        token = int(tokens[best])
        yield token
        if token in stop:
            return
        choose_rows(cache, [best])
        past = torch.cat([past, hidden[best : best + 1]])
        logits = model.head(hidden[best])


def contrastive_logits(
    expert: Tensor, amateur: Tensor, alpha: float = 0.1, amateur_temperature: float = 1.0
) -> Tensor:
    """Return log p_expert - log p_amateur (R, V), for the tokens that the expert finds plausible.

    PAPER: the objective and its plausibility constraint, [2] Sec. 3.
    PAPER CONTEXT: What is wrong with likely text, small models have more of: repetition, vagueness. [2] looks
        for what a large model likes better than a small one does.
    INTUITION: Ask the master, and take away what any apprentice would have said.
    IMPLEMENTATION: Plausible are tokens with at least alpha times the odds of the likeliest: without that
        line an absurd token wins on which both disagree wildly. What comes out are logits, for the Sampler:
        with temperature 0 the greedy form of [2], which itself uses beam search.
    WHY: Equal models leave no contrast: all plausible tokens then score 0, a test says.
    """
    expert, amateur = expert.float(), amateur.float() / amateur_temperature
    plausible = expert >= expert.amax(dim=1, keepdim=True) + math.log(alpha)
    contrast = expert.log_softmax(dim=1) - amateur.log_softmax(dim=1)
    return contrast.masked_fill(~plausible, -math.inf)
