r"""Sets of conversations by name or file, read record by record; what is no conversation is counted and told.

PAPERS
  [1] LIMA: Less Is More for Alignment, Zhou et al., 2023, arXiv:2305.11206
  [2] The JavaScript Object Notation (JSON) Data Interchange Format, Bray, RFC 8259, 2017
"""

import gzip
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from common.corpora import HubTable, hub_errors
from common.downloads import download
from common.files import DATA, atomic_write, shown
from common.script import one_line
from phase2_finetuning.project4_instruction_tuning.conversations import (
    Conversation,
    Preference,
    read_conversation,
    read_preference,
)

T = TypeVar("T")
FOLDER = DATA / "instruct"  # what was fetched
HUB_ROWS = 20_000  # that are fetched of a set on the hub
_RASBT = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07"
_GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"


@dataclass(frozen=True)
class _Origin:
    """Where a set with a name is to be had: a file at a URL, or a dataset on the Hugging Face hub."""

    mirrored: str = ""  # below $LLM_COURSE_DATA
    url: str = ""
    dataset: str = ""
    split: str = "train"
    options: dict[str, str] = field(default_factory=dict)  # for load_dataset

    @property
    def suffix(self) -> str:
        """How the name of the fetched file ends."""
        return "".join(Path(self.url).suffixes) or ".jsonl"


SETS = {
    "basic": _Origin("instruct/basic_1100.json", f"{_RASBT}/01_main-chapter-code/instruction-data.json"),
    "alpaca": _Origin(
        url="https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
    ),
    "gsm8k": _Origin("reasoning/gsm8k_train.jsonl", f"{_GSM8K}/train.jsonl"),
    "gsm8k-test": _Origin("reasoning/gsm8k_test.jsonl", f"{_GSM8K}/test.jsonl"),
    "smoltalk": _Origin(dataset="HuggingFaceTB/smoltalk", options={"name": "all"}),
    "basic-preference": _Origin(
        "preference/basic_1100.json",
        f"{_RASBT}/04_preference-tuning-with-dpo/instruction-data-with-preference.json",
    ),
    "hh": _Origin(
        "preference/hh_helpful_base_test.jsonl.gz",
        "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/helpful-base/test.jsonl.gz",
    ),
    "ultrafeedback": _Origin(dataset="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs"),
}


def load_conversations(name: str, limit: int = 0) -> list[Conversation]:
    """Return the conversations of a file, of a set by name, or of OWNER/NAME on the hub; 0: all of them.

    ValueError or OSError if there are none.
    """
    return load(name, read_conversation, limit)


def load_preferences(name: str, limit: int = 0) -> list[Preference]:
    """Return the preferences of a file, of a set by name, or of OWNER/NAME on the hub; 0: all of them."""
    return load(name, read_preference, limit)


def load(name: str, read: Callable[[Any], T], limit: int = 0) -> list[T]:
    r"""Return what can be read of the records of a set; say aloud how many cannot, and where the first is.

    PAPER: [1] Sec. 2: a thousand examples chosen with care; [2] is the form of the records.
    PAPER CONTEXT: [1] found quality to matter more than number, so what is in a set is worth a look.
    INTUITION: One torn page is no reason to throw the book away, and none to keep silent about it.
    IMPLEMENTATION: JSON with a list of records (or one under a split's name), or JSONL, either one gzipped.
        A line that is no JSON is a bad record like any other; a set of bad ones only is an error.
    WHY: The count tells a file that is slightly damaged from one whose shape was misunderstood. A test
        damages a file in a dozen ways.
    """
    path = find_set(name)
    good: list[T] = []
    bad: list[str] = []
    for place, record in read_records(path):
        try:
            good.append(read(json.loads(record) if isinstance(record, str) else record))
        except (ValueError, RecursionError) as error:
            bad.append(f"{place}: {one_line(error)[:200]}")
        if limit and len(good) == limit:
            break
    if not good:
        raise ValueError(
            f"{shown(path)} ({len(bad)} records) must hold some; {bad[0] if bad else 'it is empty'}"
        )
    if bad:
        print(f"{shown(path)}: {len(bad)} records left out, the first at {bad[0]}", file=sys.stderr)
    return good


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the content of each record: of a JSONL file the lines, still to be parsed."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"line {number}", line
                return
            content = json.load(file)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{shown(path)} must be JSON, or JSONL if its name says so: {one_line(error)}"
        ) from error
    if isinstance(content, dict):
        content = next(
            (content[key] for key in ("train", "data", "test", "validation") if key in content), content
        )
    if not isinstance(content, list):
        raise ValueError(f"{shown(path)} must hold a list of records")
    yield from ((f"record {number}", record) for number, record in enumerate(content, start=1))


def find_set(name: str) -> Path:
    """Return the file of a set, fetched if need be; OSError if it cannot be had."""
    mirror, origin = Path(os.environ.get("LLM_COURSE_DATA") or DATA), SETS.get(name)
    if origin is None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).suffix:
        origin = _Origin(dataset=name)
    places = [Path(name), mirror / name]
    if origin is not None:
        fetched = FOLDER / f"{name.replace('/', '--')}{origin.suffix}"
        places += [fetched, mirror / origin.mirrored]
    for path in places:
        if path.is_file():
            return path
    if origin is None:
        raise FileNotFoundError(
            f"data ({name}) must be a file, OWNER/NAME on the hub, or one of {', '.join(SETS)}"
        )
    if origin.url:
        download(origin.url, fetched)
        return fetched
    print(f"{name}: {HUB_ROWS:,} rows from the Hugging Face hub ({origin.dataset})", file=sys.stderr)
    rows = HubTable(origin.dataset, origin.split, str.encode, origin.options).load(streaming=True)
    with atomic_write(fetched) as file, hub_errors():
        file.writelines(json.dumps(row) + "\n" for row in islice(rows, HUB_ROWS))
    return fetched
