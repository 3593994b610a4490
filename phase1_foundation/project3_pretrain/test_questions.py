"""Checks that questions are read alike from every shape in which they come."""

import json
from pathlib import Path

import pytest

from common.script import run_validation
from phase1_foundation.project3_pretrain import questions
from phase1_foundation.project3_pretrain.likelihood import Question
from phase1_foundation.project3_pretrain.questions import find_file, load_questions, read_question, task_of

STEM, TEXTS = "What is wet?", ["Sand.", "Water.", "Stone."]
ASKED = Question("Question: What is wet?\nAnswer:", (" Sand.", " Water.", " Stone."), 1)
SHAPES = {
    "a query with a number": {"query": f"Question: {STEM}\n", "choices": TEXTS, "gold": 1},
    "the original ARC": {
        "question": {
            "stem": STEM,
            "choices": [{"text": t, "label": x} for t, x in zip(TEXTS, "ABC", strict=True)],
        },
        "answerKey": "B",
    },
    "ARC of the hub": {
        "question": STEM,
        "choices": {"text": TEXTS, "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "ARC with numbers": {
        "question": STEM,
        "choices": {"text": TEXTS, "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "a table": {"question": STEM, "choices": dict(zip("ABC", TEXTS, strict=True)), "answer": "B"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_question_in_all_shapes_is_one_question(shape: str):
    assert read_question(SHAPES[shape], "answer") == ASKED


def test_piqa_asks_for_one_of_two_ways():
    record = {"goal": "dry a cat", "sol1": "wait", "sol2": "an oven", "label": 0}
    assert read_question(record, "answer") == Question(
        "Question: dry a cat\nAnswer:", (" wait", " an oven"), 0
    )


def test_hellaswag_goes_on_from_the_text_without_the_marks_of_wikihow():
    endings = ["[substeps] Run.", "Sit.  Wait.", "Go on [title] Rest.", "No."]
    original = {
        "activity_label": "Baking",
        "ctx": "[header] How to bake [title] Heat.",
        "endings": endings,
        "label": "2",
    }
    expected = ("Run.", "Sit. Wait.", "Go on. Rest.", "No.")
    found = read_question(original, "continue")
    assert found.context == "Baking: How to bake. Heat." or found.context == "Baking:  How to bake. Heat."
    assert found.choices == tuple(" " + text for text in expected)
    assert found.answer == 2
    table = {
        "question": "[header] How to bake [title] Heat.",
        "choices": dict(zip("ABCD", endings, strict=True)),
    }
    assert read_question(table | {"answer": "C"}, "continue").choices == found.choices


def test_lambada_asks_for_the_last_word():
    expected = Question("He took the", (" bus",), 0)
    assert read_question({"context": "He took the", "continuation": "bus"}, "word") == expected
    assert read_question({"text": "He took the bus"}, "word") == expected


@pytest.mark.parametrize(
    "content",
    [
        "\n".join([json.dumps(SHAPES["a table"])] * 3),
        json.dumps([SHAPES["a table"]] * 3),
        json.dumps({"dataset": "x", "dev": [], "test": [SHAPES["a table"]] * 3}),
    ],
    ids=["lines", "list", "splits"],
)
def test_files_are_lines_or_lists_or_splits(content: str, tmp_path: Path):
    file = tmp_path / ("arc_easy.jsonl" if "\n" in content else "arc_easy.json")
    file.write_text(content, encoding="utf-8")
    assert load_questions(str(file)) == [ASKED] * 3
    assert load_questions(str(file), limit=2) == [ASKED] * 2


def test_a_task_by_name_is_found_in_the_local_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(questions, "FOLDER", tmp_path / "none")
    monkeypatch.setenv("LLM_COURSE_DATA", str(tmp_path))
    (tmp_path / "eval").mkdir()
    file = tmp_path / "eval" / "piqa_1838.jsonl"
    file.write_text(json.dumps({"goal": "a", "sol1": "b", "sol2": "c", "label": 1}), encoding="utf-8")
    assert find_file("piqa") == file
    assert load_questions("piqa")[0].answer == 1
    with pytest.raises(FileNotFoundError, match=r"no lambada\*\.json"):
        find_file("lambada", "local")


def test_the_hub_is_asked_last_and_what_it_gives_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Table:
        def __init__(self, *what) -> None:
            assert what[0] == "ybisk/piqa"

        def load(self, streaming: bool) -> list[dict]:
            return [{"goal": "a", "sol1": "b", "sol2": "ü", "label": 1}]

    monkeypatch.setattr(questions, "FOLDER", tmp_path / "eval")
    monkeypatch.setenv("LLM_COURSE_DATA", str(tmp_path))
    monkeypatch.setattr(questions, "HubTable", Table)
    assert load_questions("piqa")[0].choices == (" b", " ü")
    monkeypatch.setattr(questions, "HubTable", None)  # must not be asked again
    assert len(load_questions("piqa")) == 1


def test_a_file_is_named_after_its_task():
    assert task_of(Path("arc_challenge_mine.jsonl")).options == {"name": "ARC-Challenge"}
    with pytest.raises(ValueError, match=r"file \(mine.json\) must begin with its task: hellaswag, arc_easy"):
        task_of(Path("mine.json"))


@pytest.mark.parametrize(
    "record",
    [
        {"query": "a", "choices": ["b", "c"], "gold": 2},
        {"query": "a", "choices": ["b", "c"], "gold": -1},
        {"query": "a", "choices": ["b", "c"]},
        {"query": "a", "choices": ["b"], "gold": 0},
        {"query": "a", "choices": [], "gold": 0},
        {"query": None, "choices": ["b", "c"], "gold": 0},
        {"query": "a", "choices": ["b", None], "gold": 0},
        ["a"],
        7,
    ],
)
def test_what_is_no_question_is_an_error_that_says_where(record, tmp_path: Path):
    file = tmp_path / "arc_easy.json"
    file.write_text(json.dumps([SHAPES["a table"], record]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"arc_easy.json \(answer, record 2\) must be a question"):
        load_questions(str(file))


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', "7"])
def test_a_file_of_something_else_is_an_error(content: str, tmp_path: Path):
    (tmp_path / "piqa.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"piqa.json must be"):
        load_questions(str(tmp_path / "piqa.json"))


def test_an_unknown_task_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"task \(mmlu\) must be a file or one of hellaswag"):
        load_questions("mmlu")
    with pytest.raises(ValueError, match=r"source \(url\) must be auto, local or hub for piqa"):
        load_questions("piqa", "url")


if __name__ == "__main__":
    run_validation(__file__)
