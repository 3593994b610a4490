r"""A model that gives an answer a mark, learned from which of two people liked better.

PAPERS
  [1] Deep Reinforcement Learning from Human Preferences, Christiano et al., 2017, arXiv:1706.03741
  [2] Learning to summarize from human feedback, Stiennon et al., 2020, arXiv:2009.01325
  [3] Training language models to follow instructions with human feedback, Ouyang et al., 2022,
      arXiv:2203.02155 (InstructGPT)
  [4] Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking,
      Eisenstein et al., 2023, arXiv:2312.09244
  [5] Rank Analysis of Incomplete Block Designs: I. The Method of Paired Comparisons, Bradley & Terry, 1952,
      Biometrika 39

SYMBOLS (code = paper)
  chosen, rejected = y_w, y_l    rewards = r(x, y) [2] [3]

SHAPES
  B  answers, or pairs of them    T  tokens of the longest row    C  n_embd
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoints import load_checkpoint, load_weights
from phase1_foundation.project2_tokenizer.token_file import build_tokenizer
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project6_alignment.config import REWARD_COMMAND
from phase2_finetuning.project6_alignment.preference import PairBatch


class RewardModel(nn.Module):
    r"""A Decoder with one number in place of the head: how good is the answer that ends here?

    PAPER: [2] Sec. 3.4; [3] Sec. 3.5 begins it from the tuned model, and PPO's value model from it.
    PAPER CONTEXT: Nobody can write down what a good summary is, but anyone can say which of two is better.
        [1] learned a reward from such comparisons of pictures of a robot, [2] from comparisons of texts.
    INTUITION: An examiner who has read as much as the pupil, and who was shown many pairs of marked papers.
    IMPLEMENTATION: `scores` marks every token, given those up to it; the answer's reward stands at its last
        token. `values`, for PPO, is the same a token later: what is expected before each token is written.
        The head begins as N(0, 1 / (C + 1)), so scores begin about as large as 1 ([2]).
    WHY: Only differences were learned, so the level of scores is free: `shift` sets it to a mean of 0 over
        some answers, as [2] and [3] do. A test moves the level and finds the loss unmoved.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder, self.config = decoder, decoder.config
        self.decoder.head = nn.Identity()  # type: ignore[assignment]  # it predicts no tokens any more
        self.score = nn.Linear(self.config.n_embd, 1)
        nn.init.normal_(self.score.weight, std=(self.config.n_embd + 1) ** -0.5)
        nn.init.zeros_(self.score.bias)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's blocks, where those look who share a model out over processes."""
        return self.decoder.blocks

    def scores(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) to a score at each, (B, T)."""
        hidden = self.decoder.hidden(tokens)
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 has but 3 digits, and pairs are close
            return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)

    def values(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) to what is expected before each is written, (B, T)."""
        return F.pad(self.scores(tokens)[:, :-1], (1, 0))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the rewards (B,) of the answers that the mask (B, T) names."""
        place = torch.arange(mask.shape[1], device=mask.device)
        last = (place * mask).argmax(dim=1, keepdim=True)
        return self.scores(tokens).gather(1, last)[:, 0]

    @torch.no_grad()
    def shift(self, by: float) -> None:
        """Add a number to all scores."""
        self.score.bias.add_(by)


def pair_rewards(model: RewardModel, batch: PairBatch) -> Tensor:
    """Return the rewards (B, 2) of chosen and rejected answers."""
    tokens, mask = batch.tokens[:, :2], batch.mask[:, :2]
    return model(tokens.flatten(0, 1), mask.flatten(0, 1)).view(-1, 2)


def reward_loss(model: RewardModel, batch: PairBatch, center: float = 0.0) -> tuple[Tensor, int]:
    """Return the sum of the losses of pairs, and how many they are: what project 3's trainer asks for.

    The loss is -log sigmoid(difference), the negative log-likelihood ([2] Sec. 3.4) of Bradley and Terry's
    model ([5]): one of two wins with probability sigmoid(difference of their strengths).
    `center` times the square of the scores' sum keeps them near 0 ([4]).
    """
    rewards = pair_rewards(model, batch)
    losses = -F.logsigmoid(rewards[:, 0] - rewards[:, 1]) + center * rewards.sum(dim=1).square()
    return losses.sum(), len(losses)


def load_reward_model(path: Path | str) -> tuple[RewardModel, Tokenizer]:
    """Return a reward model that train_reward.py made, and its tokenizer."""
    entries = load_checkpoint(path, REWARD_COMMAND, needs=("config", "model_state_dict", "tokenizer"))
    if "score.weight" not in entries["model_state_dict"]:
        raise ValueError(f"reward model ({path}) must be one that train_reward.py made; it has no score")
    model = RewardModel(Decoder(DecoderConfig(**entries["config"])))
    load_weights(model, entries["model_state_dict"], path)
    return model.eval(), build_tokenizer(json.loads(entries["tokenizer"]))
