"""What packing is worth, and a head for answers only, beside padded rows as transformers learns from them.

uv run python phase2_finetuning/project4_instruction_tuning/benchmark.py
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from common.device import DTYPES, measure_matmul_rate, pick_device, pick_dtype, seed_everything
from common.script import script
from phase1_foundation.project1_minimal_gpt.benchmark import Row, time_in_turn
from phase1_foundation.project1_minimal_gpt.train import autocast
from phase1_foundation.project3_pretrain.accumulation import Loss
from phase1_foundation.project3_pretrain.benchmark import PEER, hugging_face
from phase1_foundation.project3_pretrain.loss import NO_LOSS, Batch, language_model_loss
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.config import BenchmarkConfig
from phase2_finetuning.project4_instruction_tuning.embedding_resize import resize_embeddings
from phase2_finetuning.project4_instruction_tuning.sft import (
    ConversationBatches,
    Example,
    answer_loss,
    describe,
    make_examples,
)
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES, make_tasks
from phase2_finetuning.project4_instruction_tuning.templates import PLAIN
from phase2_finetuning.project4_instruction_tuning.train import as_conversations, operations_per_answer_token


def run(config: BenchmarkConfig) -> list[Row]:
    """Time the gradient of the same conversations in each way, print the table, and return the rows."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    precision = next(name for name, each in DTYPES.items() if each == dtype)
    seed_everything(0)
    model, tokenizer = resize_embeddings(*load_model(config.model), PLAIN.specials)
    T = min(config.block_size, model.config.block_size)
    tasks = make_tasks(list(FAMILIES), 3 * config.conversations, seed=0)
    talks = as_conversations(tasks, turns=3, seed=0)[: config.conversations]
    examples, count = make_examples(talks, PLAIN, tokenizer, T)
    packed, padded = whole(examples, T, packing=True), whole(examples, T, packing=False)
    shapes = " and ".join(f"{len(b.tokens)} rows of {b.tokens.shape[1]}" for b in (packed, padded))
    print(f"{describe(count)}; packed and padded: {shapes}")
    model.to(device).train()
    contestants = {
        "ours": our_gradient(model, packed, answer_loss, dtype),
        "ours, all logits": our_gradient(model, packed, language_model_loss, dtype),
        "ours, padded": our_gradient(model, padded, answer_loss, dtype),
        PEER: their_gradient(hugging_face(model.config).to(device).train(), padded, dtype),
    }
    times = time_in_turn(contestants, config.repeats, device, "gradients")
    operations = operations_per_answer_token(model, T, count)
    rows = [
        Row("gradient", precision, name, seconds, count.learned, operations)
        for name, seconds in times.items()
    ]
    print_table(rows, measure_matmul_rate(device, dtype))
    print(f"medians of {config.repeats} rounds in {precision}, contestants in turn")
    return rows


def whole(examples: list[Example], T: int, packing: bool) -> Batch:
    """Return all examples as one batch."""
    rows = len(ConversationBatches(examples, T, 1, packing=packing).contents)
    return ConversationBatches(examples, T, rows, packing=packing).batch(0)


def our_gradient(model: Decoder, batch: Batch, loss: Loss, dtype: torch.dtype) -> Callable[[], object]:
    """Return what computes the gradient of a batch in the course's way."""
    batch = batch.to(model.head.weight.device)

    def gradient() -> None:
        model.zero_grad()
        with autocast(batch.tokens.device, dtype):
            total, _ = loss(model, batch)
        total.backward()

    return gradient


def their_gradient(model: Any, batch: Batch, dtype: torch.dtype) -> Callable[[], object]:
    """Return what computes the gradient of padded rows with transformers' own loss."""
    batch = batch.to(model.device)
    labels = F.pad(batch.targets, (1, 0), value=NO_LOSS)  # it shifts them back
    tokens = F.pad(batch.tokens, (0, 1))
    seen = F.pad((batch.documents != 0).long(), (0, 1))  # type: ignore[union-attr]

    def gradient() -> None:
        model.zero_grad()
        with autocast(tokens.device, dtype):
            loss = model(tokens, attention_mask=seen, labels=labels, use_cache=False).loss
        loss.backward()

    return gradient


def print_table(rows: list[Row], rate: float) -> None:
    """Print the rows beside the peer's and beside what the hardware could do."""
    peer = next(row for row in rows if row.name == PEER)
    print(f"\n{'':18}{'ms':>9}{'answer tokens/s':>17}{'utilization':>13}{'speed / peer':>14}")
    for row in rows:
        share = row.speed * row.operations / rate
        line = f"{row.name:18}{row.seconds * 1e3:9.1f}{row.speed:17,.0f}{share:13.1%}"
        print(f"{line}{row.speed / peer.speed:14.2f}")


@script
def main() -> None:
    """Parse and measure."""
    run(BenchmarkConfig.from_cli())


if __name__ == "__main__":
    main()
