r"""The memory of training, from shapes alone: weights, gradients, optimizer, activations.

PAPERS
  [1] ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, Rajbhandari et al., 2019,
      arXiv:1910.02054
  [2] Reducing Activation Recomputation in Large Transformer Models, Korthikanti et al., 2022,
      arXiv:2205.05198
  [3] QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers, Pagnoni, Holtzman & Zettlemoyer, 2023,
      arXiv:2305.14314
  [4] LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., 2021, arXiv:2106.09685

SHAPES
  B  sequences in a micro-batch    C  n_embd       R  ranks of a layer's adapters together
  T  tokens per sequence           M  mlp_width
"""

from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from phase1_foundation.project1_minimal_gpt.optimizer import AdamW
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.cpu_kernels import LONGEST
from phase1_foundation.project3_pretrain.model import Decoder
from phase2_finetuning.project5_lora import adamw8bit, nf4
from phase2_finetuning.project5_lora.adamw8bit import AdamW8bit
from phase2_finetuning.project5_lora.adapters import add_adapter
from phase2_finetuning.project5_lora.lora import Recipe
from phase2_finetuning.project5_lora.qlora import quantize_linears
from phase2_finetuning.project5_lora.targets import ALL, choose_slots

FP32 = 4  # bytes
QUERIES = 64  # whose attention weights project 3's CPU attention makes at once


@dataclass(frozen=True)
class Way:
    """A way to fine-tune."""

    rank: int = 0  # of the adapters on every matrix of the blocks; 0: all weights are trained
    four_bits: bool = False  # the frozen matrices in NF4
    eight_bits: bool = False  # the optimizer's averages


WAYS = {
    "full": Way(),
    "full, 8-bit AdamW": Way(eight_bits=True),
    "LoRA": Way(8),
    "QLoRA": Way(8, four_bits=True),
    "QLoRA, 8-bit AdamW": Way(8, four_bits=True, eight_bits=True),
}


def prepare(model: Decoder, way: Way, lr: float = 1e-4) -> Optimizer:
    """Make a model ready to be trained in this way, and return its optimizer."""
    if way.four_bits:
        quantize_linears(model)
    if way.rank:
        add_adapter(model, Recipe(way.rank))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return (AdamW8bit if way.eight_bits else AdamW)([{"params": trained}], lr=lr)


@dataclass(frozen=True)
class Ledger:
    """Bytes of memory, by what they are for.

    PAPER: [1] Sec. 3: model states (weights, gradients, optimizer), and residual states, above all
        activations.
    PAPER CONTEXT: "The model has 135 million weights, so 540 MB" is off by a factor of four. [1] shows where
        the rest goes, and that each part needs a remedy of its own.
    INTUITION: A household's books: rent, food, and the loan are cut in different ways.
    IMPLEMENTATION: What a kernel allocates and frees within an operation is nobody's, and not counted.
    WHY: Adapters ([4]) cut gradients and optimizer, four bits ([3]) the weights, and neither cuts activations
        (a test).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All four."""
        return self.weights + self.gradients + self.optimizer + self.activations


def predict(config: DecoderConfig, way: Way, B: int, T: int) -> Ledger:
    """Return the memory of fine-tuning in fp32 on a CPU, without training anything.

    PAPER: [1] Sec. 3.1 (model states); [3] Fig. 1 and App. G compare full, LoRA and QLoRA.
    PAPER CONTEXT: Adam trains a model of 16-bit weights with 16 bytes per weight ([1]), one of fp32 as well.
        [4] trains a percent or two and drops nearly all of what gradients and optimizer take. Then the frozen
        weights are most of the rest, and [3] puts those in 4 bits.
    INTUITION: Who moves house counts the rooms and the boxes before hiring the van.
    IMPLEMENTATION: The model's parts by name from a Decoder on the "meta" device, which has shapes and no
        memory. With several micro-batches per step all four are there together, when the last one's forward
        pass ends; what the optimizer needs while it steps comes on top.
    WHY: Every column is within 1% of what meter.py measures, for all of WAYS (a test); so the table can be
        trusted for a model that does not fit on this machine.
    """
    _check(config, way, B, T)
    with torch.device("meta"):
        sizes = {name: weight.shape for name, weight in Decoder(config).named_parameters()}
    plan = choose_slots(config, (ALL,), way.rank, 1.0) if way.rank else {}
    ranks = {layer: sum(slot.rank for slot in slots) for layer, slots in plan.items()}
    trained = [size.numel() for size in sizes.values()]
    if way.rank:
        trained = [rank * sizes[f"{layer}.weight"][1] for layer, rank in ranks.items()]
        trained += [slot.rows * slot.rank for slots in plan.values() for slot in slots]
    packed = {f"{layer}.weight" for layer in plan} if way.four_bits else set()
    weights = sum(
        nf4_bytes(size.numel()) if name in packed else FP32 * size.numel() for name, size in sizes.items()
    )
    if config.positions == "rope":
        weights += FP32 * config.block_size * config.head_width  # cosines and sines
    kept = kept_numbers(config, B, T, frozen=bool(way.rank))
    kept += sum(R * (B * T + sizes[f"{layer}.weight"][0]) for layer, R in ranks.items())  # A x, and all of B
    return Ledger(
        weights=weights + (FP32 * sum(trained) if way.rank else 0),
        gradients=FP32 * sum(trained),
        optimizer=sum(adam_bytes(n, way.eight_bits) for n in trained),
        activations=FP32 * kept,
    )


