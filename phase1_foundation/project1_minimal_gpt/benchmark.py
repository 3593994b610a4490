"""Measure the GPT beside Hugging Face's of the same shape, explicit attention beside the fused kernel.

uv run python phase1_foundation/project1_minimal_gpt/benchmark.py
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.device import DTYPES, measure_matmul_rate, pick_device, pick_dtype, seed_everything, synchronize
from common.files import make_folder, shown
from common.plots import new_figure, save_figure
from common.script import progress, script
from phase1_foundation.project1_minimal_gpt.attention import CausalAttention
from phase1_foundation.project1_minimal_gpt.config import BenchmarkConfig, GPTConfig, TrainConfig
from phase1_foundation.project1_minimal_gpt.generate import generate
from phase1_foundation.project1_minimal_gpt.model import GPT
from phase1_foundation.project1_minimal_gpt.optimizer import make_optimizers
from phase1_foundation.project1_minimal_gpt.train import train_step

PEER = "Hugging Face, sdpa"
CONTEXTS = (64, 128, 256, 512, 1024)  # lengths at which attention is timed alone
ATTENTION_TOKENS = 8192  # per timing of attention alone: 32 sequences of 256, or 8 of 1024
NEW_TOKENS = 16  # written per timing of generation, to the end of the context
COLORS = {"ours, explicit": "#9cc2f0", "ours, sdpa": "#3b7dd8",
          "Hugging Face, eager": "#d8d2c4", "Hugging Face, sdpa": "#9aa5b1"}  # fmt: skip


@dataclass
class Row:
    """One line of a table: the median time of one contestant."""

    task: str  # "training step", "generation", or "attention, context 256"
    precision: str  # of matrix products
    name: str  # "ours, sdpa"; for attention alone "sdpa, forward"
    seconds: float
    tokens: int  # handled in that time
    operations: float = 0.0  # per token, as the arithmetic needs them; 0: not counted

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def run(config: BenchmarkConfig) -> list[Row]:
    """Time everything, print the tables, draw the chart, and return the rows."""
    out, device = make_folder(config.out), pick_device(config.device)
    seed_everything(0)
    precisions = ["fp32"]
    precisions += [
        name for name, dtype in DTYPES.items() if dtype == pick_dtype("auto", device) and name != "fp32"
    ]
    rates = {name: measure_matmul_rate(device, DTYPES[name]) for name in precisions}
    speeds = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in rates.items())
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"device      {device}{threads}; matrix products at {speeds}")
    shape = config.model
    print(f"model       {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, context "
          f"{shape.block_size}, {GPT(shape).count_parameters():,} parameters")  # fmt: skip

    rows = [row for name in precisions for row in time_training(config, device, name)]
    rows += time_generation(config, device)
    print_models(rows, rates)
    attention = [row for name in precisions for row in time_attention(config, device, name)]
    print_attention(attention)
    draw(rows, attention, config)
    chart = shown(out / "benchmark.png")
    print(f"medians of {config.repeats} rounds, contestants in turn; chart written to {chart}")
    return rows + attention


def time_in_turn(
    contestants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, task: str
) -> dict[str, float]:
    """Return the median seconds of each; round by round, so that a busy moment strikes all of them."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in progress(range(repeats + 1), desc=task, leave=False, delay=1):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}  # the first warms up


def models(config: GPTConfig, device: torch.device) -> dict[str, nn.Module]:
    """Return our GPT and Hugging Face's, each with both kinds of attention, by name."""
    ours: dict[str, nn.Module] = {
        "ours, explicit": GPT(replace(config, attention="explicit")),
        "ours, sdpa": GPT(replace(config, attention="sdpa")),
    }
    theirs = {f"Hugging Face, {kind}": Peer(config, kind) for kind in ("eager", "sdpa")}
    return {name: model.to(device) for name, model in (ours | theirs).items()}


def hugging_face_gpt2(config: GPTConfig, attention: str = "sdpa") -> Any:
    """Return transformers' GPT2LMHeadModel of this shape. Raises ValueError for one that it cannot have."""
    from transformers import GPT2Config, GPT2LMHeadModel  # here: it takes seconds to import

    if not config.bias:
        raise ValueError(f"bias ({config.bias}) must be on: Hugging Face's GPT-2 has no other form")
    kind: dict[str, Any] = {"attn_implementation": attention}
    shape = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        activation_function="gelu" if config.gelu == "exact" else "gelu_new",
        tie_word_embeddings=config.tied,
        bos_token_id=None,
        eos_token_id=None,
        **kind,
    )
    return GPT2LMHeadModel(shape)


