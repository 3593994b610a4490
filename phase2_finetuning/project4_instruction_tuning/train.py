"""Teach a language model to answer: uv run python phase2_finetuning/project4_instruction_tuning/train.py

Real conversations: --config smollm2. On several GPUs: uv run torchrun --nproc_per_node 8, and the same.
"""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import torch

from common.device import pick_dtype
from common.files import atomic_write, make_folder, shown
from common.script import script
from phase1_foundation.project1_minimal_gpt.train import autocast
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.accumulation import Loss
from phase1_foundation.project3_pretrain.distributed import World, join_world
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.trainer import Trainer
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.config import OUT, Config, DataConfig, TuneConfig
from phase2_finetuning.project4_instruction_tuning.conversation_files import load_conversations
from phase2_finetuning.project4_instruction_tuning.conversations import Conversation, Message
from phase2_finetuning.project4_instruction_tuning.embedding_resize import resize_embeddings
from phase2_finetuning.project4_instruction_tuning.evaluate import TASKS, Scores, print_file, print_tasks
from phase2_finetuning.project4_instruction_tuning.neftune import NEFTune
from phase2_finetuning.project4_instruction_tuning.scoring import (
    ALL,
    Score,
    score_dialogues,
    score_tasks,
    write_answers,
)
from phase2_finetuning.project4_instruction_tuning.sft import (
    ConversationBatches,
    Count,
    answer_loss,
    describe,
    make_examples,
)
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES, Task, make_tasks
from phase2_finetuning.project4_instruction_tuning.templates import PLAIN, TEMPLATES, TEXT, ChatTemplate

ANSWER_TOKENS = 48  # of what is written, at most
SHOWN = 3  # answers to look at
FILES = "conversations"  # the name under which those from files are scored


class Data(NamedTuple):
    """What a run learns from, and what it is judged by."""

    train: list[Conversation]
    validation: list[Conversation]
    tasks: list[Task]  # to be answered before and after
    files: list[Conversation]  # the part of `validation` that comes from files


class Result(NamedTuple):
    """What a run has shown."""

    losses: list[float]  # of each step, nats per token
    before: Scores
    after: Scores


def run(config: Config, world: World | None = None) -> Result:
    """Tune and return what that did; main() calls it, and so do the tests, with a tiny config."""
    world = world or World()
    model, tokenizer = load_model(config.model)
    template = choose_template(config.data.template, tokenizer)
    data = load_data(config.data, config.train.seed)
    world.print(f"base        {config.model}, to be tuned with the template {template.name}")
    judge = Judge(data, config.train, world)
    before = judge.score(model, tokenizer, base_template(template, tokenizer))
    losses = make_trainer(config, data, model, tokenizer, template, world).train()
    if world.rank > 0:
        return Result(losses, {}, {})
    after = judge.score(*load_model(config.train.out / "model.pt"), template)
    judge.report([before, after])
    return Result(losses, before, after)


def choose_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the template by name; auto: the one whose marks the tokenizer has, else the course's own."""
    if name != "auto":
        return TEMPLATES[name]
    known = tokenizer.special_tokens.keys()
    fitting = (each for each in TEMPLATES.values() if each is not TEXT and known >= set(each.specials))
    return next(fitting, PLAIN)


def base_template(template: ChatTemplate, tokenizer: Tokenizer) -> ChatTemplate:
    """Return what an untuned model is asked with: the template, or mere text if the marks are new to it."""
    known = tokenizer.special_tokens.keys()
    return template if known >= set(template.specials) or not known >= set(TEXT.specials) else TEXT


def load_data(config: DataConfig, seed: int) -> Data:
    """Make the tasks and read the files; what is learned from is apart from what judges it."""
    data = Data([], [], [], [])
    if TASKS in config.data:
        families = config.families or list(FAMILIES)
        data.train.extend(
            as_conversations(make_tasks(families, config.train_tasks, seed), config.turns, seed)
        )
        held_out = make_tasks(families, 2 * config.test_tasks, seed, "test")  # of which none comes twice
        data.tasks.extend(held_out[: config.test_tasks])
        data.validation.extend(as_conversations(held_out[config.test_tasks :], config.turns, seed))
    for name in config.data:
        if name == TASKS:
            continue
        conversations = load_conversations(name, config.limit)
        Random(seed).shuffle(conversations)
        cut = round(len(conversations) * config.validation_share)
        data.files.extend(conversations[:cut])
        data.train.extend(conversations[cut:])
    data.validation.extend(data.files)
    return data


def as_conversations(tasks: Sequence[Task], turns: int, seed: int) -> list[Conversation]:
    """Return tasks as questions and answers, one to `turns` of them in a conversation."""
    draw, conversations, left = Random(seed), list[Conversation](), list(tasks[::-1])
    while left:
        chosen = [left.pop() for _ in range(min(draw.randint(1, turns), len(left)))]
        pairs = ([Message("user", each.prompt), Message("assistant", each.answer)] for each in chosen)
        conversations.append([message for pair in pairs for message in pair])
    return conversations


def opening(conversation: Conversation) -> tuple[Conversation, str]:
    """Return what is said before the assistant's first answer, and that answer."""
    first = next(i for i in range(1, len(conversation)) if conversation[i].role == "assistant")
    return conversation[:first], conversation[first].content


