"""Which size of model is the best buy: uv run python phase1_foundation/project3_pretrain/scaling.py

Several sizes are trained with the same number of operations each, and that for several budgets (isoFLOP).
A sweep that is killed goes on where it was: finished runs stand in scaling.csv.
"""

import csv
import hashlib
import math
import random
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.corpora import documents
from common.device import seed_everything
from common.files import atomic_write, make_folder
from common.plots import new_figure, read_csv, save_figure
from common.script import progress, script
from phase1_foundation.project1_minimal_gpt.config import OptimizerConfig
from phase1_foundation.project1_minimal_gpt.data import TextData
from phase1_foundation.project1_minimal_gpt.optimizer import lr_factor, make_optimizers
from phase1_foundation.project1_minimal_gpt.train import find_text, train_step
from phase1_foundation.project3_pretrain.config import DecoderConfig, ScalingConfig
from phase1_foundation.project3_pretrain.isoflop import (
    HOFFMANN,
    KAPLAN,
    Minimum,
    PowerLaw,
    fit_power_law,
    isoflop_minimum,
    leave_one_out,
    value_at,
)
from phase1_foundation.project3_pretrain.model import Decoder

TEXT_BYTES = 16_000_000  # of a corpus, that the sweep draws from
TOKENS_PER_PARAMETER = 80  # where the sizes to try are centred: four bytes for each of Hoffmann's 20 tokens
FEWEST_STEPS = 20  # that count as training


@dataclass(frozen=True)
class Result:
    """A finished run: a row of scaling.csv."""

    flops: float
    n_layer: int
    n_embd: int
    parameters: int
    tokens: int
    steps: int
    bits_per_byte: float
    seconds: float
    settings: str  # digest of all else that matters


@dataclass(frozen=True)
class Findings:
    """What a sweep says."""

    results: list[Result]
    minima: list[Minimum]
    parameters: PowerLaw | None  # N_opt of C
    tokens: PowerLaw | None  # D_opt of C


def run(config: ScalingConfig) -> Findings:
    """Train what is not yet in scaling.csv; print, draw and return what all of it says."""
    out = make_folder(config.out)
    text = read_bytes(find_text(config.data, config.source))
    data = TextData(text, config.block_size, config.batch_size, config.seed)
    settings = digest(config, text)
    known = read_results(out / "scaling.csv")
    plan = [(flops, shape) for flops in sorted(config.budgets) for shape in shapes_for(flops, config)]
    missing = [job for job in plan if find(known, *job, settings) is None]
    work = sum(flops for flops, _ in missing)
    print(
        f"sweep       {len(plan)} runs, {len(plan) - len(missing)} of them done, {work:.2g} operations to go"
    )
    with progress(missing, total=work, desc="sweep", unit_scale=True, unit="FLOP") as bar:
        for flops, shape in missing:
            known.append(train(flops, shape, data, config, settings))
            write_results(out / "scaling.csv", known)
            bar.write(f"{flops:.1e}  {describe(known[-1])}")
            bar.update(flops)
    results = [result for job in plan if (result := find(known, *job, settings))]
    findings = conclude(results)
    report(findings)
    draw(findings, out / "scaling.png")
    print(f"written to {out}: scaling.csv, scaling.png")
    return findings


# The runs


def read_bytes(path: Path) -> Tensor:
    """Return up to TEXT_BYTES of the documents of a file, shuffled, as one run of bytes."""
    texts = list(documents(path))
    random.Random(0).shuffle(texts)  # or the validation part would be what comes last in the alphabet
    content = "\n".join(texts).encode()[:TEXT_BYTES]
    if not content:
        raise ValueError(f"data ({path}) must not be empty")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def shape_of(width: int, config: ScalingConfig) -> DecoderConfig:
    """Return a model of a width: deeper where wider, and with heads of 16 (or 8)."""
    return DecoderConfig(
        vocab_size=256,
        block_size=config.block_size,
        n_layer=max(2, round(width / 24)),
        n_head=width // (16 if width % 16 == 0 else 8),
        n_embd=width,
        mlp_hidden=8 * round(width / 3),
    )


def shapes_for(flops: float, config: ScalingConfig) -> list[DecoderConfig]:
    """Return the shapes to try: those nearest to TOKENS_PER_PARAMETER, if they can take FEWEST_STEPS."""

    def off(shape: DecoderConfig) -> float:
        with torch.device("meta"):
            model = Decoder(shape)
        tokens = flops / model.flops_per_token()
        if tokens < FEWEST_STEPS * config.batch_size * config.block_size:
            return math.inf
        return abs(math.log(tokens / model.count_parameters() / TOKENS_PER_PARAMETER))

    ranked = sorted(
        (off(shape), shape.n_embd) for shape in (shape_of(width, config) for width in set(config.widths))
    )
    kept = sorted(width for distance, width in ranked[: config.sizes] if distance < math.inf)
    if len(kept) < 3:
        rule = f"must buy at least {FEWEST_STEPS} steps for three of the widths"
        raise ValueError(f"budgets ({flops:.2g}) {rule}; {len(kept)} can have them")
    return [shape_of(width, config) for width in kept]


