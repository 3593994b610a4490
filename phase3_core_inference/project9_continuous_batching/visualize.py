"""Pictures of an engine at work.

uv run python phase3_core_inference/project9_continuous_batching/visualize.py

All of them are made by the simulator, with costs measured by benchmark.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.files import make_folder, shown
from common.plots import new_figure, save_figure
from common.script import script
from phase3_core_inference.project8_sampling.config import SamplingParams
from phase3_core_inference.project9_continuous_batching.config import (
    EngineConfig,
    LoadConfig,
    Policy,
    SimulateConfig,
    VisualizeConfig,
)
from phase3_core_inference.project9_continuous_batching.engine import Engine
from phase3_core_inference.project9_continuous_batching.loads import Arrival, drive, make_load
from phase3_core_inference.project9_continuous_batching.request import Job, Request, Work
from phase3_core_inference.project9_continuous_batching.simulate import read_costs
from phase3_core_inference.project9_continuous_batching.simulate import run as simulate_sweep
from phase3_core_inference.project9_continuous_batching.simulator import (
    CostModel,
    SimulatedRunner,
    VirtualClock,
    simulate,
)

READS, WRITES, IDLE = "#f2c14e", "#3b7dd8", "#d8d2c4"


class Watched(SimulatedRunner):
    """A simulated runner that notes who had which slot, and when."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.seen: list[tuple[float, float, list[tuple[int, int, str]]]] = []  # begin, end, (slot, id, color)

    def run(self, work: Sequence[Work]) -> list[Any]:
        """Note, then go on."""
        rows = [
            (item.job.slot, item.job.id, IDLE if item.idle else WRITES if item.job.writes else READS)
            for item in work
        ]
        begin = self.clock()
        drawn = super().run(work)
        self.seen.append((begin, self.clock(), rows))
        return drawn


def watch(load: Sequence[Arrival], config: EngineConfig, costs: CostModel) -> tuple[Watched, list[Job]]:
    """Simulate a load and return what was seen, and the requests."""
    clock = VirtualClock()
    runner = Watched(costs, clock, config.length)
    return runner, drive(Engine(runner, config, clock), load, clock)


def draw_slots(costs: CostModel, path: Path) -> None:
    """Draw who has which slot, batch by batch and step by step, for the same requests."""
    load = make_load(
        LoadConfig(requests=28, arrivals="at_once", prompt_tokens=12, output_tokens=12), 96, vocab_size=2
    )
    figure, axes = new_figure(2, 1, width=11, height=6)
    ends = []
    policies: tuple[Policy, ...] = ("static", "continuous")
    for ax, policy in zip(axes, policies, strict=True):
        config = EngineConfig(policy=policy, slots=8, length=96, token_budget=32)
        runner, _ = watch(load, config, costs)
        for begin, end, rows in runner.seen:
            for slot, _, color in rows:
                ax.barh(slot, end - begin, left=begin, height=0.85, color=color, linewidth=0)
        ends.append(runner.seen[-1][1])
        ax.set(title=f"{policy}: done after {ends[-1]:.2f} s", ylabel="slot", xlabel="seconds")
        ax.grid(visible=False)
    for color, name in (
        (READS, "reads its prompt"),
        (WRITES, "writes"),
        (IDLE, "is done, computed all the same"),
    ):
        axes[1].barh(0, 0, color=color, label=name)
    axes[1].legend(loc="center right")  # where the shorter picture is empty
    for ax in axes:
        ax.set_xlim(0, 1.02 * max(ends))
    save_figure(figure, path)


def draw_stalls(costs: CostModel, path: Path) -> None:
    """Draw when the tokens of a text come while long prompts arrive, with and without chunks."""
    writer = Arrival(0.0, Request([0] * 8, SamplingParams(max_new_tokens=120)))
    others = [Arrival(0.3 + 0.6 * i, Request([0] * 400, SamplingParams(max_new_tokens=4))) for i in range(4)]
    figure, ax = new_figure(1, 1, width=10, height=4)
    for chunked, color in ((False, "C3"), (True, "C0")):
        config = EngineConfig(slots=8, length=512, token_budget=64, chunked=chunked)
        text = simulate([writer, *others], config, costs)[0]
        label = "prompts in pieces of up to 64 tokens" if chunked else "prompts as a whole"
        ax.plot(text.times[1:], 1e3 * np.diff(text.times), ".-", color=color, label=label, markersize=4)
    for arrival in others:
        ax.axvline(arrival.time, color="gray", linestyle=":", linewidth=1)
    ax.set(title="one text being written; a prompt of 400 tokens comes at each dotted line",
           xlabel="seconds", ylabel="milliseconds to the next token")  # fmt: skip
    ax.legend()
    save_figure(figure, path)


def draw_fairness(costs: CostModel, path: Path) -> None:
    """Draw what two clients are served, one of which floods the engine."""
    flood = [Arrival(0.0, Request([0] * 16, SamplingParams(max_new_tokens=24), "flood")) for _ in range(150)]
    drops = [
        Arrival(1.0 + 0.25 * i, Request([0] * 16, SamplingParams(max_new_tokens=24), "drop"))
        for i in range(40)
    ]
    load = sorted(flood + drops, key=lambda arrival: arrival.time)
    figure, axes = new_figure(1, 2, width=11, height=4)
    orders: tuple[Literal["fcfs", "fair"], ...] = ("fcfs", "fair")
    for ax, order in zip(axes, orders, strict=True):
        jobs = simulate(load, EngineConfig(slots=8, length=64, token_budget=64, order=order), costs)
        for client in ("flood", "drop"):
            times = sorted(time for job in jobs if job.request.client == client for time in job.times)
            ax.plot(times, np.arange(1, len(times) + 1), label=client)
        waited = np.mean([job.times[0] - job.arrival for job in jobs if job.request.client == "drop"])
        title = "first come, first served" if order == "fcfs" else "virtual token counter"
        ax.set(title=f"{title}: drop waits {waited:.1f} s", xlabel="seconds", ylabel="tokens served")
        ax.legend()
    save_figure(figure, path)


def run(config: VisualizeConfig) -> list[Path]:
    """Draw the pictures and return their files."""
    out, costs, paths = make_folder(config.out), read_costs(config.costs), []
    for name in config.pictures:
        path = out / f"{name}.png"
        if name == "slots":
            draw_slots(costs, path)
        elif name == "stalls":
            draw_stalls(costs, path)
        elif name == "fairness":
            draw_fairness(costs, path)
        else:
            simulate_sweep(replace(SimulateConfig(), costs=config.costs, out=out))
            path = out / "simulation.png"
        paths.append(path)
    print(f"written: {', '.join(map(shown, paths))}")
    return paths


@script
def main() -> None:
    """Parse and draw."""
    run(VisualizeConfig.from_cli())


if __name__ == "__main__":
    main()
