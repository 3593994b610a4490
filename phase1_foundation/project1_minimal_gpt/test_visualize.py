"""Checks of what visualize.py shows. --interactive draws the attention maps of the text you type."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.files import CHECKPOINTS
from common.script import ask, run_validation
from phase1_foundation.project1_minimal_gpt import visualize
from phase1_foundation.project1_minimal_gpt.config import GPTConfig, VisualizeConfig
from phase1_foundation.project1_minimal_gpt.conftest import Trained
from phase1_foundation.project1_minimal_gpt.model import GPT
from phase1_foundation.project1_minimal_gpt.tokenizer import ByteTokenizer, CharTokenizer
from phase1_foundation.project1_minimal_gpt.visualize import (
    PATTERNS,
    RecordingAttention,
    attention_weights,
    by_distance,
    by_pattern,
    kind,
    label,
    main_directions,
    run,
    spread_out,
)


def size_of_png(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def looking_at(*places: int) -> torch.Tensor:
    """Attention maps (1, 1, T, T) of a head that looks at one place per row."""
    return torch.eye(len(places))[list(places)][None, None]


def test_recording_changes_nothing_and_keeps_every_layers_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=3, n_head=2, n_embd=8)).eval()
    tokens, backend = torch.randint(5, (2, 6)), RecordingAttention()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, backend), model(tokens))
    assert [weights.shape for weights in backend.weights] == [(2, 2, 6, 6)] * 3
    weights = attention_weights(model, tokens[0].tolist())
    torch.testing.assert_close(weights, torch.stack(backend.weights)[:, 0])
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 2, 6))
    assert not weights.triu(1).any()


def test_distances_and_patterns_are_those_of_heads_made_by_hand():
    ids = torch.tensor([7, 8, 9, 7, 8])  # a b c a b
    itself, before = looking_at(0, 1, 2, 3, 4), looking_at(0, 0, 1, 2, 3)
    same, followed = looking_at(0, 1, 2, 0, 1), looking_at(0, 1, 2, 1, 2)
    assert by_distance(itself, 3)[0, 0].tolist() == [1, 0, 0, 0]
    assert by_distance(before, 3)[0, 0].tolist() == pytest.approx([0.2, 1, 0, 0])  # row 0 has only itself
    assert by_distance(looking_at(0, 0, 0, 0, 0), 2)[0, 0].tolist() == pytest.approx([0.2, 0.25, 1])
    assert by_distance(itself, 16).shape == (1, 1, 6)
    names = [name.replace("\n", " ") for name in PATTERNS]
    by_hand = [itself, before, same, followed, looking_at(0, 0, 0, 0, 0)]
    assert names == ["itself", "the one before", "same token", "what followed that one", "first of the text"]
    for place, head in enumerate(by_hand):
        assert by_pattern(head, ids)[0, 0, place] == 1, names[place]
    assert by_pattern(itself, ids)[0, 0].tolist() == [1, 0, 0, 0, 0]


def test_main_directions_are_those_of_the_covariance():
    points = torch.randn(50, 6) * torch.tensor([5.0, 3.0, 1.0, 1.0, 1.0, 1.0]) + 4
    coordinates, shares = main_directions(points, 2)
    values, vectors = np.linalg.eigh(np.cov(points.double().numpy().T))
    np.testing.assert_allclose(shares.numpy(), values[::-1][:2] / values.sum(), rtol=1e-6)
    projected = (points.double().numpy() - points.double().numpy().mean(0)) @ vectors[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(coordinates.numpy()), np.abs(projected), rtol=1e-5, atol=1e-5)
    coordinates, shares = main_directions(torch.ones(1, 3), 4)  # nothing varies
    assert coordinates.shape == (1, 4)
    assert shares.tolist() == [0, 0, 0, 0]


def test_labels_that_would_overlap_are_moved_apart_and_others_stay():
    places = torch.tensor([[0.0, 0.0], [1e-4, 0.0], [1.0, 1.0]], dtype=torch.float64)
    moved = spread_out(places, least=0.02)
    assert (moved[0] - moved[1]).norm() > 0.0199
    assert torch.equal(moved[2], places[2])


def test_every_token_gets_a_label_that_shows():
    tokenizer = CharTokenizer("".join(sorted("a\n\t $é世🙂\u200b")))
    labels = {char: label(tokenizer, tokenizer.ids[char]) for char in tokenizer.chars}
    signs = {"a": "a", "\n": "↵", "\t": "⇥", " ": "␣", "$": r"\$", "é": "é"}
    assert labels == signs | {"世": "4e16", "🙂": "1f642", "\u200b": "200b"}
    assert [label(ByteTokenizer(), byte) for byte in (65, 10, 13, 0, 0xC3)] == ["A", "↵", "0d", "00", "c3"]


def test_every_kind_of_character_is_told():
    tokenizer = CharTokenizer("aéBz3.\n🙂")
    kinds = [kind(tokenizer, token) for token in range(8)]
    assert kinds == [
        "vowel",
        "consonant",
        "capital",
        "consonant",
        "digit",
        "punctuation",
        "whitespace",
        "other",
    ]
    assert kind(ByteTokenizer(), 0xC3) == "other"


def test_all_pictures_are_drawn(trained: Trained, tmp_path: Path):
    config = VisualizeConfig(trained.out / "model.pt", "to be or not\n🙂", tmp_path / "out")
    paths = run(config)
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)
    assert [path.stem for path in paths] == ["attention", "heads", "positions", "tokens"]
    for path in paths:
        width, height = size_of_png(path)
        assert 600 < width < 4000
        assert 300 < height < 4000
    before = paths[0].read_bytes()
    run(replace(config, prompt="not to be"))
    assert paths[0].read_bytes() != before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompt=", "prompt () must hold at least one character"),
        ("--prompt=Zeus", "character ('Z', U+005A)"),
        ("--prompt=totototototototot", "prompt (17 tokens) must have at least 1 and at most block_size (16)"),
        ("--checkpoint none.pt", "there is no checkpoint none.pt; make it with: uv run"),
        ("--out {tmp}/file/below", "Not a directory"),
    ],
)
def test_a_bad_input_gets_one_line_and_status_2_and_draws_nothing(
    flags: str, message: str, trained: Trained, tmp_path: Path, refusal: Callable
):
    (tmp_path / "file").touch()
    fixed = [f"--checkpoint={trained.out / 'model.pt'}", f"--out={tmp_path / 'out'}", "--prompt=to be"]
    assert message in refusal(visualize.main, *fixed, *flags.format(tmp=tmp_path).split()).err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def interact() -> None:
    """Draw the attention maps of each typed text."""
    for text in ask("text> "):
        run(VisualizeConfig(prompt=text, out=CHECKPOINTS / "project1"))


if __name__ == "__main__":
    run_validation(__file__, interact)
