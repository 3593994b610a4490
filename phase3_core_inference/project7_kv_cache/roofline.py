r"""What a cache weighs, what a step must read and compute, and how fast it could be at best.

PAPERS
  [1] Roofline: An Insightful Visual Performance Model for Multicore Architectures, Williams, Waterman &
      Patterson, 2009 (Communications of the ACM 52)
  [2] Efficiently Scaling Transformer Inference, Pope et al., 2022, arXiv:2211.05102
  [3] Fast Transformer Decoding: One Write-Head is All You Need, Shazeer, 2019, arXiv:1911.02150

SYMBOLS
  intensity  operations per byte read; a multiplication and an addition are two operations
  ridge      the intensity from which arithmetic is the limit: rate / bandwidth
"""

import time
from dataclasses import dataclass

import torch

from common.device import measure_matmul_rate, synchronize
from phase1_foundation.project3_pretrain.config import DecoderConfig


@dataclass(frozen=True)
class Work:
    """Bytes to read and operations to compute.

    PAPER: [1], where the quotient is called operational intensity.
    PAPER CONTEXT: Counting operations alone says nothing about work that waits for memory.
    INTUITION: A recipe: how much to fetch, how much to stir.
    IMPLEMENTATION: Each byte counts once, as if what is used twice at once stayed near the processor.
    WHY: It tells prefill from decode: for SmolLM2 some 850 operations per byte and 1 (a test).
    """

    bytes: float
    operations: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.bytes


@dataclass(frozen=True)
class Machine:
    """What a device can do at best.

    PAPER: [1]: attainable performance is the lower of peak rate and bandwidth times intensity.
    PAPER CONTEXT: Before [1], peak operations per second were all that data sheets and papers quoted.
    INTUITION: A kitchen is as fast as its cook or as its errand boy, whoever is slower.
    IMPLEMENTATION: Both numbers are measured on this device now, not read from a data sheet.
    WHY: A measured time beside the least possible one says how much there is left to gain.
    """

    bandwidth: float  # bytes per second
    rate: float  # operations per second

    @property
    def ridge(self) -> float:
        """Operations per byte at which both limits meet."""
        return self.rate / self.bandwidth

    def seconds(self, work: Work) -> float:
        """Return the least time that the work can take ([1]: the lower of two roofs)."""
        return max(work.bytes / self.bandwidth, work.operations / self.rate)


def cache_bytes(config: DecoderConfig, tokens: int, bytes_per_number: float = 2) -> float:
    """Return the bytes of keys and values of so many tokens.

    PAPER: [2] Sec. 2 (memory of the cache) and 3.3; [3] Sec. 3 (what sharing heads saves).
    PAPER CONTEXT: At batch 512 and context 2048 the cache of a 500B model takes 3 TB, three times the weights
        ([2] Sec. 2, for multi-head attention).
    INTUITION: Two vectors for each token, layer and key head: its label and its content.
    IMPLEMENTATION: 2 * n_layer * n_kv_head * head_dim * bytes, for each token.
    WHY: It says how many texts fit. A test compares it with the memory that the caches really take.
    """
    return 2 * config.n_layer * config.kv_heads * config.head_width * tokens * bytes_per_number


def quantized_bytes(
    config: DecoderConfig, tokens: int, bits: int, group: int, residual: int, bytes_per_number: int = 2
) -> float:
    """Return the bytes of a QuantizedCache: codes, scales and zeros of 2 bytes, the newest in full."""
    coded = max(0, tokens - residual) // group * group
    numbers = config.n_layer * config.kv_heads * config.head_width * coded  # keys, or values
    key_scales, value_scales = numbers / group, numbers / config.head_width
    codes = 2 * numbers * bits / 8 + (key_scales + value_scales) * 2 * 2
    return codes + cache_bytes(config, tokens - coded, bytes_per_number)


def weight_count(config: DecoderConfig) -> int:
    """Return how many weights a step reads: all matrices, the head among them; of embeddings only rows."""
    C, D = config.n_embd, config.head_width
    attention = C * (config.n_head + 2 * config.kv_heads) * D + config.n_head * D * C
    feed_forward = (3 if config.mlp == "swiglu" else 2) * C * config.mlp_width
    return config.n_layer * (attention + feed_forward) + C * config.vocab_size


def decode_work(config: DecoderConfig, lengths: list[int], bytes_per_number: float = 2) -> Work:
    """Return the work of one step for sequences of these lengths: each weight once, each past once."""
    weights = weight_count(config)
    past = sum(cache_bytes(config, length, bytes_per_number) for length in lengths)
    mixing = 4 * config.n_layer * config.n_head * config.head_width * sum(lengths)
    return Work(weights * bytes_per_number + past, 2 * weights * len(lengths) + mixing)


def prefill_work(config: DecoderConfig, tokens: int, bytes_per_number: float = 2) -> Work:
    """Return the work of reading a prompt; only its last token meets the head."""
    head = config.n_embd * config.vocab_size
    weights = weight_count(config)
    mixing = 4 * config.n_layer * config.n_head * config.head_width * tokens * (tokens + 1) / 2
    operations = 2 * (weights - head) * tokens + 2 * head + mixing
    return Work(weights * bytes_per_number + cache_bytes(config, tokens, bytes_per_number), operations)


def measure_machine(device: torch.device, dtype: torch.dtype, megabytes: int = 256) -> Machine:
    """Measure how fast a device reads memory (a sum) and multiplies matrices of this dtype."""
    numbers = torch.ones(megabytes * 2**20 // 4, device=device)
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        numbers.sum()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return Machine(numbers.nbytes / best, measure_matmul_rate(device, dtype))