def kept_numbers(config: DecoderConfig, B: int, T: int, frozen: bool) -> int:
    """Return how many numbers the forward pass leaves behind for the backward pass; adapters not counted.

    PAPER: [2] Sec. 4.1, there in bytes and for GPT in 16 bits: s b h (34 + 5 a s / h) per layer.
    PAPER CONTEXT: Activations grow with the batch, all else with the model; for long texts they are most of
        the memory, and adapters do not shrink them.
    INTUITION: To assign blame, every step must remember what it was given.
    IMPLEMENTATION: A product remembers its input, a norm its input and one number, attention q, k, v and its
        weights (of blocks of QUERIES up to the last one's position), SwiGLU gate and up, silu(gate), and the
        product of the two, which is also the last matrix's input. Adding remembers nothing. The loss
        (project 3) keeps its gradient instead of the logits.
    WHY: A frozen matrix needs no input for a gradient of its own, but the adapter beside it does: LoRA keeps
        what full fine-tuning keeps.
    """
    C, M = config.n_embd, config.mlp_width
    heads, kv_heads = config.n_head * config.head_width, config.kv_heads * config.head_width
    norm = C + (1 if config.norm == "rmsnorm" else 2)  # its input; a scale, and LayerNorm's mean
    products = C + heads + C + M  # inputs of qkv, proj, up, down
    inner = 3 * M if config.mlp == "swiglu" else M
    seen = sum(min(T, begin + QUERIES) * min(QUERIES, T - begin) for begin in range(0, T, QUERIES))
    values = heads + 2 * kv_heads
    if B == 1:  # then k and v are no copies but views, which keep alive all of what they are cut from
        values += heads + (heads + kv_heads if config.positions == "rope" else 0)
    layer = B * (T * (2 * norm + products + inner + values) + config.n_head * seen)
    total = config.n_layer * layer + B * T * (norm + C)  # the last norm, and the gradient of its result
    if config.positions == "rope":
        total += 2 * T * config.head_width  # cosines and sines of these positions, once for all layers
    if frozen:
        return total - B * T * norm  # below the first norm there is nothing to learn
    return total + config.vocab_size * C  # the loss has the head's gradient, too


def nf4_bytes(n: int) -> int:
    """Return what n weights take in NF4 with double quantization: 4.127 bits each."""
    blocks = -(-n // nf4.BLOCK)
    return -(-n // 2) + blocks + FP32 * (-(-blocks // nf4.SCALE_BLOCK) + 1)


def adam_bytes(n: int, eight_bits: bool) -> int:
    """Return what Adam's two averages of n weights take."""
    if not eight_bits or n < adamw8bit.SMALL:
        return 2 * FP32 * n
    return 2 * (n + FP32 * -(-n // adamw8bit.BLOCK))


def _check(config: DecoderConfig, way: Way, B: int, T: int) -> None:
    """Raise ValueError for what the formulas do not cover."""
    if way.four_bits and not way.rank:
        raise ValueError("rank (0) must be at least 1 with four_bits: packed weights cannot be trained")
    if B < 1:
        raise ValueError(f"B ({B}) must be at least 1")
    if not 1 <= T <= min(config.block_size, LONGEST):
        raise ValueError(f"T ({T}) must be at least 1 and at most {min(config.block_size, LONGEST)}")
    for name in ("dropout", "qk_norm", "checkpointing"):
        if value := getattr(config, name):
            raise ValueError(f"{name} ({value}) must be off: the formulas do not know what is kept with it")
