r"""A model made ready for each way to tune it, and made whole again from what was saved.

PAPERS
  [1] LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., 2021, arXiv:2106.09685
  [2] QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers et al., 2023, arXiv:2305.14314
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.loss import Batch
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.sft import answer_loss
from phase2_finetuning.project5_lora.adapter_files import load_adapter, save_adapter
from phase2_finetuning.project5_lora.adapters import add_adapter, merge, unmerge, use_adapters
from phase2_finetuning.project5_lora.config import AdapterConfig
from phase2_finetuning.project5_lora.lora import Recipe
from phase2_finetuning.project5_lora.lora_plus import make_adapter_optimizers
from phase2_finetuning.project5_lora.prompt_files import load_prompt, prompt_kind, save_prompt
from phase2_finetuning.project5_lora.prompt_tuning import PrefixTuned, PromptTuned
from phase2_finetuning.project5_lora.qlora import quantize_linears

VIRTUAL = ("prefix", "prompt")  # methods that put virtual tokens before the text


def recipe_of(config: AdapterConfig) -> Recipe:
    """Return the adapter that a method trains."""
    switches = {name: config.method == name for name in ("rslora", "dora", "pissa")}
    return Recipe(config.rank, config.alpha, config.lora_dropout, tuple(config.targets), **switches)


def prepare(model: Decoder, config: AdapterConfig, words: list[int] | None = None) -> nn.Module:
    """Return the model with what is to be trained; all else is frozen.

    PAPER: [1] for what is added, [2] Sec. 3 for what it is added to with qlora.
    PAPER CONTEXT: Each method came with a fork of some library. What they share is a frozen model and a small
        thing beside it, and that is all that the trainer has to know.
    INTUITION: One workbench, nine tools.
    IMPLEMENTATION: rslora, dora and pissa are switches of one adapter; lora_plus is an optimizer; qlora packs
        the matrices first. prefix and prompt wrap the model; `words` are tokens that they begin at.
    WHY: Every method trains in the same loop on the same batches, so a difference is the method's.
    """
    model.train()
    if config.method == "full":
        return model.requires_grad_(True)
    if config.method in VIRTUAL:
        kind = PrefixTuned if config.method == "prefix" else PromptTuned
        return kind(model, config.virtual_tokens, words)
    if config.method == "qlora":
        quantize_linears(model)
    add_adapter(model, recipe_of(config))
    return model


def trainer_options(config: AdapterConfig) -> dict[str, Any]:
    """Return what project 3's Trainer has to be told about a method."""
    if config.method == "full" and config.adam_bits == 32:
        return {}
    ratio = config.lr_ratio if config.method == "lora_plus" else 1.0
    options: dict[str, Any] = {"trained_only": config.method != "full"}
    options["optimizers"] = partial(make_adapter_optimizers, ratio=ratio, bits=config.adam_bits)
    return options | ({"loss": one_text_loss} if config.method in VIRTUAL else {})


def one_text_loss(model: Decoder, batch: Batch) -> tuple[Tensor, int]:
    """Return the loss of rows that hold one text each: padding behind it needs no mask."""
    return answer_loss(model, replace(batch, documents=None))


def save_tuned(model: nn.Module, folder: Path, base: str) -> Path:
    """Write what was trained, in peft's files; `base` is the name of the model that it belongs to."""
    if isinstance(model, PrefixTuned | PromptTuned):
        return save_prompt(model, folder, base)
    return save_adapter(model, folder, base=base)  # type: ignore[arg-type]


def load_tuned(
    name: str, folders: Sequence[Path | str], quantize: bool = False
) -> tuple[Any, Tokenizer, list[str]]:
    """Return a model, its tokenizer, and the names of its adapters, one a folder; the last is in use.

    Adapters are named after their folders; one in RUN/adapter after RUN. `quantize` packs the model first.
    A prefix or a prompt stands before the text alone. Raises ValueError or OSError in one line.
    """
    model, tokenizer = load_model(name)
    if quantize:
        quantize_linears(model)
    names: list[str] = []
    for folder in map(Path, folders):
        if prompt_kind(folder):
            if len(folders) > 1:
                raise ValueError(f"adapters ({len(folders)}) must be one: {folder} has virtual tokens")
            return load_prompt(model, folder), tokenizer, [_name_of(folder)]
        names.append(next(name for name in _numbered(_name_of(folder)) if name not in names))
        load_adapter(model, folder, names[-1])
    return model.eval(), tokenizer, names


def _name_of(folder: Path) -> str:
    folder = folder.resolve()
    folder = folder.parent if folder.name == "adapter" else folder
    return re.sub(r"\W+", "_", folder.name)


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in count(2))


def variants(model: Any, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield ("", the model alone), then each adapter's name and the model with it, merged."""
    if isinstance(model, PrefixTuned | PromptTuned):
        yield "", model.model
        yield names[0], model
        return
    for name in ["", *names]:
        use_adapters(model, *([name] if name else []))
        merge(model)
        yield name, model
        unmerge(model)
