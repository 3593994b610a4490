"""Before and after: uv run python phase2_finetuning/project4_instruction_tuning/evaluate.py

Models answer tasks that none was trained on: how many answers are right, and how likely each finds the right
ones, family by family. With --data FILE also how likely they find real answers.
"""

from collections.abc import Sequence

import torch

from common.device import pick_device, pick_dtype
from common.files import shown
from common.script import script
from phase1_foundation.project1_minimal_gpt.train import autocast
from phase1_foundation.project3_pretrain.likelihood import standard_error
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.config import EvaluateConfig
from phase2_finetuning.project4_instruction_tuning.conversation_files import load_conversations
from phase2_finetuning.project4_instruction_tuning.scoring import ALL, Score, score_dialogues, score_tasks
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES, Task, is_right, make_tasks
from phase2_finetuning.project4_instruction_tuning.templates import TEMPLATES, template_for

TASKS = "tasks"  # the name of the data that is made here
Scores = dict[str, Score]  # by family of tasks, or name of a file


def run(config: EvaluateConfig) -> list[Scores]:
    """Measure the models one after the other, print what they answer and the tables; return the scores."""
    device = pick_device(config.device)
    tasks: list[Task] = []
    if TASKS in config.data:
        tasks = make_tasks(config.families or list(FAMILIES), config.test_tasks, config.seed, "test")
    files = {name: load_conversations(name, config.limit) for name in config.data if name != TASKS}
    results: list[Scores] = []
    for number, name in enumerate(config.models, start=1):
        model, tokenizer = load_model(name)
        model.to(device)
        template = template_for(tokenizer) if config.template == "auto" else TEMPLATES[config.template]
        size = f"{model.count_parameters():,} parameters"
        print(f"model {number}  {shown(name)}: {size}, template {template.name}")
        scores: Scores = {}
        with autocast(device, pick_dtype(config.precision, device)):
            if tasks:
                scores, answers = score_tasks(model, tokenizer, template, tasks, config.max_new_tokens)
                show_answers(tasks, answers, config.samples)
            for file, dialogues in files.items():
                scores[file] = sum(score_dialogues(model, tokenizer, template, dialogues), Score())
        results.append(scores)
    if tasks:
        print_tasks(results, [*dict.fromkeys(task.family for task in tasks), ALL])
    for file in files:
        print_file(file, [scores[file] for scores in results])
    return results


def show_answers(tasks: Sequence[Task], answers: Sequence[str], number: int) -> None:
    """Print some of the tasks, and what a model answered."""
    step = max(1, len(tasks) // max(1, number) - 1)  # less one: families come in turn
    for task, answer in list(zip(tasks, answers, strict=True))[::step][:number]:
        verdict = "right" if is_right(task, answer) else f"wrong: {task.answer!r}"
        print(f"    {task.prompt!r} -> {answer[:80]!r} {verdict}")


def print_tasks(results: Sequence[Scores], families: Sequence[str]) -> None:
    """Print a line for each family and one for all, the models side by side."""
    models = [f"model {number + 1}" for number in range(len(results))]
    width = max(map(len, families))
    print(f"\n{'':{width}}         {'right':<{9 * len(models)}}  nats per token of the right answer")
    print(
        f"{'family':{width}}  tasks",
        *(f"{name:>8}" for name in models),
        "",
        *(f"{name:>8}" for name in models),
    )
    for family in families:
        scores = [scores[family] for scores in results]
        right = (f"{score.accuracy:8.1%}" for score in scores)
        print(
            f"{family:{width}}  {scores[0].answers:5}",
            *right,
            "",
            *(f"{score.loss:8.3f}" for score in scores),
        )
    errors = (f"{standard_error(scores[ALL].accuracy, scores[ALL].answers):.1%}" for scores in results)
    print(f"standard errors of all: {', '.join(errors)}")


def print_file(file: str, scores: Sequence[Score]) -> None:
    """Print how likely the models find the answers in a file."""
    left_out = f"; {scores[0].skipped} too long" if scores[0].skipped else ""
    print(f"\n{file}: {scores[0].answers:,} answers{left_out}")
    for number, score in enumerate(scores, start=1):
        print(f"model {number}  {score.loss:.3f} nats per token, {score.bits_per_byte:.3f} bits per byte")


@script
def main() -> None:
    """Parse and measure."""
    torch.set_grad_enabled(False)
    run(EvaluateConfig.from_cli())


if __name__ == "__main__":
    main()
