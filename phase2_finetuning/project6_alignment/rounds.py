r"""Rounds of writing, judging and learning: what GRPO and PPO have in common.

PAPERS
  [1] Training language models to follow instructions with human feedback, Ouyang et al., 2022,
      arXiv:2203.02155 (InstructGPT)
  [2] Proximal Policy Optimization Algorithms, Schulman et al., 2017, arXiv:1707.06347
  [3] DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, Shao et al., 2024,
      arXiv:2402.03300 (GRPO)

SHAPES
  B  answers of a round, those to one task adjacent
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.checkpoints import load_checkpoint, load_weights, save_checkpoint
from common.device import pick_dtype, seed_everything
from common.files import make_folder, shown
from common.plots import LossLog, read_csv
from common.script import StopRequest, progress
from phase1_foundation.project1_minimal_gpt.optimizer import lr_factor
from phase1_foundation.project1_minimal_gpt.train import autocast
from phase1_foundation.project2_tokenizer.token_file import save_tokenizer
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.trainer import begin_run, check_settings, keep_newest
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES, Task, make_tasks
from phase2_finetuning.project4_instruction_tuning.templates import ChatTemplate
from phase2_finetuning.project6_alignment.config import RLConfig
from phase2_finetuning.project6_alignment.learner import Numbers
from phase2_finetuning.project6_alignment.pairs import encode_tasks, sample_answers
from phase2_finetuning.project6_alignment.rewards import Grader, Written, exact
from phase2_finetuning.project6_alignment.rollouts import Rollout, sample
from phase2_finetuning.project6_alignment.visualize import draw_rounds

COLUMNS = ("round", "seconds", "reward", "right", "test_right", "tokens", "ended", "asked")
KEEP = 2  # newest checkpoints to resume from


@dataclass
class Round:
    """What was written in a round, and what it is worth; one entry, or row, for each answer.

    PAPER: the batch of [2] Algorithm 1 and [3] Algorithm 1.
    PAPER CONTEXT: In supervised learning the batch is given. Here it is made, and how it was made matters.
    INTUITION: The exam papers with their marks.
    IMPLEMENTATION: `right` is the checker's opinion, whatever is rewarded: so the table shows when a reward
        is being exploited.
    WHY: Dynamic sampling takes rounds apart and joins them; one object keeps rows and marks together.
    """

    tasks: list[Task]
    answers: list[Written]
    rollout: Rollout
    rewards: Tensor  # (B,) what is learned from
    right: Tensor  # (B,) 1 for a right answer
    asked: int  # tasks that were tried to get these

    def take(self, rows: Tensor) -> Self:
        """Return some of the answers."""
        numbers = rows.tolist()
        tasks, answers = ([each[i] for i in numbers] for each in (self.tasks, self.answers))
        marks = self.rewards[rows], self.right[rows]
        return type(self)(tasks, answers, self.rollout.take(rows), *marks, self.asked)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Return several rounds as one."""
        return cls(
            [task for part in parts for task in part.tasks],
            [answer for part in parts for answer in part.answers],
            Rollout.join([part.rollout for part in parts]),
            torch.cat([part.rewards for part in parts]),
            torch.cat([part.right for part in parts]),
            sum(part.asked for part in parts),
        )

    def numbers(self) -> Numbers:
        """Return what goes into the table of the run."""
        shares = {"reward": self.rewards, "right": self.right, "ended": self.rollout.stopped}
        numbers = {name: value.double().mean().item() for name, value in shares.items()}
        tokens = self.rollout.mask.sum() / len(self.rollout.mask)
        return numbers | {"tokens": tokens.item(), "asked": self.asked}


class Learner(Protocol):
    """An algorithm: what it moves, and how it moves it after a round."""

    modules: dict[str, nn.Module]  # "policy", and what else is learned
    optimizers: list[Optimizer]
    columns: tuple[str, ...]  # names of the numbers that learn() returns

    def learn(self, batch: Round, share: float) -> Numbers:
        """Move the weights after a round, at a share of the peak learning rate."""
        ...


