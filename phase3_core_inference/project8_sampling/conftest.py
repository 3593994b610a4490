"""What the tests of project 8 share: a vocabulary with halves of characters, and a way to draw at random."""

from collections.abc import Callable

import pytest
import torch

from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase3_core_inference.project8_sampling.config import SamplingParams
from phase3_core_inference.project8_sampling.sampler import Sampler
from phase3_core_inference.project8_sampling.state import RequestState
from phase3_core_inference.project8_sampling.vocabulary import Vocabulary

TEXT = (
    '{"name": "Zoë", "size": 12.5, "tags": ["a", "b"], "ok": true, "next": null}, {"x": -1, "y": false}\n'
    "The quick brown fox says: 日本語 and 🙂. A list of names, ages and numbers: 1, 2, 3, 10, 2024-01-31.\n"
)
END = "<|endoftext|>"


@pytest.fixture(scope="session")
def tokenizer() -> BPETokenizer:
    """A byte-level tokenizer: all bytes, common pieces of JSON, pieces of characters, a special token."""
    return BPETokenizer.train_from_iterator([TEXT] * 4, 420, special_tokens=[END])


@pytest.fixture(scope="session")
def vocabulary(tokenizer: BPETokenizer) -> Vocabulary:
    """Its vocabulary, with ids to spare."""
    return Vocabulary.of(tokenizer, 432)


Write = Callable[..., RequestState]


@pytest.fixture(scope="session")
def write_at_random(vocabulary: Vocabulary, tokenizer: BPETokenizer) -> Write:
    """A function that lets a model of random logits write under some settings."""
    sampler, end = Sampler(), tokenizer.special_tokens[END]

    def write(seed: int = 0, spread: float = 3.0, **settings: object) -> RequestState:
        state = RequestState(SamplingParams(seed=seed, **settings), [], vocabulary, [end])  # type: ignore[arg-type]
        noise = torch.Generator().manual_seed(seed)
        while state.finish_reason is None:
            sampler(spread * torch.randn(1, vocabulary.size, generator=noise), [state])
        return state

    return write
