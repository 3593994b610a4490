r"""Pairs of a better and a worse answer: the model's own, judged by a checker, or people's, from files.

PAPERS
  [1] Direct Preference Optimization: Your Language Model is Secretly a Reward Model, Rafailov et al., 2023,
      arXiv:2305.18290 (DPO)
  [2] Learning to summarize from human feedback, Stiennon et al., 2020, arXiv:2009.01325
  [3] Training a Helpful and Harmless Assistant with Reinforcement Learning from Human Feedback, Bai et al.,
      2022, arXiv:2204.05862 (the dialogues of the set `hh`)
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.files import atomic_write, shown
from common.script import progress
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.distributed import World
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.conversation_files import load_preferences
from phase2_finetuning.project4_instruction_tuning.conversations import Message, Preference
from phase2_finetuning.project4_instruction_tuning.scoring import answer_pairs
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES, Task, is_right, make_tasks
from phase2_finetuning.project4_instruction_tuning.templates import ChatTemplate, template_for
from phase2_finetuning.project6_alignment.config import SFT_COMMAND, SFT_MODEL, PairsConfig
from phase2_finetuning.project6_alignment.rollouts import sample

PROMPTS = 64  # answered at once


class Pair(NamedTuple):
    """Two answers to a prompt, in tokens, with the marks that end them."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Answer(NamedTuple):
    """What a model wrote."""

    ids: list[int]  # with the mark that ends it, if it came to that
    text: str
    right: bool


def load_policy(name: str) -> tuple[Decoder, Tokenizer, ChatTemplate]:
    """Return a model that answers, its tokenizer and its chat template."""
    if Path(name) == SFT_MODEL and not SFT_MODEL.is_file():
        raise FileNotFoundError(f"there is no checkpoint {name}; make it with: {SFT_COMMAND}")
    model, tokenizer = load_model(name)
    return model, tokenizer, template_for(tokenizer)


def encode_tasks(tokenizer: Tokenizer, template: ChatTemplate, tasks: Sequence[Task]) -> list[list[int]]:
    """Return tasks as the model is asked them, up to where it answers."""
    return [template.encode(tokenizer, [Message("user", task.prompt)], answer=True)[0] for task in tasks]