class Writer:
    """Let the policy answer new tasks, and have the answers marked.

    PAPER: [1] Sec. 3.1, step 3: a prompt is drawn, the policy answers, the answer gets a reward.
    PAPER CONTEXT: In supervised tuning the text to learn comes with the data. Here only the questions do.
    INTUITION: Set an exam, collect it, mark it.
    IMPLEMENTATION: Tasks and answers are functions of (seed, round, attempt) and of the policy, so a resumed
        run asks what the uninterrupted one would have asked. The families take turns, also across rounds.
    WHY: A test resumes a run and finds the same rewards, to the bit.
    """

    def __init__(
        self, rl: RLConfig, model: Decoder, tokenizer: Tokenizer, template: ChatTemplate, samples: int
    ) -> None:
        self.rl, self.model, self.tokenizer, self.template, self.samples = (
            rl, model, tokenizer, template, samples,
        )  # fmt: skip
        self.device = next(model.parameters()).device
        self.grader = Grader(rl.rewards, tokenizer, rl.max_new_tokens, self.device)
        self.stop = template.stop(tokenizer)

    def tasks(self, number: int, count: int, attempt: int = 0) -> list[Task]:
        """Return the tasks of a round."""
        families = self.rl.families or list(FAMILIES)
        turn = number * self.rl.prompts % len(families)
        return make_tasks(families[turn:] + families[:turn], count, round_seed(self.rl, number, attempt))

    def write(self, number: int, count: int, attempt: int = 0) -> Round:
        """Return a round of answers to `count` tasks."""
        rl, tasks = self.rl, self.tasks(number, count, attempt)
        prompts = encode_tasks(self.tokenizer, self.template, tasks)
        with autocast(self.device, pick_dtype(rl.write_precision, self.device)):
            rollout = sample(
                self.model,
                prompts,
                rl.max_new_tokens,
                rl.temperature,
                self.stop,
                round_seed(rl, number, attempt),
                self.samples,
            )
        asked = [task for task in tasks for _ in range(self.samples)]
        answers = self.grader.answers(rollout)
        right = torch.tensor([exact(*pair) for pair in zip(asked, answers, strict=True)], device=self.device)
        return Round(asked, answers, rollout, self.grader.mark(asked, rollout, answers), right, count)


def round_seed(rl: RLConfig, number: int, attempt: int = 0) -> int:
    """Return the seed of a round's tasks and answers."""
    state = np.random.SeedSequence([rl.seed, number, attempt]).generate_state(1, np.uint64)
    return int(state[0] >> 1)


