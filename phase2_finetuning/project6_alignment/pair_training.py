"""What training on pairs has in common, whether a policy learns from them or a reward model.

PAPERS
  [1] Training language models to follow instructions with human feedback, Ouyang et al., 2022,
      arXiv:2203.02155 (InstructGPT)
  [2] Direct Preference Optimization: Your Language Model is Secretly a Reward Model, Rafailov et al., 2023,
      arXiv:2305.18290 (DPO)
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

from torch import nn

from common.device import pick_dtype
from common.plots import LossLog
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.accumulation import Loss
from phase1_foundation.project3_pretrain.distributed import World
from phase1_foundation.project3_pretrain.trainer import Trainer
from phase2_finetuning.project6_alignment.config import PreferenceConfig, RewardConfig
from phase2_finetuning.project6_alignment.learner import Numbers
from phase2_finetuning.project6_alignment.pair_loader import PairLoader


class Watch(ABC):
    """What is measured as training goes on, in a table and as a line.

    PAPER: [1] Sec. 4.1 tells how many held-out comparisons a reward model predicts; [2] Sec. 6.2 what share
        of the policy's answers wins.
    PAPER CONTEXT: The loss says how sure a model is of its order of the pairs. People ask how often it is
        right, and what became of the answers.
    INTUITION: The score and the pupil's own words, beside the mark.
    IMPLEMENTATION: A subclass names its `columns` and finds the numbers in `look`. The first process writes
        them down; a run that is resumed goes on with its own table.
    WHY: DPO's loss falls while both answers become less likely (the README has the numbers): the loss alone
        would not show it.
    """

    columns: tuple[str, ...]
    file = "table.csv"
    line = ""  # a format of what is printed

    def __init__(self, config: PreferenceConfig | RewardConfig, held: PairLoader, world: World) -> None:
        self.held, self.world, self.path = held, world, config.train.out / self.file
        self.device = world.device(config.train.device)
        self.dtype = pick_dtype(config.train.precision, self.device)

    @abstractmethod
    def look(self, model: Any) -> Numbers:
        """Return the numbers of a row."""

    def open(self, step: int, before: Numbers) -> None:
        """Begin the table, or go on with the one of a run that was interrupted after `step` steps."""
        if self.world.rank == 0:
            self.log = LossLog(self.path, ["step", *self.columns], step or None)
            if not step:
                self.log.add(step=0, **before)

    def note(self, step: int, model: nn.Module) -> str:
        """Look, write a row of the table, and return it as a line."""
        numbers = self.look(model)
        if self.world.rank == 0:
            self.log.add(step=step, **numbers)
        return self.line.format(**numbers)


def train_on_pairs(
    model: nn.Module,
    loader: PairLoader,
    loss: Loss,
    config: PreferenceConfig | RewardConfig,
    watch: Watch,
    before: Numbers,
    tokenizer: Tokenizer,
    start: str,
) -> bool:
    """Train with project 3's trainer, watched; say whether the run came to its end.

    `start` is the fingerprint of the model that all began from: a run is resumed with no other.
    """
    train = config.train
    tokenizer.save(train.out / "tokenizer.json")
    trainer = Trainer(
        model.train(),
        loader,
        replace(train, eval_batches=watch.held.batches),
        loss,
        validation=watch.held,
        sample=lambda model: watch.note(trainer.done, model),
        unit="per pair",
        entries={"tokenizer": (train.out / "tokenizer.json").read_text(encoding="utf-8")},
        settings=config.to_dict() | {"start": start},
        world=watch.world,
    )
    watch.open(trainer.done, before)
    trainer.train()
    return trainer.done >= train.max_steps
