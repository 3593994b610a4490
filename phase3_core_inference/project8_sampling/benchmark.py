"""Measure what choosing tokens costs: uv run python phase3_core_inference/project8_sampling/benchmark.py"""

import json
import random
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.device import pick_device, pick_dtype
from common.script import progress, script
from phase1_foundation.project1_minimal_gpt.benchmark import time_in_turn
from phase1_foundation.project3_pretrain.weights import load_model
from phase3_core_inference.project8_sampling.config import BenchmarkConfig, SamplingParams
from phase3_core_inference.project8_sampling.constraint import Constraint
from phase3_core_inference.project8_sampling.generate import Steps
from phase3_core_inference.project8_sampling.random_schemas import random_recursive_schema, random_schema
from phase3_core_inference.project8_sampling.sampler import Sampler
from phase3_core_inference.project8_sampling.state import RequestState
from phase3_core_inference.project8_sampling.vocabulary import Vocabulary

MIX: list[dict[str, Any]] = [  # what requests of many people may ask for, one after the other
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3, "top_p": 0.95},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "no_repeat_ngram": 3},
    {"typical_p": 0.9},
    {"eta": 3e-3},
    {"epsilon": 3e-4},
    {"top_n_sigma": 1.0},
    {"mirostat": 2},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 5},
    {"temperature": 0.7, "watermark": 2.0, "top_k": 50},
    {"temperature": 0.0, "logit_bias": {5: -100.0, 9: 2.0}},
]


class Decoding(NamedTuple):
    """Median seconds of a step of the batch."""

    step: float  # the model's
    sampler: float
    plain: float  # choosing the same tokens row by row with transformers' warpers