class Rounds:
    """The loop: write, judge, learn; keep a table, look at tasks never trained on, save, go on.

    PAPER: [2] Algorithm 1; for language models [1] Sec. 3.1 and [3] Algorithm 1.
    PAPER CONTEXT: Project 3's trainer asks for a batch that depends on the step alone. Here it depends on the
        weights, so nothing can be prepared while a step is being computed.
    INTUITION: School: exam, marks, revision, and now and then an exam for which nobody could study.
    IMPLEMENTATION: model.pt is the newest policy, not the best on the test: to pick it there would be to
        train on the test. A checkpoint holds all weights and optimizers' averages.
    WHY: A run that was stopped and resumed has the rewards of one that was not (a test).
    """

    def __init__(
        self,
        rl: RLConfig,
        out: Path,
        learner: Learner,
        writer: Writer,
        write: Callable[[int], Round],
        settings: Mapping[str, Any],
        command: str,
    ) -> None:
        """Take an algorithm, how a round is written, and the command that makes such a run.

        Raises ValueError or OSError if `out` holds a run that is not over, or nothing to resume.
        """
        self.rl, self.learner, self.writer, self.write = rl, learner, writer, write
        self.settings, self.command, self.out = dict(settings), command, make_folder(out)
        self.tests = make_tasks(rl.families or list(FAMILIES), rl.test_tasks, rl.seed, "test")
        self.done, self.seconds = 0, 0.0  # rounds; of training, evaluations left out
        self.before: Numbers = {}  # share of right answers to the tests of each family, before any round
        self.after: Numbers = {}  # the same at the last evaluation
        self.replaced = begin_run(self.out, rl.resume, rl.overwrite, self.restore, command, "rounds")

    def restore(self, path: Path) -> None:
        """Bring everything back to where a checkpoint left it. Raises ValueError if settings differ."""
        there = load_checkpoint(path, self.command, needs=("modules", "optimizers", "settings", "before"))
        check_settings(self.settings, there["settings"], path)
        for name, module in self.learner.modules.items():
            load_weights(module, there["modules"][name], path)
        for optimizer, state in zip(self.learner.optimizers, there["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.done, self.seconds = there["iter"], there["seconds"]
        self.before, self.after = there["before"], there["after"]

    def train(self) -> list[Numbers]:
        """Go on up to max_steps, or until Ctrl-C or SIGTERM; return the numbers of these rounds."""
        rl, rows = self.rl, []
        log = LossLog(self.out / "rounds.csv", (*COLUMNS, *self.learner.columns), self.done or None)
        if not self.done:
            self.before = self.after = self.evaluate()
            log.add(round=0, seconds=0.0, test_right=overall(self.before, self.tests))
        steps = range(self.done, rl.max_steps)
        bar = progress(steps, initial=self.done, total=rl.max_steps, desc="rounds")
        with StopRequest() as stop:
            for number in bar:
                begin = time.perf_counter()
                seed_everything(round_seed(rl, number))
                batch = self.write(number)
                numbers = batch.numbers() | self.learner.learn(batch, lr_factor(number, rl))
                self.done, self.seconds = number + 1, self.seconds + time.perf_counter() - begin
                ends = stop.requested or self.done == rl.max_steps
                pause = ends or self.done % rl.eval_interval == 0
                if pause:
                    self.after = self.evaluate()
                    numbers["test_right"] = overall(self.after, self.tests)
                rows.append(numbers)
                log.add(round=self.done, seconds=self.seconds, **numbers)
                bar.set_postfix({name: f"{numbers[name]:.3f}" for name in ("reward", "right")}, refresh=False)
                if pause:
                    self.save()
                    bar.write(self._report(numbers, batch))
                if ends:
                    break
        self._finish()
        return rows

    @torch.no_grad()
    def evaluate(self) -> Numbers:
        """Return the share of right answers to the test tasks, by family; always the likeliest token."""
        writer = self.writer
        how = (writer.tokenizer, writer.template, self.tests, 1, 0.0, self.rl.max_new_tokens)
        marks: dict[str, list[bool]] = defaultdict(list)
        for task, (answer,) in zip(self.tests, sample_answers(writer.model, *how), strict=True):
            marks[task.family].append(answer.right)
        return {family: sum(right) / len(right) for family, right in marks.items()}

    def save(self) -> None:
        """Write model.pt, which load_model reads, and step_N.pt; remove all but the newest of those."""
        policy = self.writer.model
        save_tokenizer(self.writer.tokenizer, self.out / "tokenizer.json")
        entries = {
            "iter": self.done,
            "config": asdict(policy.config),
            "tokenizer": (self.out / "tokenizer.json").read_text(encoding="utf-8"),
            "model_state_dict": policy.state_dict(),
        }
        states = {
            "iter": self.done,
            "seconds": self.seconds,
            "before": self.before,
            "after": self.after,
            "settings": self.settings,
            "modules": {name: module.state_dict() for name, module in self.learner.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.learner.optimizers],
        }
        save_checkpoint(self.out / f"step_{self.done:08}.pt", **states)
        save_checkpoint(self.out / "model.pt", **entries)
        keep_newest(self.out, KEEP, self.replaced)
        self.replaced = []

    def _report(self, numbers: Numbers, batch: Round) -> str:
        """Return a line about the run, and an answer to look at."""
        task, answer = batch.tasks[0], batch.answers[0]
        verdict = "right" if batch.right[0] else f"not {task.answer!r}"
        return (
            f"round {self.done:,}  reward {numbers['reward']:.3f}  right {numbers['right']:.1%}, "
            f"tests {numbers['test_right']:.1%}  {numbers['tokens']:.1f} tokens  {self.seconds:.1f} s\n"
            f"    {task.prompt!r} -> {answer.text[:60]!r} {verdict}"
        )

    def _finish(self) -> None:
        """Print the table, draw the curves, and say what was written."""
        print_table(self.before, self.after, self.tests)
        draw_rounds(self.out / "rounds.png", {self.out.name: read_csv(self.out / "rounds.csv")})
        print(f"{self.done:,} rounds in {self.seconds:.1f} s")
        print(f"written to {shown(self.out)}: model.pt, step_*.pt (to --resume), rounds.csv, rounds.png")
        if self.done < self.rl.max_steps:
            print(f"stopped after {self.done:,} of {self.rl.max_steps:,} rounds; go on with --resume")


def overall(shares: Numbers, tests: Sequence[Task]) -> float:
    """Return the share of all tests that are right, from those of the families."""
    return sum(shares[task.family] for task in tests) / len(tests)


def print_table(before: Numbers, after: Numbers, tests: Sequence[Task]) -> None:
    """Print the share of right answers to the tests before and after, for each family and for all."""
    width = max(len("family"), *map(len, before))
    print(f"\n{'family':{width}}  tasks    before     after")
    for family, share in before.items():
        count = sum(task.family == family for task in tests)
        print(f"{family:{width}}  {count:5}  {share:8.1%}  {after[family]:8.1%}")
    shares = (f"{overall(shares, tests):8.1%}" for shares in (before, after))
    print(f"{'all':{width}}  {len(tests):5}  {'  '.join(shares)}\n")
