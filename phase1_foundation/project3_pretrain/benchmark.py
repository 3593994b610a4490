"""Measure training and generation beside Hugging Face's model of the same shape, and Muon beside AdamW.

uv run python phase1_foundation/project3_pretrain/benchmark.py
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.corpora import load_corpus
from common.device import DTYPES, measure_matmul_rate, pick_device, pick_dtype, seed_everything
from common.script import progress, script
from phase1_foundation.project1_minimal_gpt.benchmark import Row, time_in_turn
from phase1_foundation.project1_minimal_gpt.config import OptimizerConfig
from phase1_foundation.project1_minimal_gpt.data import TextData
from phase1_foundation.project1_minimal_gpt.optimizer import clip_gradients, lr_factor, make_optimizers
from phase1_foundation.project1_minimal_gpt.train import autocast, train_step
from phase1_foundation.project3_pretrain.config import BenchmarkConfig, DecoderConfig
from phase1_foundation.project3_pretrain.families import config_to_hf
from phase1_foundation.project3_pretrain.generate import generate
from phase1_foundation.project3_pretrain.loss import Batch, language_model_loss
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.scaling import measure, read_bytes

OURS, PEER = "ours", "Hugging Face"
ADAMW_RATES = (1e-3, 3e-3, 1e-2)  # peak learning rates of AdamW to race against; the best one counts
RACER = DecoderConfig(vocab_size=256, block_size=64, n_layer=4, n_head=4, n_embd=64)


def run(config: BenchmarkConfig) -> list[Row]:
    """Time everything, print the tables, and return the rows."""
    device = pick_device(config.device)
    seed_everything(0)
    best = next(name for name, dtype in DTYPES.items() if dtype == pick_dtype("auto", device))
    precisions = list(dict.fromkeys(["fp32", best]))
    rates = {name: measure_matmul_rate(device, DTYPES[name]) for name in precisions}
    speeds = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in rates.items())
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    shape, size = config.model, Decoder(config.model).count_parameters()
    print(f"device      {device}{threads}; matrix products at {speeds}")
    width = f"{shape.n_layer} layers, {shape.n_head} heads on {shape.kv_heads} of keys, {shape.n_embd} wide"
    print(
        f"model       {width}, context {shape.block_size}, {shape.vocab_size:,} tokens, {size:,} parameters"
    )
    rows = [row for name in precisions for row in time_training(config, device, name)]
    rows += time_generation(config, device)
    print_table(rows, rates)
    print(f"medians of {config.repeats} rounds, contestants in turn")
    if config.race_steps:
        print_race(race(config.race_steps))
    return rows


def hugging_face(config: DecoderConfig) -> Any:
    """Return transformers' model of this shape, with the fused attention kernel."""
    from transformers import AutoConfig, AutoModelForCausalLM  # here: it takes seconds to import

    facts = config_to_hf(config)
    facts |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"), config.dropout)
    facts |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    shape = AutoConfig.for_model(facts.pop("model_type"), **facts)
    return AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")


# Training


def time_training(config: BenchmarkConfig, device: torch.device, precision: str) -> list[Row]:
    """Time a whole training step: ours as trainer.py takes it, theirs as their Trainer does."""
    B, T = config.batch_size, config.model.block_size
    tokens = torch.randint(config.model.vocab_size, (B, T + 1), device=device)
    dtype = DTYPES[precision]
    contestants = {
        OURS: our_step(Decoder(config.model).to(device), tokens, dtype),
        PEER: their_step(hugging_face(config.model).to(device), tokens, dtype),
    }
    times = time_in_turn(contestants, config.repeats, device, f"training, {precision}")
    operations = Decoder(config.model).flops_per_token()
    return [
        Row("training step", precision, name, seconds, B * T, operations) for name, seconds in times.items()
    ]