def train(flops: float, shape: DecoderConfig, data: TextData, config: ScalingConfig, settings: str) -> Result:
    """Train a model for a budget, the learning rate falling to nothing at its end, and measure it."""
    seed_everything(config.seed)
    model, begin = Decoder(shape), time.perf_counter()
    per_step = config.batch_size * config.block_size
    steps = round(flops / model.flops_per_token() / per_step)
    how = OptimizerConfig(
        max_steps=steps,
        lr=config.lr * math.sqrt(32 / shape.n_embd),
        muon_lr=config.muon_lr,
        warmup_steps=max(1, steps // 20),
    )
    optimizers = make_optimizers(model, how)
    for step in range(steps):
        x, y = (part.long() for part in data.batch(step))
        train_step(model, optimizers, x, y, lr_share=lr_factor(step, how))
    loss = measure(model, data, config.eval_windows) / math.log(2)
    seconds = time.perf_counter() - begin
    size = (shape.n_layer, shape.n_embd, model.count_parameters())
    return Result(flops, *size, steps * per_step, steps, loss, seconds, settings)


@torch.no_grad()
def measure(model: Decoder, data: TextData, windows: int) -> float:
    """Return the loss over the first windows of the validation part, nats per byte."""
    total, count = 0.0, 0
    for x, y in data.validation_batches(min(windows, 64)):
        total += F.cross_entropy(model(x.long()).flatten(0, 1), y.long().flatten(), reduction="sum").item()
        count += y.numel()
        if count >= windows * data.block_size:
            break
    return total / count


# The table


def digest(config: ScalingConfig, text: Tensor) -> str:
    """Return a short name for all that changes a run's result beside its budget and shape."""
    what = (config.block_size, config.batch_size, config.lr, config.muon_lr, config.eval_windows, config.seed)
    return hashlib.sha256(repr(what).encode() + text.numpy().tobytes()).hexdigest()[:12]


def read_results(path: Path) -> list[Result]:
    """Return the rows of scaling.csv, if there is one; ValueError if it is another file."""
    if not path.is_file():
        return []
    kinds = {field.name: field.type for field in fields(Result)}
    try:
        return [Result(**{name: kinds[name](value) for name, value in row.items()}) for row in read_csv(path)]  # type: ignore[operator]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a table that scaling.py wrote; delete it to begin anew") from error


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write scaling.csv, whole or not at all."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)


def find(known: Iterable[Result], flops: float, shape: DecoderConfig, settings: str) -> Result | None:
    """Return the finished run of a budget and shape under these settings."""
    wanted = (flops, shape.n_layer, shape.n_embd, settings)
    return next((r for r in known if (r.flops, r.n_layer, r.n_embd, r.settings) == wanted), None)


# What it says


def conclude(results: list[Result]) -> Findings:
    """Fit a parabola to each budget, and power laws to the minima that lie among the sizes tried."""
    minima = []
    for flops in sorted({result.flops for result in results}):
        rows = [result for result in results if result.flops == flops]
        found = isoflop_minimum(flops, [r.parameters for r in rows], [r.bits_per_byte for r in rows])
        minima += [] if found is None else [found]
    best = [minimum for minimum in minima if minimum.inside]
    if len(best) < 2:
        return Findings(results, minima, None, None)
    budgets = [minimum.flops for minimum in best]
    tokens = [tokens_at(minimum, results) for minimum in best]
    sizes = fit_power_law(budgets, [minimum.parameters for minimum in best])
    return Findings(results, minima, sizes, fit_power_law(budgets, tokens))


def tokens_at(minimum: Minimum, results: list[Result]) -> float:
    """Return the tokens that a budget buys for the best size: a power law between the sizes tried."""
    rows = [result for result in results if result.flops == minimum.flops]
    law = fit_power_law([r.parameters for r in rows], [r.tokens for r in rows])
    return value_at(law, minimum.parameters)


def describe(result: Result) -> str:
    """Return a run as words."""
    size = f"{result.n_layer} layers, {result.n_embd:3} wide, {result.parameters:9,} parameters"
    return (
        f"{size}, {result.tokens:10,} bytes, {result.bits_per_byte:.4f} bits per byte, {result.seconds:.1f} s"
    )


def report(findings: Findings) -> None:
    """Print a line per budget, and the exponents beside those of the papers."""
    print(f"\n{'budget':>8}{'best size':>12}{'bytes':>12}{'bytes/parameter':>17}{'bits/byte':>11}")
    for minimum in findings.minima:
        tokens = tokens_at(minimum, findings.results)
        note = "" if minimum.inside else "  outside of the sizes tried: left out below"
        print(f"{minimum.flops:8.1e}{minimum.parameters:12,.0f}{tokens:12,.0f}"
              f"{tokens / minimum.parameters:17.1f}{minimum.loss:11.4f}{note}")  # fmt: skip
    flat = {result.flops for result in findings.results} - {minimum.flops for minimum in findings.minima}
    for flops in sorted(flat):
        print(f"{flops:8.1e}  no minimum: the losses do not curve upwards")
    if findings.parameters is None or findings.tokens is None:
        print("\ntoo few minima for a power law: try other --widths or more --budgets")
        return
    best = [minimum for minimum in findings.minima if minimum.inside]
    low, high = leave_one_out([m.flops for m in best], [m.parameters for m in best])
    a = findings.parameters.exponent
    print(f"\nbest size   grows as budget^{a:.2f} ({low:.2f} to {high:.2f} with one budget left out), "
          f"bytes as budget^{findings.tokens.exponent:.2f}")  # fmt: skip
    print(f"papers      Kaplan 2020: size as budget^{KAPLAN}, tokens as budget^{1 - KAPLAN:.2f}; "
          f"Hoffmann 2022: {HOFFMANN} and {1 - HOFFMANN:.2f}")  # fmt: skip
    print(verdict(a, low, high) if len(best) > 2 else "verdict     two budgets cannot tell")


def verdict(a: float, low: float, high: float) -> str:
    """Return in words whose exponent this one is nearer to, and how much that means."""
    name = "Hoffmann's" if abs(a - HOFFMANN) < abs(a - KAPLAN) else "Kaplan's"
    away = {"Hoffmann's": abs(a - HOFFMANN), "Kaplan's": abs(a - KAPLAN)}
    line = f"verdict     nearer to {name}: {away[name]:.2f} away, the other {max(away.values()):.2f}"
    within = [who for who, law in (("Hoffmann's", HOFFMANN), ("Kaplan's", KAPLAN)) if low <= law <= high]
    if within:
        return f"{line}; one budget more or less makes it {' or '.join(within)}"
    return f"{line}; leaving a budget out does not change that much"


def draw(findings: Findings, path: Path) -> None:
    """Draw the profiles with their parabolas, and the best size by budget."""
    figure, (left, right) = new_figure(columns=2, width=11, height=4.4)
    for number, flops in enumerate(sorted({result.flops for result in findings.results})):
        rows = [result for result in findings.results if result.flops == flops]
        sizes, color = [row.parameters for row in rows], f"C{number}"
        left.plot(
            sizes, [row.bits_per_byte for row in rows], "o", color=color, label=f"{flops:.1e} operations"
        )
        for minimum in (m for m in findings.minima if m.flops == flops):
            low, high = math.log(min(sizes)), math.log(max(sizes))
            x = [low + (high - low) * i / 60 for i in range(61)]
            a, b, c = minimum.curve
            left.plot([math.exp(v) for v in x], [a * v * v + b * v + c for v in x], color=color, linewidth=1)
            if minimum.inside:
                left.plot(minimum.parameters, minimum.loss, "*", color=color, markersize=13)
                right.plot(flops, minimum.parameters, "*", color=color, markersize=13)
    left.set(xscale="log", xlabel="parameters", ylabel="validation loss (bits per byte)",
             title="equal budgets: too small, right, too large")  # fmt: skip
    left.legend(fontsize=8)
    right.set(xscale="log", yscale="log", xlabel="operations", ylabel="parameters of the minimum")
    if findings.parameters:
        best = [minimum for minimum in findings.minima if minimum.inside]
        x = [best[0].flops, best[-1].flops]
        for name, exponent, style in (
            ("this sweep", findings.parameters.exponent, "-"),
            ("Kaplan 2020", KAPLAN, ":"),
            ("Hoffmann 2022", HOFFMANN, "--"),
        ):
            middle = math.sqrt(x[0] * x[1])
            law = [value_at(findings.parameters, middle) * (v / middle) ** exponent for v in x]
            right.plot(x, law, style, color="black", linewidth=1.2, label=f"{name}: budget^{exponent:.2f}")
        right.legend(fontsize=8)
    right.set_title("the best size, and three slopes through its middle")
    save_figure(figure, path)


@script
def main() -> None:
    """Parse, print, sweep."""
    config = ScalingConfig.from_cli()
    config.print_config()
    run(config)


if __name__ == "__main__":
    main()
