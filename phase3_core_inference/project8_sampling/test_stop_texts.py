"""Checks of stop texts and of requests that end. --interactive stops what you type at END."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.script import ask, run_validation
from phase3_core_inference.project8_sampling.config import SamplingParams
from phase3_core_inference.project8_sampling.sampler import Sampler
from phase3_core_inference.project8_sampling.state import RequestState
from phase3_core_inference.project8_sampling.stop_texts import StopMatcher, StreamedText
from phase3_core_inference.project8_sampling.vocabulary import Vocabulary


def cut(data: bytes, draw: random.Random) -> list[bytes]:
    """Cut bytes into tokens of 0 to 4 bytes, anywhere."""
    pieces = []
    while data:
        size = draw.randrange(5)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


alphabet = st.text("abé🙂", max_size=30)


@given(
    alphabet,
    st.lists(st.text("abé🙂", min_size=1, max_size=4), max_size=3),
    st.randoms(use_true_random=False),
)
def test_what_is_shown_is_the_text_up_to_the_stop_text_that_is_whole_first(text: str, stop: list, draw):
    ends = [(text.find(word) + len(word), -len(word)) for word in stop if word in text]
    expected = text[: sum(min(ends))] if ends else text
    streamed = StreamedText(stop)
    shown = [streamed.add(token) for token in cut(text.encode(), draw)]
    assert "".join([*shown, streamed.finish()]) == expected == streamed.text


@given(alphabet, st.lists(st.text("abé🙂", min_size=1, max_size=4), min_size=1, max_size=3))
def test_what_is_shown_never_has_to_be_taken_back_and_comes_as_early_as_can_be(text: str, stop: list):
    streamed, data = StreamedText(stop), text.encode()
    for i, byte in enumerate(data, start=1):
        streamed.add(bytes([byte]))
        if streamed.stopped:
            break
        read = data[:i]
        begun = max(
            (n for word in stop for n in range(1, len(word.encode())) if read.endswith(word.encode()[:n])),
            default=0,
        )
        whole = read[: len(read) - begun].decode(errors="ignore")
        assert streamed.text == whole


def test_the_first_byte_of_a_stop_text_is_found_inside_of_a_token():
    matcher = StopMatcher(["END", "N!"])
    assert matcher.read(b"xxE") is None
    assert matcher.held == 1
    assert matcher.read(b"EN") is None
    assert matcher.held == 2
    assert matcher.read(b"!zz") == 4  # N! begins four bytes before the end of this token
    assert StopMatcher([]).read(b"anything") is None


def test_half_a_character_at_the_end_is_shown_as_one_that_cannot_be():
    streamed = StreamedText([])
    assert streamed.add("🙂".encode()[:2]) == ""
    assert streamed.finish() == "�"


# Requests that end


@pytest.fixture
def letters() -> Vocabulary:
    """Ids 0 to 25 are letters, 26 is "the", 27 is special."""
    return Vocabulary([bytes([97 + i]) for i in range(26)] + [b"the", None])


def spell(letters: Vocabulary, words: list[int], **settings) -> RequestState:
    state = RequestState(SamplingParams(**settings), [1], letters, stop_tokens=[27])
    for token in words:
        if state.finish_reason is None:
            state.append(token)
    return state


def test_a_request_ends_at_a_stop_text_a_stop_token_or_its_length(letters: Vocabulary):
    word = [0, 1, 26, 2, 3]
    ended = spell(letters, word, stop=["bt"])
    assert (ended.finish_reason, ended.text, ended.output) == ("stop", "a", [0, 1, 26])
    ended = spell(letters, [0, 1, 27], stop=["bt"])
    assert (ended.finish_reason, ended.text) == ("stop", "ab")
    ended = spell(letters, word, stop=["cx"], max_new_tokens=4)
    assert (ended.finish_reason, ended.text) == ("length", "abthec")
    assert spell(letters, word).finish_reason is None
    with pytest.raises(ValueError, match=r"token \(0\) must not come after the end \(stop\)"):
        spell(letters, [27]).append(0)


def test_a_text_cannot_end_before_its_least_length(letters: Vocabulary):
    logits = torch.zeros(1, 28)
    logits[0, 27] = 50
    state = RequestState(SamplingParams(min_new_tokens=3, seed=0), [1], letters, stop_tokens=[27])
    while state.finish_reason is None:
        Sampler()(logits, [state])
    assert len(state.output) == 4


def interact() -> None:
    for line in ask("text> "):
        streamed = StreamedText(["END"])
        print("|".join([*(streamed.add(bytes([byte])) for byte in line.encode()), streamed.finish()]))


if __name__ == "__main__":
    run_validation(__file__, interact)