def sample_answers(
    model: Decoder,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    tasks: Sequence[Task],
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 32,
    seed: int = 0,
) -> list[list[Answer]]:
    """Return `samples` answers of a model to each task. One that was cut off is wrong."""
    prompts = encode_tasks(tokenizer, template, tasks)
    order = sorted(range(len(tasks)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
    answers: list[list[Answer]] = [[] for _ in tasks]
    stop = template.stop(tokenizer)
    bar = progress(range(len(tasks)), desc="answering", leave=False, delay=2)
    for first in range(0, len(order), PROMPTS):
        group = order[first : first + PROMPTS]
        rollout = sample(
            model,
            [prompts[i] for i in group],
            max_new_tokens,
            temperature,
            stop,
            (seed * 1_000_003 + first) % 2**63,
            samples,
        )
        rows = zip(rollout.tokens, rollout.mask, rollout.answers(), rollout.stopped.tolist(), strict=True)
        for number, (tokens, mask, said, stopped) in enumerate(rows):
            i = group[number // samples]
            text = tokenizer.decode(said)
            answers[i].append(Answer(tokens[mask].tolist(), text, stopped and is_right(tasks[i], text)))
        bar.update(len(group))
    bar.close()
    return answers


def task_pairs(
    model: Decoder, tokenizer: Tokenizer, template: ChatTemplate, config: PairsConfig, seed: int
) -> tuple[list[Pair], str]:
    r"""Return pairs of a right and a wrong answer, both written by the model itself, and a line about them.

    PAPER: [1] Sec. 4 and [2] Sec. 3.1 compare answers that the model to be trained has sampled.
    PAPER CONTEXT: There people judge. Where a program can, as for tasks with one right answer, judging is
        free and never in doubt.
    INTUITION: Learn from your own mistakes: what others get wrong you may not even be tempted to say.
    IMPLEMENTATION: Several answers to each task at temperature 1. Each different wrong answer makes a pair
        with a right one, if there is any. Prompts that are always, or never, answered well teach nothing
        here.
    WHY: A gap between two answers that the model would hardly write is quickly widened, and changes nothing
        that it does write.
    """
    tasks = make_tasks(config.families or list(FAMILIES), config.tasks, seed)
    how = (config.samples, config.temperature, config.max_new_tokens, seed)
    answers = sample_answers(model, tokenizer, template, tasks, *how)
    pairs = []
    for prompt, group in zip(encode_tasks(tokenizer, template, tasks), answers, strict=True):
        right = list({tuple(answer.ids): answer.ids for answer in group if answer.right}.values())
        wrong = list({tuple(answer.ids): answer.ids for answer in group if not answer.right}.values())
        pairs += [Pair(prompt, right[i % len(right)], ids) for i, ids in enumerate(wrong) if right]
    share = np.mean([answer.right for group in answers for answer in group])
    mixed = sum(0 < sum(answer.right for answer in group) < len(group) for group in answers)
    asked = f"{len(tasks):,} tasks, {config.samples} answers each, {share:.1%} right"
    return pairs, f"{asked}; {mixed:,} tasks with right and wrong ones give {len(pairs):,} pairs"


def preference_pairs(
    tokenizer: Tokenizer, template: ChatTemplate, preferences: Sequence[Preference], longest: int
) -> tuple[list[Pair], str]:
    """Return people's pairs in tokens, and a line about what was left out: too long, or two equal answers."""
    pairs = []
    for prompt, chosen, rejected in preferences:
        (before, better), (_, worse) = (
            answer_pairs(template, tokenizer, [*prompt, Message("assistant", answer)])[-1]
            for answer in (chosen, rejected)
        )
        if better != worse and len(before) + max(len(better), len(worse)) <= longest:
            pairs.append(Pair(before, better, worse))
    left = len(preferences) - len(pairs)
    return pairs, f"{len(pairs):,} pairs; {left:,} left out: equal answers, or over {longest} tokens"


def find_pairs(
    model: Decoder,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    config: PairsConfig,
    seed: int,
    path: Path,
    world: World,
) -> list[Pair]:
    """Return the pairs that the settings name; those in the file `path`, if it was made from the same ones.

    The first of several processes makes them, and the others read its file.
    """
    names = ("data", "families", "tasks", "samples", "temperature", "max_new_tokens", "longest")
    settings = {name: value for name, value in config.to_dict().items() if name in names}
    settings |= {"seed": seed, "model": fingerprint(model)}
    made = read_pairs(path, settings)
    longest = min(config.longest, model.config.block_size)
    if made is None and world.rank == 0:
        found = [
            task_pairs(model, tokenizer, template, config, seed)
            if name == "tasks"
            else preference_pairs(tokenizer, template, load_preferences(name), longest)
            for name in config.data
        ]
        pairs = [pair for some, _ in found for pair in some]
        order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
        made = [pairs[i] for i in order], "; ".join(told for _, told in found)
        with atomic_write(path) as file:
            json.dump({"settings": settings, "told": made[1], "pairs": made[0]}, file)
    world.wait()
    made = made or read_pairs(path, settings)
    if made is None:
        raise ValueError(f"pairs ({path}) must be those that the first process wrote")
    world.print(f"pairs       {made[1]} ({shown(path)})")
    return made[0][: config.max_pairs or None]


def read_pairs(path: Path, settings: dict[str, Any]) -> tuple[list[Pair], str] | None:
    """Return the pairs of a file and the line about them, if it is whole and made from these settings."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        if there["settings"] == settings:
            return [Pair(*pair) for pair in there["pairs"]], there["told"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return None


def fingerprint(model: torch.nn.Module) -> str:
    """Return a number that changes with any weight."""
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