def answer(
    model: Decoder, tokenizer: Tokenizer, template: ChatTemplate, conversations: Sequence[Conversation]
) -> list[str]:
    """Return what a model says where the assistant first speaks in each conversation."""
    prompts = [template.encode(tokenizer, opening(each)[0], answer=True)[0] for each in conversations]
    longest = min(ANSWER_TOKENS, model.config.block_size // 2)
    written = write_answers(model, prompts, longest, template.stop(tokenizer))
    return [tokenizer.decode(ids) for ids in written]


def make_trainer(
    config: Config,
    data: Data,
    model: Decoder,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    world: World,
    loss: Loss = answer_loss,
    **options: Any,
) -> Trainer:
    """Return a trainer of the model on the conversations, or of the one to go on with.

    `options` go to the trainer as they are.
    """
    train, how = config.train, config.data
    model, tokenizer = resize_embeddings(model, tokenizer, template.specials)
    file = make_folder(train.out) / "tokenizer.json"
    tokenizer.save(file)
    T = min(how.block_size, model.config.block_size)
    encoding = (template, tokenizer, T, how.learn == "everything")
    packing = (T, how.batch_size, train.seed, how.packing)
    ranks = (world.rank, world.size)
    examples, count = make_examples(data.train, *encoding)
    world.print(f"training    {describe(count)}")
    batches = ConversationBatches(examples, *packing, *ranks)
    world.print(f"rows        {len(batches.contents):,} of {T} tokens, {batches.batches:,} batches an epoch")
    held_out, held_out_count = make_examples(data.validation, *encoding)
    world.print(f"validation  {describe(held_out_count)}")
    validation = None
    if held_out:
        validation = ConversationBatches(held_out, *packing, *ranks, endless=False)
        train = replace(train, eval_batches=min(train.eval_batches, validation.batches))
    asked = Random(train.seed).sample(data.validation, min(SHOWN, len(data.validation)))

    def sample(model: Any) -> str:
        written = answer(model, tokenizer, template, asked)
        pairs = zip(asked, written, strict=True)
        return "\n".join(f"  {opening(each)[0][-1].content[:80]!r} -> {text!r}" for each, text in pairs)

    digest = hashlib.sha256(batches.ids.tobytes() + batches.learned.tobytes()).hexdigest()[:12]
    trainer = Trainer(
        model,
        batches,
        train,
        NEFTune(loss, train.neftune_alpha),
        validation=validation,
        sample=sample if asked else None,
        entries={"tokenizer": file.read_text(encoding="utf-8")},
        settings=config.to_dict() | {"sha256_of_examples": digest},
        world=world,
        **options,
    )
    if isinstance(model, Decoder):
        trainer.operations = operations_per_answer_token(model, T, count)
    return trainer


def operations_per_answer_token(model: Decoder, T: int, count: Count) -> float:
    """Return the operations to learn a token, with those to read its prompt, which needs no head."""
    config, head = model.config, 6 * model.head.weight.numel()
    # model.flops_per_token() is for rows of block_size tokens; ours have T.
    shorter = 12 * config.n_layer * config.n_head * config.head_width * (config.block_size - T)
    return count.tokens / count.learned * (model.flops_per_token() - shorter - head) + head


class Judge:
    """Scores a model before and after, and remembers what it said."""

    def __init__(self, data: Data, config: TuneConfig, world: World) -> None:
        self.data, self.out, self.rank = data, config.out, world.rank
        self.device = world.device(config.device)
        self.dtype = pick_dtype(config.precision, self.device)
        self.answers: list[list[str]] = []  # of each model that was scored, to the conversations shown

    @torch.no_grad()
    def score(self, model: Decoder, tokenizer: Tokenizer, template: ChatTemplate) -> Scores:
        """Return a model's scores by family of tasks, and on conversations; the first process does it."""
        scores: Scores = {}
        if self.rank > 0:
            return scores
        asked = model.to(self.device).eval(), tokenizer, template
        with autocast(self.device, self.dtype):
            if self.data.tasks:
                longest = min(ANSWER_TOKENS, model.config.block_size // 2)
                scores, _ = score_tasks(*asked, self.data.tasks, longest)
            if self.data.files:
                scores[FILES] = sum(score_dialogues(*asked, self.data.files), Score())
            self.answers.append(answer(*asked, self.data.files[:SHOWN]))
        return scores

    def report(self, results: Sequence[Scores]) -> None:
        """Print the tables, before and after, and write scores.csv."""
        if self.data.tasks:
            print_tasks(results, [*dict.fromkeys(task.family for task in self.data.tasks), ALL])
        if self.data.files:
            print_file("held-out conversations", [scores[FILES] for scores in results])
        for dialogue, *said in zip(self.data.files[:SHOWN], *self.answers, strict=True):
            prompt, reference = opening(dialogue)
            print(f"\n{prompt[-1].content!r}")
            for name, text in zip(("before", "after", "reference"), (*said, reference), strict=True):
                print(f"  {name:10} {text!r}")
        with atomic_write(self.out / "scores.csv") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["family", "answers", "right_before", "right_after", "loss_before", "loss_after"])
            for name in results[0]:
                one, other = (scores[name] for scores in results)
                writer.writerow([name, one.answers, one.right, other.right, one.loss, other.loss])
        print(f"written to {self.out}: scores.csv")


@script
def main() -> None:
    """Parse, print, tune."""
    config = Config.from_cli()
    with join_world(config.train.device) as world:
        world.print(config.to_yaml(), end="")
        run(config, world)
        model = "" if config.train.out == OUT else f" --model {shown(config.train.out / 'model.pt')}"
        world.print(f"next: uv run python phase2_finetuning/project4_instruction_tuning/chat.py{model}")


if __name__ == "__main__":
    main()
