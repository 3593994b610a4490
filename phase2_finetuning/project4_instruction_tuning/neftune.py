r"""NEFTune: noise on the embeddings while training, so that answers are learned and not their exact words.

PAPERS
  [1] NEFTune: Noisy Embeddings Improve Instruction Finetuning, Jain et al., 2023, arXiv:2310.05914

SYMBOLS (code = paper)                    SHAPES
  alpha   = alpha  size of the noise        B  rows
  lengths = L      tokens of a text         T  tokens of a row
  n_embd  = d      width of an embedding    C  n_embd
"""

import torch
from torch import Tensor, nn

from phase1_foundation.project3_pretrain.accumulation import Loss
from phase1_foundation.project3_pretrain.loss import Batch
from phase1_foundation.project3_pretrain.model import Decoder


class NEFTune:
    r"""A loss that is computed on noisy embeddings while the model trains, and on the true ones otherwise.

    PAPER: [1] Algorithm 1: uniform noise from -1 to 1, times alpha / sqrt(L d), on each token's embedding.
    PAPER CONTEXT: Instruction sets are small, and a model soon knows their wording by heart. [1] reports
        longer and better liked answers (LLaMA-2-7B on Alpaca: 29.8% to 64.7% in AlpacaEval).
    INTUITION: Read the question through frosted glass: what can still be made out is the meaning.
    IMPLEMENTATION: A hook on the token embedding, there only while this loss is computed in training. The
        head of a tied model uses the table itself and gets no noise. L is the length of each text, not that
        of the row, which transformers takes. Usual alphas are 5 to 15.
    WHY: The whole text's noise has the same expected length, alpha / sqrt(3), however long the text is (a
        test); noise that stayed on in evaluation would blur every number that the run reports (another).
    """

    def __init__(self, loss: Loss, alpha: float) -> None:
        self.loss, self.alpha = loss, alpha

    def __call__(self, model: Decoder, batch: Batch) -> tuple[Tensor, Tensor | int]:
        """Return the sum of the losses, in nats, and how many there are."""
        if not (model.training and self.alpha):
            return self.loss(model, batch)

        def disturb(_module: nn.Module, _inputs: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
            noise = torch.empty_like(embeddings).uniform_(-1, 1)  # (B, T, C)
            sizes = text_lengths(batch) * embeddings.shape[-1]  # (B, T): L d
            return embeddings + noise * (self.alpha / sizes.sqrt())[..., None]

        hook = model.token_embedding.register_forward_hook(disturb)
        try:
            return self.loss(model, batch)
        finally:
            hook.remove()


def text_lengths(batch: Batch) -> Tensor:
    """Return for each token (B, T) how many tokens the text that it is part of has."""
    B, T = batch.tokens.shape
    if batch.documents is None:
        return batch.tokens.new_full((B, T), T)
    places = batch.documents.long()
    counts = places.new_zeros(B, int(places.max()) + 1).scatter_add_(1, places, torch.ones_like(places))
    return counts.gather(1, places)
