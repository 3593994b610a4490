r"""Updates that would do harm, and how to tell them before they are made.

PAPERS
  [1] PaLM: Scaling Language Modeling with Pathways, Chowdhery et al., 2022, arXiv:2204.02311
  [2] 2 OLMo 2 Furious, Team OLMo, 2024, arXiv:2501.00656

SYMBOLS
  loss   of the step's whole batch, nats per token, before the update
  length  of the gradient of all weights together, before clipping
"""

import math
import statistics
from collections import deque
from typing import Any

WINDOW = 128  # steps that a new one is compared with
PATIENCE = 5  # updates skipped in a row, after which training stops


class SpikeGuard:
    """Say whether an update should be skipped: its loss or gradient is no number, or stands out too far.

    PAPER: [1] Sec. 5.1 skips the batches around a spike, by hand; the rule here is that of [2]'s code.
    PAPER CONTEXT: [1] saw about twenty spikes of the loss in one run despite clipping, went back 100 steps
        each time and left out 200 to 500 batches. The same batches did no harm from another checkpoint.
    INTUITION: Clipping shortens a bad step, but still goes its way, and the optimizer's averages remember it
        for long. An update that is skipped leaves no trace.
    IMPLEMENTATION: "Too far" is `sigmas` standard deviations above the mean of the last 128 steps, once half
        of these are known. A skipped value joins them, so a new level is accepted after a few steps; what is
        no number does not. Five skips in a row stop the run, whose last checkpoint is still good.
    WHY: A single NaN in a gradient makes every weight NaN, for good: a test feeds one to a trainer.
    """

    def __init__(self, sigmas: float = 6.0) -> None:
        """Take the number of standard deviations; 0 lets pass whatever is a number."""
        self.sigmas = sigmas
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.lengths: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0  # skipped just now
        self.skipped = 0  # in all

    def judge(self, loss: float, length: float, tokens: int = 1) -> str:
        """Return why the update must be skipped, or nothing. Raises ValueError after too many in a row."""
        wrong = (
            [self._what_is_wrong("loss", loss, self.losses)]
            if tokens
            else ["there is no token to learn from"]
        )
        wrong.append(self._what_is_wrong("gradient's length", length, self.lengths))
        reason = " and ".join(filter(None, wrong[: 2 if tokens else 1]))
        self.in_a_row = self.in_a_row + 1 if reason else 0
        self.skipped += bool(reason)
        if self.in_a_row >= PATIENCE:
            raise ValueError(
                f"updates skipped in a row ({self.in_a_row}) must be below {PATIENCE}; the last, because "
                f"{reason}. The last checkpoint is as it was; a lower lr or another seed may help"
            )
        return reason

    def _what_is_wrong(self, name: str, value: float, history: deque[float]) -> str:
        """Return what is wrong with a value, and remember it."""
        if not math.isfinite(value):
            return f"the {name} is {value}"
        limit = math.inf
        if self.sigmas and len(history) >= WINDOW // 2:
            limit = statistics.fmean(history) + self.sigmas * statistics.pstdev(history)
        history.append(value)
        return f"the {name} {value:.3g} is above {limit:.3g}" if value > limit else ""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {
            "losses": list(self.losses),
            "lengths": list(self.lengths),
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.losses.extend(state["losses"])
        self.lengths.extend(state["lengths"])
        self.in_a_row, self.skipped = state["in_a_row"], state["skipped"]
