r"""The gradient of a batch that is too large for one pass: in parts, by several processes, token by token.

PAPERS
  [1] GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism, Huang et al., 2018,
      arXiv:1811.06965 (micro-batches)
  [2] PyTorch Distributed: Experiences on Accelerating Data Parallel Training, Li et al., 2020,
      arXiv:2006.15704 (no_sync)
  [3] Mixed Precision Training, Micikevicius et al., 2017, arXiv:1710.03740

SYMBOLS
  rows  sequences: the first size of every tensor of a batch
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phase1_foundation.project1_minimal_gpt.train import autocast
from phase1_foundation.project3_pretrain.distributed import ParallelModel

Loss = Callable[
    [Any, Any], tuple[Tensor, Tensor | int]
]  # (model, batch) -> (sum of losses, number of tokens)


def add_up_losses(
    model: ParallelModel,
    loss: Loss,
    batch: Any,
    device: torch.device,
    rows: int = 0,
    dtype: torch.dtype = torch.float32,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Return (sum of losses, tokens) of a batch over all processes; leave the sum's gradient in the weights.

    PAPER: [1] Sec. 2.2 adds up gradients over micro-batches; [2] Sec. 3.2.4 over processes after the last.
    PAPER CONTEXT: What fits no memory at once is computed in parts, and by several processes. The mean of
        the parts' means, as most code takes it, is the batch's only if all parts have equally many tokens.
        With padding, packing or masked prompts they do not; well-known trainers got it wrong until 2024.
    INTUITION: The average over a school is not the average of its classes' averages: add up all marks, and
        divide once.
    IMPLEMENTATION: Sums all the way; the caller divides by the total count. In fp16 each sum is scaled first
        ([3] Sec. 3.2), and the caller divides by that, too. Under no_grad nothing is left in the weights, so
        evaluation is this function as well. A loss over no tokens must still be a sum: 0.
    WHY: A test holds the float64 gradient of uneven micro-batches to the whole batch's within 1e-12, and
        finds that of the mean of means off by a tenth.
    """
    totals = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    parts = split_rows(batch, rows)
    for number, part in enumerate(parts, start=1):
        part = to_device(part, device)
        with model.syncing(last=number == len(parts)):
            with autocast(device, dtype):
                total, count = model(loss, part)
            if torch.is_grad_enabled():
                (scaler.scale(total) if scaler else total).backward()
        totals[0] += total.detach()
        totals[1] += count
    return model.world.sum(totals)


def split_rows(batch: Any, rows: int) -> list[Any]:
    """Return a batch in parts of at most so many rows, the last one maybe smaller; 0 leaves it whole."""
    if not rows:
        return [batch]
    sizes = {len(tensor) for tensor in tensors(batch)}
    if len(sizes) != 1:
        raise ValueError(f"batch (tensors of {sorted(sizes)} rows) must have tensors of equally many rows")
    begins = range(0, sizes.pop(), rows)
    return [each_tensor(batch, lambda tensor, i=i: tensor[i : i + rows]) for i in begins]  # type: ignore[misc]


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return a batch on a device."""
    return each_tensor(batch, lambda tensor: tensor.to(device, non_blocking=True))


def each_tensor(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch with each of its tensors changed: a record, dict, list or tuple, or one in the other."""
    if isinstance(batch, Tensor):
        return change(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {
            field.name: each_tensor(getattr(batch, field.name), change) for field in dataclasses.fields(batch)
        }
        return dataclasses.replace(batch, **fields)
    if isinstance(batch, dict):
        return {name: each_tensor(value, change) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        values = [each_tensor(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch."""
    found: list[Tensor] = []
    each_tensor(batch, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found
