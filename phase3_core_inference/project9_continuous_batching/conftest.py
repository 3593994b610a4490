"""What the tests of project 9 share: a small model in float64, and each request's text when it is alone."""

import pytest
import torch

from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project3_pretrain.config import DecoderConfig
from phase1_foundation.project3_pretrain.model import Decoder
from phase3_core_inference.project8_sampling.config import SamplingParams
from phase3_core_inference.project8_sampling.sampler import Sampler
from phase3_core_inference.project8_sampling.state import RequestState
from phase3_core_inference.project9_continuous_batching.request import Request

V, LENGTH = 31, 24


@pytest.fixture(scope="session")
def model() -> Decoder:
    """Weights are large enough for attention to matter."""
    torch.manual_seed(0)
    shape = DecoderConfig(vocab_size=V, block_size=LENGTH, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
    model = Decoder(shape).double().eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.3).add_(0.5 * (weight.dim() == 1))
    return model


@pytest.fixture(scope="session")
def tokenizer() -> BPETokenizer:
    """Bytes, and a special token."""
    return BPETokenizer({i: bytes([i]) for i in range(256)}, [], {"<|end|>": 256})


def make_request(seed: int, prompt: int, output: int, client: str = "", priority: int = 0) -> Request:
    """Return a request whose prompt and settings follow from a few numbers."""
    draw = torch.Generator().manual_seed(1000 * seed + prompt)
    ids = torch.randint(V, (prompt,), generator=draw).tolist()
    settings = [{"temperature": 0}, {"top_k": 5}, {"top_p": 0.8, "repetition_penalty": 1.3}, {"min_p": 0.1}]
    params = SamplingParams(max_new_tokens=output, seed=seed, **settings[seed % len(settings)])
    return Request(ids, params, client, priority, frozenset({3}) if seed % 3 == 0 else frozenset())


class Alone:
    """Writes requests one by one, without cache, engine or company."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.known: dict[tuple, list[int]] = {}

    @torch.inference_mode()
    def __call__(self, request: Request) -> list[int]:
        prompt, params = list(request.prompt), request.params
        key = (*prompt, params.seed, params.max_new_tokens)
        if key not in self.known:
            state = RequestState(params, prompt, None, request.stop_tokens)
            while state.finish_reason is None and len(prompt) + len(state.output) <= LENGTH:
                Sampler()(self.model(torch.tensor([[*prompt, *state.output]]))[:, -1].float(), [state])
            self.known[key] = state.output
        return self.known[key]


@pytest.fixture(scope="session")
def alone(model: Decoder) -> Alone:
    """What each request gets when nobody else asks."""
    return Alone(model)
