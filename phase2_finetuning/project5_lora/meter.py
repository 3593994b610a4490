r"""How much memory tensors really take: every one is counted when it is made and when it goes.

PAPERS
  [1] PyTorch: An Imperative Style, High-Performance Deep Learning Library, Paszke et al., 2019,
      arXiv:1912.01703
"""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phase1_foundation.project3_pretrain.loss import Batch, language_model_loss
from phase2_finetuning.project5_lora.ledger import Ledger


class Meter(TorchDispatchMode):
    """Within `with Meter() as meter:` counts the bytes of tensors: those alive now, and the most there were.

    PAPER: none; [1] Sec. 5.5: a tensor's memory is freed at once when its last reference goes.
    PAPER CONTEXT: On a GPU torch's allocator keeps count. On a CPU the operating system does, in pages, with
        libraries, code and what malloc does not give back among them.
    INTUITION: A doorkeeper with a counter: one click in, one click out.
    IMPLEMENTATION: Every operation on tensors passes __torch_dispatch__. A tensor's storage (views share one)
        is counted once, and a weak reference tells when it is freed, also if only autograd held it. What an
        operation allocates inside and frees again is not seen.
    WHY: Counts equal the sizes of tensors made and dropped to the byte (a test), so that the ledger's
        columns can be told apart, as no allocator could.
    """

    def __init__(self, *there: Tensor) -> None:
        """Begin with the tensors that are there already."""
        super().__init__()
        self.alive: dict[int, int] = {}  # bytes of each storage
        self.now = self.peak = 0
        self.note(there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        self.note(tree_leaves(result))
        return result

    def note(self, values: Iterable[Any]) -> None:
        """Count the storages of the tensors among some values, unless they are counted already."""
        for value in values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def measure(model: nn.Module, optimizer: Optimizer, batch: Batch) -> tuple[Ledger, int]:
    """Train two micro-batches; return the ledger at the end of the second forward pass, and the peak.

    At that moment all four columns are there: the gradients are the first micro-batch's.
    """
    step(model, optimizer, batch)  # the first step makes the optimizer's averages
    weights = [*model.parameters(), *model.buffers()]
    averages = tree_leaves([list(state.values()) for state in optimizer.state.values()])
    with Meter(*weights, *averages, batch.tokens, batch.targets) as meter:
        loss, _ = language_model_loss(model, batch)  # type: ignore[arg-type]
        loss.backward()
        before = meter.now
        loss, _ = language_model_loss(model, batch)  # type: ignore[arg-type]
        gradients = [weight.grad for weight in model.parameters()]
        ledger = Ledger(size(weights), size(gradients), size(averages), meter.now - before)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return ledger, meter.peak


def step(model: nn.Module, optimizer: Optimizer, batch: Batch) -> None:
    """Train one micro-batch."""
    loss, _ = language_model_loss(model, batch)  # type: ignore[arg-type]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def size(values: Iterable[Any]) -> int:
    """Return the bytes of the tensors among some values; what shares a storage counts once."""
    meter = Meter()
    meter.note(values)
    return meter.now
