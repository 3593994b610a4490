"""One model with and without adapters: uv run python phase2_finetuning/project5_lora/evaluate.py

The model is loaded once; adapters, ours or peft's, are changed while it runs: --adapters FOLDER FOLDER.
"""

import torch

from common.device import pick_device, pick_dtype
from common.script import script
from phase1_foundation.project1_minimal_gpt.train import autocast
from phase2_finetuning.project4_instruction_tuning.evaluate import Scores, print_tasks, show_answers
from phase2_finetuning.project4_instruction_tuning.scoring import ALL, score_tasks
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES, make_tasks
from phase2_finetuning.project4_instruction_tuning.train import base_template, choose_template
from phase2_finetuning.project5_lora.config import EvaluateConfig
from phase2_finetuning.project5_lora.tuning import load_tuned, variants


def run(config: EvaluateConfig) -> list[Scores]:
    """Measure the model alone and with each adapter; print answers and tables, and return the scores."""
    device = pick_device(config.device)
    tasks = make_tasks(config.families or list(FAMILIES), config.test_tasks, config.seed, "test")
    model, tokenizer, names = load_tuned(config.model, config.adapters)
    model.to(device)
    template = base_template(choose_template(config.template, tokenizer), tokenizer)
    results: list[Scores] = []
    with autocast(device, pick_dtype(config.precision, device)):
        for number, (name, each) in enumerate(variants(model, names), start=1):
            what = f"{config.model} with {name}" if name else config.model
            print(f"model {number}  {what}, template {template.name}")
            scores, answers = score_tasks(each, tokenizer, template, tasks, config.max_new_tokens)
            show_answers(tasks, answers, config.samples)
            results.append(scores)
    print_tasks(results, [*dict.fromkeys(task.family for task in tasks), ALL])
    return results


@script
def main() -> None:
    """Parse and measure."""
    torch.set_grad_enabled(False)
    run(EvaluateConfig.from_cli())


if __name__ == "__main__":
    main()
