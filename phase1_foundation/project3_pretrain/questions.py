r"""The questions that language models are compared by, in the shapes in which their files come.

PAPERS
  [1] HellaSwag: Can a Machine Really Finish Your Sentence?, Zellers et al., 2019, arXiv:1905.07830
  [2] Think you have Solved Question Answering? Try ARC, the AI2 Reasoning Challenge, Clark et al., 2018,
      arXiv:1803.05457
  [3] PIQA: Reasoning about Physical Commonsense in Natural Language, Bisk et al., 2019, arXiv:1911.11641
  [4] The LAMBADA dataset: Word prediction requiring a broad discourse context, Paperno et al., 2016,
      arXiv:1606.06031
  [5] Lessons from the Trenches on Reproducible Evaluation of Language Models, Biderman et al., 2024,
      arXiv:2405.14782 (the harness whose prompts these are)
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.corpora import HubTable, hub_errors
from common.files import DATA, atomic_write
from phase1_foundation.project3_pretrain.likelihood import Question

FOLDER = DATA / "eval"


@dataclass(frozen=True)
class Task:
    """Where a task's questions are, and how one is put to a model."""

    dataset: str  # on the Hugging Face hub
    split: str
    style: str  # continue: the choice goes on from the text; answer: Question ... Answer:; word: the last one
    options: dict[str, str] = field(default_factory=dict)  # for load_dataset


TASKS = {
    "hellaswag": Task("Rowan/hellaswag", "validation", "continue"),
    "arc_easy": Task("allenai/ai2_arc", "test", "answer", {"name": "ARC-Easy"}),
    "arc_challenge": Task("allenai/ai2_arc", "test", "answer", {"name": "ARC-Challenge"}),
    "piqa": Task("ybisk/piqa", "validation", "answer", {"revision": "refs/convert/parquet"}),
    "lambada": Task("EleutherAI/lambada_openai", "test", "word", {"name": "default"}),
}


def load_questions(name: str, source: str = "auto", limit: int = 0) -> list[Question]:
    """Return the questions of a task by name, or of a file named after one (`piqa_mine.jsonl`).

    Sources: `local`, a file of that name in data/eval or $LLM_COURSE_DATA/eval; `hub`. OSError, ValueError.
    """
    path = find_file(name, source)
    style = task_of(path).style
    questions = []
    for number, record in enumerate(read_records(path), start=1):
        try:
            questions.append(read_question(record, style))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} ({style}, record {number}) must be a question: {error!r}") from error
        if len(questions) == limit:
            break
    return questions


def task_of(path: Path) -> Task:
    """Return the task after which a file is named; ValueError if it is none."""
    names = [name for name in TASKS if path.name.startswith(name)]
    if not names:
        raise ValueError(f"file ({path.name}) must begin with its task: {', '.join(TASKS)}")
    return TASKS[max(names, key=len)]


def find_file(name: str, source: str = "auto") -> Path:
    """Return a task's file, fetched if need be."""
    if Path(name).is_file():
        return Path(name)
    if name not in TASKS:
        raise FileNotFoundError(f"task ({name}) must be a file or one of {', '.join(TASKS)}")
    if source not in ("auto", "local", "hub"):
        raise ValueError(f"source ({source}) must be auto, local or hub for {name}")
    folders = [FOLDER, Path(os.environ.get("LLM_COURSE_DATA") or DATA) / "eval"]
    found = [path for folder in folders for path in sorted(folder.glob(f"{name}*.json*"))]
    if found and source != "hub":
        return found[0]
    if source == "local":
        raise FileNotFoundError(f"no {name}*.json or .jsonl in {' or '.join(map(str, folders))}")
    task, path = TASKS[name], FOLDER / f"{name}.jsonl"
    print(f"{name}: from the Hugging Face hub ({task.dataset})", file=sys.stderr)
    rows = HubTable(task.dataset, task.split, str.encode, task.options).load(streaming=False)
    with atomic_write(path) as file, hub_errors():
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read_records(path: Path) -> Iterable[dict[str, Any]]:
    """Return the records of a JSONL file, of a JSON list, or of one split of a JSON file that has several."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, or JSONL if its name says so: {error}") from error
    if isinstance(content, dict):
        content = next(
            (content[split] for split in ("test", "validation", "dev", "data") if split in content), content
        )
    if not isinstance(content, list):
        raise ValueError(f"{path} must be a list of records, or have one as test, validation, dev or data")
    return content


def read_question(record: Mapping[str, Any], style: str) -> Question:
    r"""Return the question of a record in any of the usual shapes.

    PAPER: [1] to [4] are the tasks; [5] is where the wording of the prompts is from.
    PAPER CONTEXT: Each set came in its own shape, and copies of it in others. The same model scores several
        points apart when a prompt loses its "Answer:" or its space.
    INTUITION: Put to the model what its training text could have held: a question, "Answer:", the answer.
    IMPLEMENTATION: Where the text is: ctx, question (maybe with a stem), query, goal. Choices: endings,
        sol1 and sol2, or a list or table of choices. The answer is a number from 0 or a label. Every choice
        begins with the space that follows the context. HellaSwag's WikiHow marks ([title]) are taken out.
    WHY: A test writes one question in all shapes and reads the same question back from each.
    """
    if style == "word":
        context, word = record.get("context"), record.get("continuation")
        if word is None:
            context, word = record["text"].rsplit(" ", 1)
        return Question(str(context).rstrip(" "), (" " + word.strip(),), 0)
    stem = _first(record, "ctx", "question", "query", "goal")
    choices = record.get("choices") or record.get("endings")
    if isinstance(stem, Mapping):  # the original ARC
        stem, choices = stem["stem"], stem["choices"]
    if choices is None:
        choices = [record["sol1"], record["sol2"]]
    labels, texts = _labelled(choices)
    answer = _first(record, "answerKey", "answer", "gold", "label")
    index = labels.index(str(answer)) if str(answer) in labels else int(answer)
    if not 0 <= index < len(texts) or len(texts) < 2:
        raise ValueError(f"answer ({answer}) must be one of {len(texts)} choices")
    if style == "answer":
        stem = f"Question: {stem.removeprefix('Question:').strip()}\nAnswer:"
    else:
        heading = f"{record['activity_label']}: " if record.get("activity_label") else ""
        stem, texts = _plain(heading + stem), [_plain(text) for text in texts]
    return Question(stem, tuple(" " + text.strip() for text in texts), index)


def _first(record: Mapping[str, Any], *names: str) -> Any:
    """Return what stands under the first of these names that there is."""
    for name in names:
        if name in record:
            return record[name]
    raise KeyError(" or ".join(names))


def _labelled(choices: Any) -> tuple[list[str], list[str]]:
    """Return labels and texts of a list, or of a table in one of three forms."""
    if isinstance(choices, Mapping) and {"label", "text"} <= choices.keys():
        return [str(label) for label in choices["label"]], list(choices["text"])
    if isinstance(choices, Mapping):
        return [str(label) for label in choices], list(choices.values())
    if isinstance(choices[0], Mapping):
        return [str(choice["label"]) for choice in choices], [choice["text"] for choice in choices]
    return [], list(choices)


def _plain(text: str) -> str:
    """Return a text of HellaSwag without the marks of WikiHow."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ").strip()
