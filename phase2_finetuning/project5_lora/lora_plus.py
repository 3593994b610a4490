r"""The optimizer of an adapter: only what is trained, with a faster B if asked (LoRA+), in 8 bits if asked.

PAPERS
  [1] LoRA+: Efficient Low Rank Adaptation of Large Models, Hayou, Ghosh & Yu, 2024, arXiv:2402.12354
  [2] 8-bit Optimizers via Block-wise Quantization, Dettmers, Lewis, Shleifer & Zettlemoyer, 2021,
      arXiv:2110.02861

SYMBOLS (code = paper)
  lr = eta_A    ratio = lambda = eta_B / eta_A    [1]
"""

from torch import nn
from torch.optim import Optimizer

from phase1_foundation.project1_minimal_gpt.config import OptimizerConfig
from phase1_foundation.project1_minimal_gpt.optimizer import AdamW
from phase2_finetuning.project5_lora.adamw8bit import AdamW8bit
from phase2_finetuning.project5_lora.lora import LowRank


def make_adapter_optimizers(
    model: nn.Module, config: OptimizerConfig, ratio: float = 1.0, bits: int = 32
) -> list[Optimizer]:
    """Return one AdamW for the weights that are trained; B's learn `ratio` times as fast as all others.

    PAPER: [1]: eta_B = lambda eta_A, lambda about 16; `bits` = 8, [2].
    PAPER CONTEXT: LoRA gives A and B one learning rate. [1] lets the width n of a model grow and finds that
        then one of the two always learns too little: features move as they should only if A's rate falls as
        1 / n and B's stays.
    INTUITION: A reads thousands of inputs and adds them up, so small steps suffice; B starts from nothing and
        is short.
    IMPLEMENTATION: Groups by rate; lengths (DoRA) learn as fast as B, as in peft, but do not decay, as they
        do there: a length belongs near that of its row. Each group remembers its peak rate, which the
        trainer's schedule scales.
    WHY: What learns at which rate equals peft's create_loraplus_optimizer (a test).
    """
    parts = [module for module in model.modules() if isinstance(module, LowRank)]
    fast = {id(weight) for part in parts for weight in (*part.B, *part.magnitude)}
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    def group(weights: list[nn.Parameter], lr: float, decay: float) -> dict:
        return {"params": weights, "lr": lr, "peak_lr": lr, "weight_decay": decay}

    slow = [weight for weight in trained if id(weight) not in fast]
    matrices = [weight for weight in trained if id(weight) in fast and weight.dim() > 1]
    lengths = [weight for weight in trained if id(weight) in fast and weight.dim() == 1]
    groups = [
        group(slow, config.lr, config.weight_decay),
        group(matrices, config.lr * ratio, config.weight_decay),
        group(lengths, config.lr * ratio, 0.0),
    ]
    groups = [each for each in groups if each["params"]]
    betas = (0.9, config.beta2)
    if bits == 8:
        return [AdamW8bit(groups, lr=config.lr, betas=betas)]
    return [AdamW(groups, lr=config.lr, betas=betas, fused=True)]
