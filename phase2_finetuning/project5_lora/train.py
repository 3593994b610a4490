"""Teach a model something new with few weights: uv run python phase2_finetuning/project5_lora/train.py

Other ways: --method dora, qlora, prefix, full, ...; a real model: --config smollm2.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from common.checkpoints import load_checkpoint
from common.device import seed_everything
from common.files import shown
from common.script import script
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.distributed import World, join_world
from phase1_foundation.project3_pretrain.trainer import Trainer, out_of_patience
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.evaluate import Scores
from phase2_finetuning.project4_instruction_tuning.scoring import ALL
from phase2_finetuning.project4_instruction_tuning.train import (
    FILES,
    Data,
    Judge,
    base_template,
    choose_template,
    load_data,
    make_trainer,
)
from phase2_finetuning.project5_lora.adapters import count_trained, merge
from phase2_finetuning.project5_lora.config import TRAIN_COMMAND, Config
from phase2_finetuning.project5_lora.targets import choose_slots
from phase2_finetuning.project5_lora.tuning import VIRTUAL, load_tuned, prepare, save_tuned, trainer_options


class Result(NamedTuple):
    """What a run has shown."""

    losses: list[float]  # of each step, nats per token
    before: Scores
    after: Scores
    trained: int  # weights that moved
    weights: int  # of the model
    seconds: float  # of training


def run(config: Config, world: World | None = None, before: Scores | None = None) -> Result:
    """Tune and return what it did; main() calls it, and so do the tests and the sweep, with other configs.

    `before` are the scores of the untuned model, if they are known.
    """
    world, out, method = world or World(), config.train.out, config.tune.method
    if method in VIRTUAL:  # virtual tokens begin a row, so a row holds one conversation
        config = replace(config, data=replace(config.data, packing=False))
    model, tokenizer = load_model(config.model)
    # No new special tokens: their rows of the embedding would have to be trained as well.
    template = base_template(choose_template(config.data.template, tokenizer), tokenizer)
    data = load_data(config.data, config.train.seed)
    judge = Judge(data, config.train, world)
    weights = model.count_parameters()
    if method not in ("full", *VIRTUAL):
        choose_slots(model.config, config.tune.targets, 1, 1.0)  # a wrong name is told before any work
    world.print(f"base        {config.model}: {weights:,} parameters, template {template.name}")
    before = before or judge.score(model, tokenizer, template)
    seed_everything(config.train.seed)  # what an adapter begins with is drawn
    tuned = prepare(model, config.tune, first_words(data, tokenizer))
    trained = count_trained(tuned)
    world.print(f"trained     {trained:,} weights by {method}, {trained / weights:.2%} of the base's")
    options = trainer_options(config.tune)
    trainer = make_trainer(config, data, tuned, tokenizer, template, world, **options)  # type: ignore[arg-type]
    losses = trainer.train()
    if trainer.done < config.train.max_steps and not out_of_patience(config.train.patience, trainer.waited):
        raise KeyboardInterrupt  # asked to stop: it has saved; who stops it wants neither report nor next run
    if world.rank > 0:
        return Result(losses, {}, {}, trained, weights, trainer.seconds)
    take_best(trainer, out)
    if method != "full":
        save_tuned(tuned, out / "adapter", config.model)
    after = judge.score(*load_again(config), template)
    judge.report([before, after])
    result = Result(losses, before, after, trained, weights, trainer.seconds)
    report(config, result)
    return result


def first_words(data: Data, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of what is asked first: where virtual tokens begin."""
    return tokenizer.encode(data.train[0][0].content)


def take_best(trainer: Trainer, out: Path) -> None:
    """Give the model its best weights of the run back."""
    path = out / "model.pt"
    best = load_checkpoint(path, TRAIN_COMMAND)
    trainer.parallel.load_weights(best["model_state_dict"], path, trainer.saved)


def load_again(config: Config) -> tuple[Any, Tokenizer]:
    """Return what was saved, as anybody would load it: what is measured is what is in the files."""
    out, method = config.train.out, config.tune.method
    if method == "full":
        return load_model(out / "model.pt")
    model, tokenizer, _ = load_tuned(config.model, [out / "adapter"], quantize=method == "qlora")
    if method not in (*VIRTUAL, "qlora"):
        merge(model)
    return model, tokenizer


def report(config: Config, result: Result) -> None:
    """Print what the run cost and what it gave, in one table."""
    out = config.train.out
    saved = out / "model.pt"
    if config.tune.method != "full":
        saved = out / "adapter" / "adapter_model.safetensors"
    share = result.trained / result.weights
    rows = {
        "weights trained": f"{result.trained:,} of {result.weights:,} ({share:.2%})",
        "seconds of training": f"{result.seconds:.1f}",
        "bytes to keep": f"{saved.stat().st_size:,} in {shown(saved)}",
    }
    name = ALL if ALL in result.before else FILES
    one, other = result.before[name], result.after[name]
    rows["nats per answer token"] = f"{one.loss:.3f} before, {other.loss:.3f} after"
    if name == ALL:
        rows["right answers"] = f"{one.accuracy:.1%} before, {other.accuracy:.1%} after"
    print()
    for what, value in rows.items():
        print(f"{what:24}{value}")


def shown_model(name: str) -> str:
    """Return a model's name, or its path as people like to read it."""
    return shown(name) if Path(name).exists() else name


@script
def main() -> None:
    """Parse, print, tune."""
    config = Config.from_cli()
    with join_world(config.train.device) as world:
        world.print(config.to_yaml(), end="")
        run(config, world)
        what = f"--model {shown(config.train.out / 'model.pt')}"
        if config.tune.method != "full":
            what = f"--model {shown_model(config.model)} --adapters {shown(config.train.out / 'adapter')}"
        world.print(f"next: uv run python phase2_finetuning/project5_lora/chat.py {what}")


if __name__ == "__main__":
    main()
