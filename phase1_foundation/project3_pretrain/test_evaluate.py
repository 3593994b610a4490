"""Checks that evaluate.py measures what it is asked to, on texts, shards and questions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.corpora import write_documents
from common.script import run_validation
from phase1_foundation.project3_pretrain import evaluate
from phase1_foundation.project3_pretrain.config import EvaluateConfig
from phase1_foundation.project3_pretrain.conftest import SENTENCES
from phase1_foundation.project3_pretrain.evaluate import read_texts, run
from phase1_foundation.project3_pretrain.likelihood import bzip2_bits_per_byte, score_text
from phase1_foundation.project3_pretrain.test_shards import make_shards


def test_a_text_is_measured_with_the_windows_that_are_printed(checkpoint, model, tokenizer, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("".join(SENTENCES), encoding="utf-8")
    results = run(EvaluateConfig(str(checkpoint), [str(file)], context=16, stride=4, device="cpu"))
    expected, told = score_text(model, tokenizer, ["".join(SENTENCES)], 16, 4)
    assert results == {str(file): expected}
    printed = capsys.readouterr().out
    assert "context 16, stride 4: at least 12 tokens of past" in printed
    assert f"{expected.bits_per_byte:.4f}; bzip2 -9 needs {bzip2_bits_per_byte(told):.4f}" in printed
    assert f"perplexity  {expected.perplexity:,.3f} per token" in printed


def test_documents_of_a_file_and_of_shards_are_read_as_they_were(tmp_path: Path):
    texts = ["one\nline", "two \\ backslash", "drei: ß 🙂"]
    write_documents(tmp_path / "texts.docs.txt", texts)
    assert list(read_texts(str(tmp_path / "texts.docs.txt"))) == texts
    folder = make_shards(tmp_path / "shards", [[[1]]], [list(text.encode()) for text in texts])
    assert list(read_texts(str(folder))) == texts


def test_questions_are_answered_and_the_line_says_by_what(checkpoint, tmp_path: Path, capsys):
    record = {"question": "The sky over the sea is", "choices": ["red.", "blue."], "answer": 1}
    (tmp_path / "hellaswag.json").write_text(json.dumps([record] * 4), encoding="utf-8")
    word = {"context": "The fox in the snow is", "continuation": "red"}
    (tmp_path / "lambada.jsonl").write_text(json.dumps(word), encoding="utf-8")
    tasks = [str(tmp_path / name) for name in ("hellaswag.json", "lambada.jsonl")]
    results = run(EvaluateConfig(str(checkpoint), tasks=tasks, limit_questions=3, device="cpu"))
    assert [(score.questions, score.accuracy) for score in results.values()] == [(3, 1.0), (1, 1.0)]
    printed = capsys.readouterr().out
    assert "3 questions: accuracy 100.0%, by likelihood per byte 100.0% ± 0.0% (guessing 50%)" in printed
    assert "1 questions: last word 100.0% ± 0.0%, its perplexity 1." in printed


def test_bf16_is_near_fp32(checkpoint, tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_text("The moon over the hill is blue.", encoding="utf-8")
    losses = [
        run(EvaluateConfig(str(checkpoint), [str(file)], precision=precision, device="cpu"))[str(file)].nats
        for precision in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model nowhere.pt", "model (nowhere.pt) must be"),
        ("--data nowhere.txt", "data (nowhere.txt) must be a text file or a corpus by name"),
        ("--tasks mmlu", "task (mmlu) must be a file or one of"),
        ("--data FILE --context 49", "context (49) must be at least 1 and at most 48"),
        ("--context -1", "context (-1) must be at least 0"),
        ("--data EMPTY", "must have something to predict"),
        ("--data FOLDER", "no shards in"),
    ],
)
def test_a_bad_input_gets_one_line_and_status_2(
    flags: str, message: str, checkpoint, tmp_path, refusal: Callable
):
    (tmp_path / "text.txt").write_text("The sky", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    places = {"FILE": "text.txt", "EMPTY": "empty.txt", "FOLDER": ""}
    words = [str(tmp_path / places[word]) if word in places else word for word in flags.split()]
    with torch.inference_mode(False):
        assert message in refusal(evaluate.main, "--model", str(checkpoint), "--device", "cpu", *words).err


if __name__ == "__main__":
    run_validation(__file__)
