"""What an engine would do: uv run python phase3_core_inference/project9_continuous_batching/simulate.py

For each rate of requests and each way to batch them: throughput, latencies, and the requests per second that
are served well. Minutes of load take a second.
"""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.files import atomic_write, make_folder, shown
from common.plots import new_figure, save_figure
from common.script import progress, script
from phase3_core_inference.project9_continuous_batching.config import SimulateConfig
from phase3_core_inference.project9_continuous_batching.loads import Service, make_load, service
from phase3_core_inference.project9_continuous_batching.simulator import CostModel, simulate

# Measured by benchmark.py: SmolLM2-135M in bf16, two cores of an AMD EPYC (Zen 5), torch 2.15, 2026-11-20.
BUILT_IN = CostModel((
    0.00966, 0.00272, -0.00176, -0.000102, 4.69e-06, -9.65e-05,
    -0.000933, 0.000443, 5.4e-05, 2.36e-06, 0.00467,
))  # fmt: skip
COLORS = {"continuous": "C0", "dynamic": "C1", "static": "C2"}
Results = dict[str, list[tuple[float, Service]]]  # policy: (rate, how it was served)


def run(config: SimulateConfig) -> Results:
    """Simulate every policy at every rate, print and write the table, draw it, and return the results."""
    costs = read_costs(config.costs)
    results: Results = {policy: [] for policy in config.policies}
    points = [(policy, rate) for rate in config.rates for policy in config.policies]
    for policy, rate in progress(points, desc="simulating", leave=False):
        load = make_load(replace(config.load, rate=rate), config.engine.length, vocab_size=2)
        jobs = simulate(load, replace(config.engine, policy=policy), costs)
        results[policy].append((rate, service(jobs)))
    out = make_folder(config.out)
    rows = table(results, config)
    with atomic_write(out / "simulation.csv") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    print_table(rows)
    draw(results, config, out / "simulation.png")
    print(f"written to {shown(out)}: simulation.csv, simulation.png")
    return results


def read_costs(path: Path) -> CostModel:
    """Return the costs that benchmark.py measured here, or those that are built in; says which."""
    if path.is_file():
        print(f"costs       measured here: {shown(path)}")
        return CostModel.load(path)
    print("costs       built in, of two CPU cores; benchmark.py measures those of this machine")
    return BUILT_IN


def table(results: Results, config: SimulateConfig) -> list[list[str]]:
    """Return the results as rows of text, the first one the heads."""
    rows = [
        ["requests/s", "policy", "tokens/s", "first p50", "first p95", "between p50", "gap p99", "goodput"]
    ]
    for i, rate in enumerate(config.rates):
        for policy, points in results.items():
            found = points[i][1]
            first, gaps = found.first, found.gaps if len(found.gaps) else np.zeros(1)
            numbers = [
                f"{found.tokens_per_second:.0f}",
                f"{np.percentile(first, 50):.2f}",
                f"{np.percentile(first, 95):.2f}",
                f"{np.percentile(found.between, 50) if len(found.between) else 0:.3f}",
                f"{np.percentile(gaps, 99):.3f}",
                f"{found.goodput(config.first_token, config.between_tokens):.2f}",
            ]
            rows.append([f"{rate:g}", policy, *numbers])
    return rows


def print_table(rows: list[list[str]]) -> None:
    """Print rows in columns."""
    for row in rows:
        print(f"{row[0]:>10}  {row[1]:<11}" + "".join(f"{cell:>12}" for cell in row[2:]))
    print("times in seconds; goodput in requests per second")


def draw(results: Results, config: SimulateConfig, path: Path) -> None:
    """Draw latency and goodput over the rate."""
    figure, (left, middle, right) = new_figure(1, 3, width=13)
    for policy, points in results.items():
        rates = [rate for rate, _ in points]
        how = {"color": COLORS[policy], "marker": ".", "label": policy}
        left.plot(rates, [np.percentile(found.first, 50) for _, found in points], **how)
        middle.plot(rates, [found.tokens_per_second for _, found in points], **how)
        right.plot(
            rates, [found.goodput(config.first_token, config.between_tokens) for _, found in points], **how
        )
    left.set(
        title="time to first token, median", xlabel="requests per second", ylabel="seconds", yscale="log"
    )
    middle.set(title="throughput", xlabel="requests per second", ylabel="tokens per second")
    limits = f"first token in {config.first_token:g} s, others in {config.between_tokens:g} s"
    right.set(title=f"served well: {limits}", xlabel="requests per second", ylabel="requests per second")
    right.plot(config.rates, config.rates, color="gray", linestyle=":", label="all of them")
    for axes in (left, middle, right):
        axes.legend()
    save_figure(figure, path)


@script
def main() -> None:
    """Parse and simulate."""
    run(SimulateConfig.from_cli())


if __name__ == "__main__":
    main()
