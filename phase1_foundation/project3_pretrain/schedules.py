r"""The learning rate over a run: along a cosine, or constant with a short fall at the end.

PAPERS
  [1] SGDR: Stochastic Gradient Descent with Warm Restarts, Loshchilov & Hutter, 2016, arXiv:1608.03983
  [2] MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies,
      Hu et al., 2024, arXiv:2404.06395 (warmup-stable-decay)
  [3] Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations, Hägele et al., 2024,
      arXiv:2405.18392

SYMBOLS (code = [3])
  step = n               steps done
  max_steps = N          length of the run
  decay_steps = N_decay  length of the fall
"""

import math

from phase1_foundation.project1_minimal_gpt.optimizer import lr_factor
from phase1_foundation.project3_pretrain.config import TrainConfig


def lr_share(step: int, config: TrainConfig) -> float:
    """Return the share of the peak learning rate at a step, by the schedule that the config names.

    PAPER: the cosine, [1] Eq. 5, is project 1's; the other, [2] and [3].
    PAPER CONTEXT: A cosine reaches its end at the step that was announced, and nowhere else: a run half as
        long, or one that goes on, is another run from the start. [2] and [3] hold the rate instead.
    INTUITION: Walk at full pace, and slow down only once it is decided that this is the end.
    IMPLEMENTATION: A function of the step, with no state: a resumed run needs nothing but its step.
    WHY: Because a run under "wsd" is the same up to its fall whatever max_steps is (a test), a checkpoint
        from before the fall can be resumed with a larger max_steps as if that had been meant from the start.
    """
    return warmup_stable_decay(step, config) if config.schedule == "wsd" else lr_factor(step, config)


def warmup_stable_decay(step: int, config: TrainConfig) -> float:
    r"""Return the share of the peak: a straight rise, a plateau, and a fall as 1 - sqrt over the last steps.

    PAPER: [2] names the three stages (WSD); [3] the shape of the fall, "(1-sqrt)".
    PAPER CONTEXT: [2] lets the rate fall exponentially over about a tenth of the run. [3] compares shapes and
        lengths: 1 - sqrt beats a straight line, and a fall over a fifth of the run matches the cosine.
    INTUITION: Large steps travel far along a valley, but bounce between its walls. Small ones sink to its
        floor, so the loss drops visibly during the fall.
    IMPLEMENTATION: As project 1's: step 0 already moves, and min_lr_fraction is what step max_steps would
        have. If warm-up and fall overlap, the smaller of the two holds.
    WHY: At its first step of n the fall takes off 1 / sqrt(n) at once, where a line takes 1 / n (a test).
    """
    decay_steps = max(1, round(config.decay_fraction * config.max_steps))
    fallen = (step - (config.max_steps - decay_steps)) / decay_steps  # 0 where the fall begins, 1 at its end
    share = 1 - (1 - config.min_lr_fraction) * math.sqrt(min(1.0, max(0.0, fallen)))
    risen = (step + 1) / config.warmup_steps if step < config.warmup_steps else 1.0
    return min(risen, share)