def our_step(model: Decoder, tokens: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """Return a step: chunked loss, clipping, this course's AdamW."""
    (optimizer,) = make_optimizers(model, OptimizerConfig(optimizer="adamw", lr=1e-4), fused=True)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    weights = list(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with autocast(tokens.device, dtype):
            total, count = language_model_loss(model, batch)
        total.backward()
        clip_gradients(weights, 1.0, 1 / count)
        optimizer.step()

    return step


def their_step(model: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """Return a step with what transformers' Trainer uses: the model's own loss, torch's fused AdamW."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        with autocast(tokens.device, dtype):
            loss = model(
                tokens[:, :-1], labels=tokens[:, :-1], use_cache=False
            ).loss  # which shifts them itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


# Generation


def time_generation(config: BenchmarkConfig, device: torch.device) -> list[Row]:
    """Time writing with a cache of keys and values, one sequence, always the likeliest token, fp32."""
    prompt = torch.randint(config.model.vocab_size, (config.prompt_tokens,)).tolist()
    ours, theirs = Decoder(config.model).to(device).eval(), hugging_face(config.model).to(device).eval()
    contestants: Mapping[str, Callable[[], object]] = {
        OURS: lambda: list(generate(ours, prompt, config.new_tokens, temperature=0)),
        PEER: partial(their_generation, theirs, prompt, config.new_tokens),
    }
    times = time_in_turn(contestants, config.repeats, device, "generation")
    operations = ours.flops_per_token() / 3
    return [
        Row("generation", "fp32", name, seconds, config.new_tokens, operations)
        for name, seconds in times.items()
    ]


@torch.no_grad()
def their_generation(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Let transformers write as many tokens."""
    tokens = torch.tensor([prompt], device=model.device)
    how = {"do_sample": False, "pad_token_id": 0, "use_cache": True, "max_new_tokens": new_tokens}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = model.generate(tokens, attention_mask=torch.ones_like(tokens), **how)
    return written[0, len(prompt) :].tolist()


def print_table(rows: list[Row], rates: Mapping[str, float]) -> None:
    """Print the rows; the ratio is to the peer of the same task and precision."""
    print(f"\n{'':14}{'':6}{'':14}{'ms':>9}{'tokens/s':>11}{'utilization':>13}{'speed / peer':>14}")
    for row in rows:
        peer = next(r for r in rows if (r.task, r.precision, r.name) == (row.task, row.precision, PEER))
        share = row.speed * row.operations / rates[row.precision]
        print(f"{row.task:14}{row.precision:6}{row.name:14}{row.seconds * 1e3:9.1f}{row.speed:11,.0f}"
              f"{share:13.1%}{row.speed / peer.speed:14.2f}")  # fmt: skip


# Muon against AdamW


Curve = list[tuple[int, float]]  # step, validation loss in nats per byte


def race(steps: int) -> dict[str, Curve]:
    """Return the validation losses of AdamW at several rates and of Muon, all on the same batches."""
    path = load_corpus("stdlib")
    data = TextData(read_bytes(path), RACER.block_size, batch_size=16, seed=0)
    shared = OptimizerConfig(max_steps=steps, warmup_steps=max(1, steps // 20))
    runners = {f"adamw, lr {lr:g}": replace(shared, optimizer="adamw", lr=lr) for lr in ADAMW_RATES}
    runners["muon"] = replace(shared, optimizer="muon")
    curves: dict[str, Curve] = {name: [] for name in runners}
    for name, how in progress(runners.items(), desc="race", leave=False):
        seed_everything(0)
        model = Decoder(RACER)
        optimizers = make_optimizers(model, how)
        for step in range(steps):
            x, y = (part.long() for part in data.batch(step))
            train_step(model, optimizers, x, y, lr_share=lr_factor(step, how))
            if (step + 1) % max(1, steps // 30) == 0 or step + 1 == steps:
                curves[name].append((step + 1, measure(model, data, 128)))
    return curves


def print_race(curves: Mapping[str, Curve]) -> None:
    """Print the last losses, and where Muon passes the last loss of the best AdamW."""
    print(f"\n{'':18}{'steps':>7}{'validation loss':>17}")
    for name, curve in curves.items():
        print(f"{name:18}{curve[-1][0]:7,}{curve[-1][1]:17.4f}")
    target = min(curve[-1][1] for name, curve in curves.items() if name != "muon")
    steps = curves["muon"][-1][0]
    there = next((step for step, loss in curves["muon"] if loss <= target), None)
    if there is None:
        print(f"muon does not reach the best AdamW's {target:.4f} nats per byte in {steps:,} steps")
    else:
        when = f"after {there:,} steps, {there / steps:.0%} of AdamW's"
        print(f"muon reaches the best AdamW's {target:.4f} nats per byte {when}")


@script
def main() -> None:
    """Parse and measure."""
    run(BenchmarkConfig.from_cli())


if __name__ == "__main__":
    main()
