r"""Which of two models answers better, as judged by a program: win rates.

PAPERS
  [1] Learning to summarize from human feedback, Stiennon et al., 2020, arXiv:2009.01325
  [2] Direct Preference Optimization: Your Language Model is Secretly a Reward Model, Rafailov et al., 2023,
      arXiv:2305.18290 (DPO)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.likelihood import standard_error
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project4_instruction_tuning.tasks import Task
from phase2_finetuning.project4_instruction_tuning.templates import ChatTemplate
from phase2_finetuning.project6_alignment.pairs import Answer, sample_answers


@dataclass(frozen=True)
class Verdict:
    """What a judge found out about a model's answers.

    PAPER: win rates as in the papers above, with a program in place of people or of a larger model.
    PAPER CONTEXT: A mean score hides whether a few answers changed much or many a little.
    INTUITION: The league table, and the head-to-head beside it.
    IMPLEMENTATION: Both models answer the same prompts; ties, both right or both wrong, are half a win.
    WHY: `right` may stand still while wins and losses are many; both are told, with the standard error.
    """

    answers: int
    right: float  # share of right answers
    wins: float  # share that is right where the other model's is wrong
    losses: float  # share that is wrong where the other model's is right
    tokens: float  # mean length of an answer, with the mark that ends it

    @property
    def win_rate(self) -> float:
        """Share of comparisons that are won; a tie is half a win."""
        return 0.5 + (self.wins - self.losses) / 2

    @property
    def error(self) -> float:
        """Standard error of the share of right answers."""
        return standard_error(self.right, self.answers)


class Judge:
    r"""Compare what models answer to the same tasks with what one model answered.

    PAPER: [1] Sec. 4.1 and [2] Sec. 6 report how often people, or a model in their place, prefer an answer to
        another model's.
    PAPER CONTEXT: A loss on pairs says that pairs were learned. What matters is what the model writes.
    INTUITION: A return match, with the referee's book open.
    IMPLEMENTATION: Here right beats wrong, and all else is a tie: half a win for each, so a model against
        itself has a win rate of exactly 1/2 (a test). Both answer with the same random numbers.
    WHY: On prompts that neither was trained on. Temperature 1 shows what the odds are; 0, the best guess.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        tasks: Sequence[Task],
        temperature: float = 1.0,
        max_new_tokens: int = 32,
        seed: int = 0,
        samples: int = 1,
    ) -> None:
        self.tokenizer, self.template, self.tasks = tokenizer, template, tasks
        self.samples = samples if temperature else 1  # all answers at temperature 0 are equal
        self.how = (temperature, max_new_tokens, seed)
        self.other: list[list[Answer]] = []

    def answers(self, model: Decoder) -> list[list[Answer]]:
        """Return what a model answers to each task."""
        return sample_answers(model, self.tokenizer, self.template, self.tasks, self.samples, *self.how)

    def compare_with(self, model: Decoder) -> None:
        """Let the model answer that the others are compared with."""
        self.other = self.answers(model)

    def judge(self, model: Decoder) -> Verdict:
        """Return how a model's answers compare with the other model's."""
        return compare(self.answers(model), self.other)


def compare(answers: Sequence[Sequence[Answer]], others: Sequence[Sequence[Answer]]) -> Verdict:
    """Return the verdict on answers, compared one by one with others to the same tasks."""
    pairs = [pair for group in zip(answers, others, strict=True) for pair in zip(*group, strict=True)]
    count = len(pairs)
    return Verdict(
        count,
        sum(ours.right for ours, _ in pairs) / count,
        sum(ours.right and not theirs.right for ours, theirs in pairs) / count,
        sum(theirs.right and not ours.right for ours, theirs in pairs) / count,
        sum(len(ours.ids) for ours, _ in pairs) / count,
    )