class Peer(nn.Module):
    """Hugging Face's GPT-2, called as ours is: token ids (B, T) in, logits (B, T, V) out."""

    def __init__(self, config: GPTConfig, attention: str) -> None:
        super().__init__()
        self.model = hugging_face_gpt2(config, attention)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T) to (B, T, V)."""
        return self.model(tokens, use_cache=False).logits

    @torch.no_grad()
    def generate(self, prompt: list[int], max_new_tokens: int, use_cache: bool) -> None:
        """Write tokens, drawn as ours are."""
        self.model.eval()
        tokens = torch.tensor([prompt], device=self.model.device)
        how = {"do_sample": True, "temperature": 0.8, "top_k": 0, "pad_token_id": 0, "use_cache": use_cache}
        mask = torch.ones_like(tokens)
        self.model.generate(tokens, attention_mask=mask, max_new_tokens=max_new_tokens, **how)


def time_training(config: BenchmarkConfig, device: torch.device, precision: str) -> list[Row]:
    """Time a whole training step: forward, backward, clipping and our AdamW, the same for all."""
    B, T, V = config.batch_size, config.model.block_size, config.model.vocab_size
    x, y = torch.randint(V, (2, B, T), device=device)

    def step_of(model: nn.Module) -> Callable[[], object]:
        optimizers = make_optimizers(model, TrainConfig(optimizer="adamw"))
        return lambda: train_step(model, optimizers, x, y, DTYPES[precision], lr_share=0.1)

    contestants = {name: step_of(model) for name, model in models(config.model, device).items()}
    task = "training step"
    times = time_in_turn(contestants, config.repeats, device, f"{task}, {precision}")
    operations = GPT(config.model).flops_per_token()
    return [Row(task, precision, name, seconds, B * T, operations) for name, seconds in times.items()]


def time_generation(config: BenchmarkConfig, device: torch.device) -> list[Row]:
    """Time the last tokens of a full context, one sequence, fp32, as generate.py runs."""
    shape = config.model
    new = min(NEW_TOKENS, shape.block_size - 1)
    prompt = torch.randint(shape.vocab_size, (shape.block_size - new,)).tolist()
    contestants: dict[str, Callable[[], object]] = {}
    for name, model in models(shape, device).items():
        if isinstance(model, GPT):
            contestants[name] = partial(write, model, prompt, new)
        elif isinstance(model, Peer) and name == PEER:
            contestants[name] = partial(model.generate, prompt, new, use_cache=False)
            contestants[f"{name}, KV cache"] = partial(model.generate, prompt, new, use_cache=True)
    times = time_in_turn(contestants, config.repeats, device, "generation")
    operations = GPT(shape).flops_per_token() / 3  # the forward pass of one token, as a cache would do it
    return [Row("generation", "fp32", name, seconds, new, operations) for name, seconds in times.items()]


def write(model: GPT, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Let our model write as many tokens."""
    return list(generate(model, prompt, max_new_tokens))


def time_attention(config: BenchmarkConfig, device: torch.device, precision: str) -> list[Row]:
    """Time attention alone, as in writing (forward) and in training (with backward)."""
    H = config.model.n_head
    D = config.model.n_embd // H
    rows = []
    for T in CONTEXTS:
        B = ATTENTION_TOKENS // T
        inputs = torch.randn(3, B, H, T, D, device=device).to(DTYPES[precision]).unbind()  # q, k, v
        task = f"attention, context {T}"
        for passes, work in (("forward", attend), ("with backward", attend_and_back)):
            contestants = {kind: partial(work, kind, inputs) for kind in ("explicit", "sdpa")}
            times = time_in_turn(contestants, config.repeats, device, f"{task}, {precision}, {passes}")
            rows += [Row(task, precision, f"{kind}, {passes}", t, B * T) for kind, t in times.items()]
    return rows


@torch.no_grad()
def attend(kind: str, inputs: tuple[Tensor, ...]) -> Tensor:
    """Run attention over q, k, v."""
    return CausalAttention(kind).attend(0, *inputs)