def run(config: BenchmarkConfig) -> dict[str, float]:
    """Time everything, print it, and return the numbers."""
    device = pick_device(config.device)
    model, tokenizer = load_model(config.model, pick_dtype(config.precision, device))
    model.to(device)
    vocabulary = Vocabulary.of(tokenizer, model.config.vocab_size)
    print(f"model       {config.model}, {model.config.vocab_size:,} tokens, {config.precision}, {device}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    found = time_sampler(config, Steps(model, text_ids(config, tokenizer), config.batch_size), vocabulary)
    if config.schemas:
        found |= time_schemas(config, vocabulary)
    return found


def text_ids(config: BenchmarkConfig, tokenizer: Any) -> list[int]:
    """Return as many tokens of a text as the context shall have."""
    text = "The sea was calm, and the old man told us what he had seen on his way around the world. "
    return (tokenizer.encode(text) * config.context)[: config.context]


def mixed_requests(number: int, prompt: list[int], vocabulary: Vocabulary) -> list[RequestState]:
    """Return requests with the settings of MIX in turn, which do not end."""
    return [
        RequestState(SamplingParams(**MIX[i % len(MIX)], seed=i, max_new_tokens=10**6), prompt, vocabulary)
        for i in range(number)
    ]


def time_sampler(config: BenchmarkConfig, steps: Steps, vocabulary: Vocabulary) -> dict[str, float]:
    """Let a mixed batch write, timing the model's steps and the sampler's in turn."""
    states = mixed_requests(config.batch_size, steps.texts[0], vocabulary)
    sampler, step_times, sampler_times = Sampler(), [], []
    for _ in progress(range(config.repeats + 3), desc="decoding", leave=False):
        logits = steps.logits
        began = time.perf_counter()
        tokens = sampler(logits, states).tokens
        chosen = time.perf_counter()
        steps.feed(tokens)
        sampler_times.append(chosen - began)
        step_times.append(time.perf_counter() - chosen)
    step, ours = (statistics.median(times[3:]) for times in (step_times, sampler_times))
    logits = steps.logits.float().cpu().clone()
    theirs = time_in_turn(
        {"transformers": lambda: row_by_row(logits, states)}, 3, logits.device, "transformers"
    )
    print(f"\n{'batch of ' + str(config.batch_size):26}{'ms per step':>12}{'of a decode step':>18}")
    rows = {
        "decode step of the model": step,
        "sampler, mixed settings": ours,
        "transformers, row by row": theirs["transformers"],
    }
    for name, seconds in rows.items():
        print(f"{name:26}{seconds * 1e3:12.2f}{seconds / step:18.1%}")
    return {"step": step, "sampler": ours, "share": ours / step, "transformers": theirs["transformers"]}


def row_by_row(logits: Tensor, states: list[RequestState]) -> list[int]:
    """Choose tokens with transformers' processors; a batch with mixed settings is a loop over rows there."""
    import transformers.generation.logits_process as hf

    makers = {  # what forbids tokens comes first: else all that is left could be forbidden
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram": hf.NoRepeatNGramLogitsProcessor,
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
        "typical_p": hf.TypicalLogitsWarper,
        "epsilon": hf.EpsilonLogitsWarper,
        "eta": hf.EtaLogitsWarper,
    }
    tokens = []
    for row, state in enumerate(states):
        scores, settings = logits[row : row + 1], MIX[row % len(MIX)]
        ids = torch.tensor([[*state.prompt, *state.output]])
        for name, make in makers.items():
            if settings.get(name):
                scores = make(settings[name])(ids, scores)
        greedy = settings.get("temperature") == 0
        tokens.append(int(scores.argmax()) if greedy else int(torch.multinomial(scores.softmax(dim=1), 1)))
    return tokens


def time_schemas(config: BenchmarkConfig, vocabulary: Vocabulary) -> dict[str, float]:
    """Write a document by each of many random schemas with random logits; parse and validate each."""
    import jsonschema

    began = time.perf_counter()
    nodes = len(vocabulary.trie.letters)
    seconds = time.perf_counter() - began
    print(f"\ntrie of the vocabulary: {nodes:,} nodes in {seconds:.2f} s, once per tokenizer")
    compiling, masking, valid, refused, tokens = [], [], 0, 0, 0
    noise, sampler = torch.Generator().manual_seed(0), Sampler()
    for seed in progress(range(config.schemas), desc="schemas", leave=False):
        draw = random.Random(seed)
        schema = random_recursive_schema(draw) if seed % 6 == 0 else random_schema(draw)
        params = SamplingParams(
            json_schema=json.dumps(schema), seed=seed, max_new_tokens=config.max_new_tokens
        )
        try:
            compiling.append(Constraint.compile(vocabulary, "json_schema", json.dumps(schema)).seconds)
            state = RequestState(params, [], vocabulary)
        except ValueError:  # nothing satisfies it, or nothing so short
            refused += 1
            continue
        while state.finish_reason is None:
            began = time.perf_counter()
            state.constraint.forbidden(config.max_new_tokens - len(state.output))  # type: ignore[union-attr]
            masking.append(time.perf_counter() - began)
            sampler(3 * torch.randn(1, vocabulary.size, generator=noise), [state])
        jsonschema.Draft202012Validator(schema).validate(json.loads(state.text))  # raises where it is wrong
        valid, tokens = valid + 1, tokens + len(state.output)
    found: dict[str, float] = {"valid": valid, "refused": refused}
    found |= {"compile": statistics.median(compiling), "mask": statistics.median(masking)}
    found |= {"mask_mean": statistics.fmean(masking), "mask_99": sorted(masking)[int(0.99 * len(masking))]}
    print(f"{valid} documents of {tokens:,} tokens by {config.schemas} random schemas, all of them valid;")
    print(f"{refused} schemas that no text of {config.max_new_tokens} tokens satisfies were refused")
    print(
        f"compiling a schema: median {found['compile'] * 1e3:.2f} ms, longest {max(compiling) * 1e3:.0f} ms"
    )
    print(f"a mask, per token: median {found['mask'] * 1e3:.2f} ms, mean {found['mask_mean'] * 1e3:.2f} ms, "
          f"99th of 100 {found['mask_99'] * 1e3:.1f} ms")  # fmt: skip
    return found


@script
def main() -> None:
    """Parse and measure."""
    run(BenchmarkConfig.from_cli())


if __name__ == "__main__":
    main()
