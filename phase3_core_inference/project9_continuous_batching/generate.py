"""Answer several prompts at once.

uv run python phase3_core_inference/project9_continuous_batching/generate.py

With --interactive type prompts divided by |; what each gets is shown as it comes, a line for each at the end.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from common.device import pick_device, pick_dtype
from common.script import ask, one_line, script
from phase1_foundation.project3_pretrain.generate import can_chat, chat_ids, stop_tokens, text_ids
from phase1_foundation.project3_pretrain.weights import load_model
from phase3_core_inference.project8_sampling.config import SamplingParams
from phase3_core_inference.project9_continuous_batching.config import GenerateConfig
from phase3_core_inference.project9_continuous_batching.engine import Engine
from phase3_core_inference.project9_continuous_batching.request import Request


class Desk:
    """An engine, and what makes requests out of what people type."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        device = pick_device("auto")
        model, self.tokenizer = load_model(config.model, pick_dtype(config.precision, device))
        shape = replace(config.engine, length=min(config.engine.length, model.config.block_size))
        self.engine = Engine.of(model.to(device), shape, self.tokenizer)
        self.stop = stop_tokens(self.tokenizer)
        self.asked = 0

    def request(self, prompt: str) -> Request:
        """Return the request of a prompt: what is said to a chat model, or a text to go on from."""
        config = self.config
        if can_chat(self.tokenizer):
            system = [("system", config.system)] if config.system else []
            ids = chat_ids(self.tokenizer, [*system, ("user", prompt)])
        else:
            ids = text_ids(self.tokenizer, prompt)
        seed = config.seed + self.asked
        self.asked += 1
        params = SamplingParams(
            config.temperature, top_p=config.top_p, max_new_tokens=config.max_new_tokens, seed=seed
        )
        return Request(ids, params, stop_tokens=self.stop)

    def serve(self, prompts: Sequence[str]) -> list[str]:
        """Answer prompts together, printing as it comes, and return the answers."""
        began, tokens = time.perf_counter(), 0
        ids: list[int] = []
        try:
            for prompt in prompts:
                ids.append(self.engine.add(self.request(prompt)))
        except ValueError:  # all or none
            for id in ids:
                self.engine.cancel(id)
            raise
        answers = dict.fromkeys(ids, "")
        while self.engine.has_work:
            for output in self.engine.step():
                tokens += 1
                answers[output.id] += output.text
                if output.text:
                    print(f"[{ids.index(output.id) + 1}]{output.text!r}", end=" ", flush=True)
        seconds = time.perf_counter() - began
        print()
        for number, (prompt, answer) in enumerate(zip(prompts, answers.values(), strict=True), start=1):
            print(f"\n{number}  {prompt}\n   {answer.strip()}")
        speed = f"{tokens / seconds:.1f} tokens/s together"
        print(f"({tokens} tokens in {self.engine.steps} steps, {speed})", file=sys.stderr)
        return list(answers.values())


def run(config: GenerateConfig) -> list[str]:
    """Answer what was asked for, and return it."""
    desk = Desk(config)
    if not config.interactive:
        return desk.serve(config.prompts)
    answers = []
    for line in ask("prompt | prompt ...> "):
        prompts = [prompt.strip() for prompt in line.split("|") if prompt.strip()]
        try:
            answers += desk.serve(prompts)
        except ValueError as error:  # one that is too long should not end the session
            print(f"error: {one_line(error)}")
    return answers


@script
def main() -> None:
    """Parse and serve."""
    run(GenerateConfig.from_cli())


if __name__ == "__main__":
    main()
