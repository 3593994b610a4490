r"""What an answer is worth: checked by a program, or marked by a reward model.

PAPERS
  [1] Concrete Problems in AI Safety, Amodei et al., 2016, arXiv:1606.06565 (reward hacking)
  [2] DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement Learning, DeepSeek-AI, 2025,
      arXiv:2501.12948
  [3] Tulu 3: Pushing Frontiers in Open Language Model Post-Training, Lambert et al., 2024, arXiv:2411.15124
      (verifiable rewards)
  [4] Scaling Laws for Reward Model Overoptimization, Gao, Schulman & Hilton, 2022, arXiv:2210.10760

SHAPES
  B  answers, one per row of a rollout
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase2_finetuning.project4_instruction_tuning.tasks import Task, is_right
from phase2_finetuning.project6_alignment.reward_model import RewardModel, load_reward_model
from phase2_finetuning.project6_alignment.rollouts import Rollout

ROWS = 64  # answers that a reward model marks at once


class Written(NamedTuple):
    """What was written to a task, as far as a program looks at it."""

    text: str
    share: float  # tokens written, the mark that ends the answer included, over the most that are allowed
    ended: bool  # by that mark, rather than cut off


def exact(task: Task, answer: Written) -> float:
    """1 for the right answer that also ends, else 0."""
    return float(answer.ended and is_right(task, answer.text))


def contains(task: Task, answer: Written) -> float:
    """1 if the right answer stands somewhere in what was written, else 0: a checker that can be exploited."""
    return float(task.answer in answer.text)


def has_format(task: Task, answer: Written) -> float:
    """1 for an answer that has the outline of the right one, else 0."""
    return float(answer.ended and outline(answer.text.strip()) == outline(task.answer))


def brevity(task: Task, answer: Written) -> float:
    """Between 1 for nothing at all and 0 for an answer as long as can be."""
    return 1 - answer.share


RULES: dict[str, Callable[[Task, Written], float]] = {
    "exact": exact,
    "contains": contains,
    "format": has_format,
    "brevity": brevity,
}


def outline(text: str) -> str:
    """Return a text with each run of digits, of small and of capital letters as one: `7 km` is `0 a`."""
    for kind, sign in ((r"\d+", "0"), ("[A-Z]+", "A"), ("[a-z]+", "a")):
        text = re.sub(kind, sign, text)
    return text


class Grader:
    r"""Mark answers by the weighted sum of some rewards.

    PAPER: right or wrong, and the right form, [2] Sec. 2.2.2; a program in place of the reward model, [3]
        (RLVR); a learned reward that is only nearly what was meant, [4].
    PAPER CONTEXT: A reward model can be talked into liking nonsense, and a policy that is trained against it
        finds out how ([4]). A program that compares with the right answer cannot.
    INTUITION: You get what you measure. So measure what you want, or watch what you get.
    IMPLEMENTATION: NAME or NAME:WEIGHT, added up; a name is one of RULES, or the file of a reward model that
        has the policy's tokenizer. `contains` is here to be exploited: it forgives whatever stands around
        the answer, as lenient checkers do, so a list of all numbers is always right.
    WHY: [1] Sec. 4 calls it reward hacking. In the README `contains` rises while `exact` falls, within
        minutes.
    """

    def __init__(
        self, rewards: Sequence[str], tokenizer: Tokenizer, longest: int, device: torch.device | str = "cpu"
    ) -> None:
        """Take the rewards' names, and how many tokens an answer may have.

        Raises ValueError for a name or a weight that cannot be read, OSError for a file that is not there.
        """
        self.tokenizer, self.longest = tokenizer, longest
        self.rules: list[tuple[Callable[[Task, Written], float], float]] = []
        self.models: list[tuple[RewardModel, float]] = []
        for entry in rewards:
            name, weight = split_weight(entry)
            if name in RULES:
                self.rules.append((RULES[name], weight))
            else:
                self.models.append((self._load(name).to(device), weight))

    def _load(self, name: str) -> RewardModel:
        if not Path(name).suffix:
            raise ValueError(f"reward ({name}) must be a reward model's file or one of {', '.join(RULES)}")
        model, tokenizer = load_reward_model(name)
        if tokenizer.vocab_size != self.tokenizer.vocab_size:
            rule = f"must know the {self.tokenizer.vocab_size} tokens of the policy's tokenizer"
            raise ValueError(f"reward ({name}, of {tokenizer.vocab_size} tokens) {rule}")
        return model

    def answers(self, rollout: Rollout) -> list[Written]:
        """Return what was written in each row."""
        texts = map(self.tokenizer.decode, rollout.answers())
        shares = (rollout.mask.sum(dim=1) / self.longest).tolist()
        return [Written(*row) for row in zip(texts, shares, rollout.stopped.tolist(), strict=True)]

    @torch.no_grad()
    def mark(self, tasks: Sequence[Task], rollout: Rollout, answers: Sequence[Written]) -> Tensor:
        """Return the rewards (B,) of a rollout's answers to the task of each row."""
        pairs = list(zip(tasks, answers, strict=True))
        sums = [sum(weight * rule(task, answer) for rule, weight in self.rules) for task, answer in pairs]
        total = torch.tensor(sums, dtype=torch.float32, device=rollout.tokens.device)
        for model, weight in self.models:
            parts = zip(rollout.tokens.split(ROWS), rollout.mask.split(ROWS), strict=True)
            total += weight * torch.cat([model(tokens, mask).float() for tokens, mask in parts])
        return total


def split_weight(entry: str) -> tuple[str, float]:
    """Return name and weight of NAME:WEIGHT; the weight of NAME alone is 1."""
    name, colon, weight = entry.rpartition(":")
    try:
        return (name, float(weight)) if colon else (entry, 1.0)
    except ValueError:
        return entry, 1.0  # a colon in a path
