"""Hold what was trained against its beginning: uv run python phase2_finetuning/project6_alignment/evaluate.py

All models of this project (or those that --models names) answer tasks that none was trained on.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from common.checkpoints import load_checkpoint
from common.device import pick_device
from common.files import shown
from common.script import script
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES, LONGER, Task, make_tasks
from phase2_finetuning.project6_alignment.config import FOLDER, EvaluateConfig
from phase2_finetuning.project6_alignment.judging import Judge, Verdict, compare
from phase2_finetuning.project6_alignment.pairs import Answer, load_policy
from phase2_finetuning.project6_alignment.rewards import RULES, Written

COMMAND = "uv run python phase2_finetuning/project6_alignment/train_grpo.py"
Answers = list[list[Answer]]
Numbers = dict[str, float]


def run(config: EvaluateConfig) -> dict[str, Numbers]:
    """Ask, judge, print the tables; return the numbers of each model by its name."""
    names = config.models or find_models()
    policy, tokenizer, template = load_policy(config.reference)
    families = config.families or [*FAMILIES, *LONGER]
    tasks = make_tasks(families, config.test_tasks, config.seed, "test")
    judge = Judge(tokenizer, template, tasks, config.temperature, config.max_new_tokens, config.seed)
    device, stop = pick_device(config.device), template.stop(tokenizer)
    judge.compare_with(policy.to(device))
    answers, numbers = {}, {}
    for name in [config.reference, *names]:
        model, other, _ = load_policy(name)
        if other.vocab_size != tokenizer.vocab_size:
            rule = f"must know the {tokenizer.vocab_size} tokens of the reference"
            raise ValueError(f"model ({name}, of {other.vocab_size} tokens) {rule}")
        label = "reference" if name == config.reference else label_of(name)
        answers[label] = judge.answers(model.to(device))
        marks = rule_means(tasks, answers[label], stop, config.max_new_tokens)
        numbers[label] = verdict_numbers(compare(answers[label], judge.other)) | marks
    print_models(numbers)
    print_families(tasks, answers)
    return numbers


def find_models() -> list[str]:
    """Return the checkpoints of policies that this project has made; a reward model is none."""
    policies = []
    for path in sorted(FOLDER.glob("*/model.pt")):
        if "score.weight" not in load_checkpoint(path, COMMAND)["model_state_dict"]:
            policies.append(str(path))
    if not policies:
        raise FileNotFoundError(f"there is no model in {shown(FOLDER)} yet; make one with: {COMMAND}")
    return policies


def label_of(name: str) -> str:
    """Return the short name of a model: the folder of a checkpoint."""
    path = Path(name)
    return path.parent.name if path.name == "model.pt" else path.name


def verdict_numbers(verdict: Verdict) -> Numbers:
    """Return what a judge found, as columns of the table."""
    return {
        "right": verdict.right,
        "error": verdict.error,
        "win_rate": verdict.win_rate,
        "tokens": verdict.tokens,
    }


def rule_means(tasks: Sequence[Task], answers: Answers, stop: set[int], longest: int) -> Numbers:
    """Return the mean of each verifiable reward."""
    pairs = [
        (task, Written(answer.text, len(answer.ids) / longest, answer.ids[-1] in stop))
        for task, group in zip(tasks, answers, strict=True)
        for answer in group
    ]
    return {name: sum(rule(*pair) for pair in pairs) / len(pairs) for name, rule in RULES.items()}


def print_models(numbers: dict[str, Numbers]) -> None:
    """Print a line for each model."""
    width = max(map(len, numbers))
    columns = list(next(iter(numbers.values())))
    print(f"{'model':{width}}", *(f"{name:>9}" for name in columns))
    for label, row in numbers.items():
        cells = (f"{row[name]:9.1f}" if name == "tokens" else f"{row[name]:9.1%}" for name in columns)
        print(f"{label:{width}}", *cells)


def print_families(tasks: Sequence[Task], answers: dict[str, Answers]) -> None:
    """Print the share of right answers for each family, the models side by side."""
    families = list(dict.fromkeys(task.family for task in tasks))
    width = max(map(len, families))
    print(f"\n{'right':{width}}  tasks", *(f"{label:>{max(9, len(label))}}" for label in answers))
    for family in families:
        rows = [i for i, task in enumerate(tasks) if task.family == family]
        cells = []
        for label, given in answers.items():
            right = [answer.right for i in rows for answer in given[i]]
            cells.append(f"{sum(right) / len(right):{max(9, len(label))}.1%}")
        print(f"{family:{width}}  {len(rows):5}", *cells)


@script
def main() -> None:
    """Parse and measure."""
    torch.set_grad_enabled(False)
    run(EvaluateConfig.from_cli())


if __name__ == "__main__":
    main()
