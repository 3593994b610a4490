"""Measure a model on texts and questions: uv run python phase1_foundation/project3_pretrain/evaluate.py

Bits per byte stand beside those of bzip2 -9 on the same bytes; accuracies beside guessing.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from common.corpora import documents
from common.device import pick_device, pick_dtype
from common.script import script
from phase1_foundation.project1_minimal_gpt.train import autocast, find_text
from phase1_foundation.project2_tokenizer.token_file import load_tokenizer
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.config import SHARDS, EvaluateConfig
from phase1_foundation.project3_pretrain.likelihood import (
    TaskScore,
    TextScore,
    answer_questions,
    bzip2_bits_per_byte,
    score_text,
    standard_error,
)
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.questions import load_questions
from phase1_foundation.project3_pretrain.shards import TOKENIZER, documents_of, load_manifest, open_shard
from phase1_foundation.project3_pretrain.weights import load_model

LONGEST = 2048  # context unless another one is asked for


def run(config: EvaluateConfig) -> dict[str, TextScore | TaskScore]:
    """Measure, print a line each, and return the scores by the names of texts and tasks."""
    device = pick_device(config.device)
    model, tokenizer = load_model(config.model)
    model.to(device)
    sizes = f"{model.count_parameters():,} parameters, {tokenizer.vocab_size:,} tokens"
    print(f"model       {config.model}: {sizes}")
    results: dict[str, TextScore | TaskScore] = {}
    with autocast(device, pick_dtype(config.precision, device)):
        for name in config.data or ([] if config.tasks else [str(SHARDS)]):
            results[name] = measure_text(model, tokenizer, name, config)
        for name in config.tasks:
            results[name] = measure_task(model, tokenizer, name, config)
    return results


def measure_text(model: Decoder, tokenizer: Tokenizer, name: str, config: EvaluateConfig) -> TextScore:
    """Print and return how well a text is predicted, beside a compressor."""
    context = config.context or min(model.config.block_size, LONGEST)
    texts = list(read_texts(name, config.source))
    score, told = score_text(model, tokenizer, texts, context, config.stride, config.limit_tokens)
    part = "the beginning of " if config.limit_tokens and score.tokens >= config.limit_tokens else ""
    sizes = f"{score.text_bytes:,} bytes, {score.words:,} words, {score.tokens:,} tokens"
    print(f"text        {part}{name}: {sizes}")
    stride = config.stride or context
    past = "consecutive" if stride == context else f"at least {context - stride:,} tokens of past"
    print(f"windows     context {context:,}, stride {stride:,}: {past}")
    print(f"perplexity  {score.perplexity:,.3f} per token, {score.word_perplexity:,.2f} per word; "
          f"loss {score.nats / score.tokens:.4f} nats per token")  # fmt: skip
    bzip2 = bzip2_bits_per_byte(told)
    less = 1 - score.bits_per_byte / bzip2
    verdict = f"{abs(less):.1%} {'less' if less >= 0 else 'more'}"
    print(f"bits/byte   {score.bits_per_byte:.4f}; bzip2 -9 needs {bzip2:.4f}: the model needs {verdict}\n")
    return score


def measure_task(model: Decoder, tokenizer: Tokenizer, name: str, config: EvaluateConfig) -> TaskScore:
    """Print and return how many questions are answered well."""
    score = answer_questions(model, tokenizer, load_questions(name, config.source, config.limit_questions))
    share = score.accuracy if score.normalized is None else score.normalized
    error = f"± {standard_error(share, score.questions):.1%}"
    line = f"{Path(name).name:12}{score.questions:,} questions: "
    if score.normalized is None:
        line += f"last word {share:.1%} {error}, its perplexity {score.perplexity:,.2f}"
    else:
        line += f"accuracy {score.accuracy:.1%}, by likelihood per byte {share:.1%} {error}"
        line += f" (guessing {score.chance:.0%})"
    print(line)
    return score


def read_texts(name: str, source: str = "auto") -> Iterator[str]:
    """Yield the documents of a text file or corpus, or of the validation part of a folder of shards."""
    folder = Path(name)
    if not folder.is_dir() and folder != SHARDS:
        yield from documents(find_text(name, source))
        return
    manifest = load_manifest(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    for shard in manifest.of("validation"):
        for ids in documents_of(open_shard(folder, manifest, shard), manifest.separator):
            yield tokenizer.decode(ids.tolist())


@script
def main() -> None:
    """Parse and measure."""
    torch.set_grad_enabled(False)
    run(EvaluateConfig.from_cli())


if __name__ == "__main__":
    main()