def attend_and_back(kind: str, inputs: tuple[Tensor, ...]) -> None:
    """Run attention over q, k, v and find the gradients of all three."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    mixed = CausalAttention(kind).attend(0, *inputs)
    torch.autograd.grad(mixed, inputs, inputs[0].detach())  # any gradient does


def print_models(rows: list[Row], rates: Mapping[str, float]) -> None:
    """Print training and generation; the ratio is to the peer of the same task and precision."""
    numbers = f"{'ms':>9}{'tokens/s':>11}{'of matmul rate':>16}{'speed / peer':>14}"
    print(f"\n{'task':20}{'contestant':29}{numbers}")
    for row in rows:
        peer = next(r for r in rows if (r.task, r.precision, r.name) == (row.task, row.precision, PEER))
        share = row.speed * row.operations / rates[row.precision]
        print(f"{row.task:14}{row.precision:6}{row.name:29}{row.seconds * 1e3:9.1f}{row.speed:11,.0f}"
              f"{share:16.1%}{row.speed / peer.speed:14.2f}")  # fmt: skip
    print(
        f"peer: {PEER}; operations: those that the arithmetic needs, so recomputing a context counts as waste"
    )


def print_attention(rows: list[Row]) -> None:
    """Print attention alone, explicit beside sdpa, a line per context and precision."""
    print(f"\n{'attention alone, ms':31}{'forward':^35}{'forward and backward':^35}")
    print(f"{'':31}" + f"{'explicit':>13}{'sdpa':>9}{'sdpa is':>13}" * 2)
    for forward, backward in zip(pairs(rows)[::2], pairs(rows)[1::2], strict=True):
        line = f"{forward[0].task:25}{forward[0].precision:6}"
        for explicit, sdpa in (forward, backward):
            ratio = explicit.seconds / sdpa.seconds
            verdict = f"{ratio - 1:.0%} faster" if ratio >= 1 else f"{1 / ratio - 1:.0%} slower"
            line += f"{explicit.seconds * 1e3:13.1f}{sdpa.seconds * 1e3:9.1f}{verdict:>13}"
        print(line)


def pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Return the rows of attention alone, explicit with sdpa."""
    return list(zip(rows[::2], rows[1::2], strict=True))


def draw(rows: list[Row], attention: list[Row], config: BenchmarkConfig) -> None:
    """Draw training speeds, and what the fused kernel gains by context."""
    figure, (left, right) = new_figure(columns=2, width=10, height=4)
    training = [row for row in rows if row.task == "training step"]
    precisions = list(dict.fromkeys(row.precision for row in training))
    for number, name in enumerate(COLORS):
        speeds = [row.speed for row in training if row.name == name]
        places = [place + (number - 1.5) * 0.2 for place in range(len(speeds))]
        bars = left.bar(places, speeds, width=0.19, color=COLORS[name], label=name)
        left.bar_label(bars, labels=[f"{speed / 1e3:.1f}k" for speed in speeds], fontsize=7)
    left.set_xticks(range(len(precisions)), precisions)
    left.grid(visible=False, axis="x")
    left.set(
        title="training", ylabel="tokens per second", ylim=(0, max(row.speed for row in training) * 1.25)
    )
    left.legend(fontsize=8, ncols=2, loc="upper left")
    for precision, color in zip(precisions, ("#3b7dd8", "#d8733b"), strict=False):
        for passes, style in (("forward", "o-"), ("with backward", "s--")):
            both = [
                pair for pair in pairs(attention) if pair[0].precision == precision and passes in pair[0].name
            ]
            gains = [explicit.seconds / sdpa.seconds for explicit, sdpa in both]
            right.plot(CONTEXTS, gains, style, color=color, label=f"{precision}, {passes}")
    right.axhline(1, color="black", linewidth=0.8)
    right.set_xscale("log", base=2)
    right.set_xticks(CONTEXTS, [str(T) for T in CONTEXTS])
    right.set(
        title="attention alone: sdpa against explicit", xlabel="context (tokens)", ylabel="times as fast"
    )
    right.legend(fontsize=8)
    save_figure(figure, config.out / "benchmark.png")


@script
def main() -> None:
    """Parse and measure."""
    run(BenchmarkConfig.from_cli())


if __name__ == "__main__":
    main()
