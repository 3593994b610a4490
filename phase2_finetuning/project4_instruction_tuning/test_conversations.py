"""Checks that conversations are read from the shapes and files of others. --interactive reads records."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.downloads import DownloadError
from common.script import ask, one_line, run_validation
from phase2_finetuning.project4_instruction_tuning import conversation_files
from phase2_finetuning.project4_instruction_tuning.conversation_files import (
    SETS,
    load_conversations,
    load_preferences,
)
from phase2_finetuning.project4_instruction_tuning.conversations import (
    Message,
    Preference,
    read_conversation,
    read_preference,
)

CHAT = [Message("user", "What is 2 + 2?"), Message("assistant", "4")]
MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT = [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]
SHAPES = {
    "alpaca": {"instruction": "What is 2 + 2?", "input": "", "output": "4"},
    "alpaca, no input": {"instruction": "What is 2 + 2?", "input": None, "response": "4"},
    "messages": {"messages": MESSAGES},
    "bare messages": MESSAGES,
    "sharegpt": {"id": "x_0", "conversations": SHAREGPT},
    "parts": {
        "messages": [MESSAGES[0] | {"content": [{"type": "text", "text": "What is 2 + 2?"}]}, MESSAGES[1]]
    },
    "gsm8k": {"question": "What is 2 + 2?", "answer": "<<2+2=4>>4"},
    "prompt": {"prompt": "What is 2 + 2?", "completion": "4"},
}
PREFERENCE = Preference(CHAT[:1], "4", "5")
PAIRS = {
    "texts": {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"},
    "alpaca": {"instruction": "What is 2 + 2?", "input": "", "output": "4", "chosen": "4", "rejected": "5"},
    "messages": {
        "prompt": MESSAGES[:1],
        "chosen": MESSAGES[1:],
        "rejected": [MESSAGES[1] | {"content": "5"}],
    },
    "whole": {"chosen": MESSAGES, "rejected": [MESSAGES[0], MESSAGES[1] | {"content": "5"}]},
    "ultrafeedback": {
        "prompt": "What is 2 + 2?",
        "chosen": MESSAGES,
        "rejected": [MESSAGES[0], MESSAGES[1] | {"content": "5"}],
        "score_chosen": 9.0,
    },
    "sharegpt": {
        "conversations": SHAREGPT[:1],
        "chosen": SHAREGPT[1],
        "rejected": {"from": "gpt", "value": "5"},
    },
    "hh": {
        "chosen": "\n\nHuman: What is 2 + 2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: What is 2 + 2?\n\nAssistant: 5",
    },
}


@pytest.mark.parametrize("record", SHAPES.values(), ids=SHAPES)
def test_a_conversation_reads_the_same_from_every_shape(record):
    assert read_conversation(record) == CHAT


@pytest.mark.parametrize("record", PAIRS.values(), ids=PAIRS)
def test_a_preference_reads_the_same_from_every_shape(record):
    assert read_preference(record) == PREFERENCE


def test_an_input_follows_its_instruction():
    record = {"instruction": "Add.", "input": "2 2", "output": "4"}
    assert read_conversation(record)[0] == Message("user", "Add.\n\n2 2")


def test_tools_and_their_results_are_told_and_their_calls_are_the_assistants():
    turns = [
        SHAREGPT[0],
        {"from": "function_call", "value": '{"name": "add"}'},
        {"from": "observation", "value": "4"},
        SHAREGPT[1],
    ]
    conversation = read_conversation({"conversations": turns, "tools": "[add]", "system": "Be brief."})
    assert [message.role for message in conversation] == ["system", "user", "assistant", "user", "assistant"]
    assert conversation[0].content == "Be brief.\n\nTools: [add]"
    own = [{"from": "system", "value": "Hello."}, *turns]
    assert read_conversation({"conversations": own, "tools": "[add]"})[0].content == "Hello.\n\nTools: [add]"


def test_several_turns_of_hh_are_the_prompt():
    start = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: "
    preference = read_preference({"chosen": start + "A", "rejected": start + "B\n\nreally"})
    assert [message.role for message in preference.prompt] == ["user", "assistant", "user"]
    assert preference[1:] == ("A", "B\n\nreally")


BAD = [
    (None, "record (None) must be an object"),
    ({}, "record ([]) must have output or response or completion or answer or solution"),
    ({"output": "4"}, "record (['output']) must have instruction or prompt or question or problem"),
    ({"instruction": "Add.", "output": None}, "output (None) must be a text"),
    ({"instruction": "Add.", "output": " \n"}, "content of message 1 (assistant: ' \\n') must be a text"),
    ({"instruction": "\ud800", "output": "4"}, "content of message 0 (user: '\\ud800') must be a text"),
    ({"messages": []}, "messages ([]) must be a list of some"),
    ({"messages": "Hello"}, "messages ('Hello') must be a list of some"),
    ({"messages": ["Hello"]}, "record ('Hello') must be an object"),
    ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0] role ('judge') must be one of system,"),
    (
        {"messages": [{"role": ["user"], "content": "x"}]},
        "messages[0] role (['user']) must be one of system,",
    ),
    ({"messages": [{"content": "x"}]}, "record (['content']) must have role or from"),
    ({"messages": [{"role": "user", "content": [1]}]}, "record (1) must be an object"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "record (['type']) must have text"),
    ({"messages": MESSAGES[:1]}, "roles (user) must have an assistant's answer"),
    ({"messages": MESSAGES[1:]}, "roles (assistant) must have an assistant's answer"),
    ({"messages": [MESSAGES[0], {"role": "assistant", "content": None}]}, "(assistant: None) must be a text"),
]


@pytest.mark.parametrize(("record", "message"), BAD, ids=range(len(BAD)))
def test_what_is_no_conversation_says_why(record, message: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        read_conversation(record)
    assert message in one_line(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Hi.", "chosen": "A"}, "record (['chosen', 'prompt']) must have rejected"),
        ({"prompt": "Hi.", "chosen": "A", "rejected": None}, "messages (None) must be a list of some"),
        ({"prompt": "Hi.", "chosen": "A", "rejected": " "}, "must be a text"),
        ({"chosen": "A", "rejected": "B"}, "roles (assistant) must have an assistant's answer"),
        ({"chosen": MESSAGES, "rejected": MESSAGES[1:]}, "must be answers to one conversation"),
        (
            {"prompt": "Hi.", "chosen": MESSAGES[0], "rejected": MESSAGES[1]},
            "must have an assistant's answer",
        ),
        ([], "record ([]) must be an object"),
    ],
)
def test_what_is_no_preference_says_why(record, message: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        read_preference(record)
    assert message in one_line(caught.value)


KEYS = "messages conversations role from content value instruction input output prompt chosen rejected system"
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.sampled_from(["user", "gpt"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(record=anything, read=st.sampled_from([read_conversation, read_preference]))
def test_whatever_a_record_is_it_is_read_or_refused(record, read):
    try:
        found = read(record)
    except ValueError as error:
        assert "must" in str(error)  # noqa: PT017  # if there is one
    else:
        messages = found if read is read_conversation else found.prompt
        assert all(isinstance(message.content, str) and message.content.strip() for message in messages)


# Files


def as_jsonl(records: list) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


WAYS: dict[str, Callable[[list], bytes]] = {
    "a.json": lambda records: json.dumps(records, indent=1).encode(),
    "b.json": lambda records: json.dumps({"test": [], "train": records}).encode(),
    "c.jsonl": as_jsonl,
    "d.jsonl": lambda records: as_jsonl(records).replace(b"\n", b"\r\n\r\n"),
    "e.jsonl.gz": lambda records: gzip.compress(as_jsonl(records)),
    "f.json.gz": lambda records: gzip.compress(json.dumps(records).encode()),
}


@pytest.mark.parametrize("name", WAYS)
def test_files_of_every_kind_hold_the_same(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(WAYS[name](list(SHAPES.values())))
    assert load_conversations(str(tmp_path / name)) == [CHAT] * len(SHAPES)
    assert load_conversations(str(tmp_path / name), limit=3) == [CHAT] * 3


def test_bad_records_are_counted_and_the_first_is_named(tmp_path: Path, capsys):
    file = tmp_path / "some.jsonl"
    lines = [json.dumps(MESSAGES), "{half", "", "[" * 10_000, "null", json.dumps(SHAPES["alpaca"])]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert load_conversations(str(file)) == [CHAT] * 2
    error = capsys.readouterr().err
    assert "some.jsonl: 3 records left out, the first at line 2: " in error
    assert error.count("\n") == 1


DAMAGED = {
    "empty.jsonl": (b"", "(0 records) must hold some; it is empty"),
    "empty.json": (b"", "must be JSON"),
    "half.json": (b'[{"instruction": "a"', "must be JSON"),
    "object.json": (b'{"a": 1}', "must hold a list of records"),
    "bytes.jsonl": (b"\xff\xfe\x00", "must be JSON"),
    "deep.json": (b"[" * 100_000, "must be JSON"),
    "cut.jsonl.gz": (gzip.compress(as_jsonl([MESSAGES] * 500))[:-20], "must be JSON"),
    "no.jsonl.gz": (b"plain", "must be JSON"),
    "bad.json": (b"[1, 2]", "(2 records) must hold some; record 1: record (1) must be an object"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line_of_error(name: str, tmp_path: Path):
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        load_conversations(str(tmp_path / name))
    assert message in one_line(caught.value)
    assert name in one_line(caught.value)


def test_sets_with_names_are_looked_for_in_the_mirror_and_then_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mirror, folder = tmp_path / "mirror", tmp_path / "data"
    monkeypatch.setenv("LLM_COURSE_DATA", str(mirror))
    monkeypatch.setattr(conversation_files, "FOLDER", folder)
    asked = []

    def download(url: str, path: Path) -> None:
        asked.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(as_jsonl([PAIRS["hh"]])))

    monkeypatch.setattr(conversation_files, "download", download)
    assert load_preferences("hh") == [PREFERENCE]
    assert load_preferences("hh") == [PREFERENCE]  # from data/ this time
    assert asked == [SETS["hh"].url]
    (mirror / "reasoning").mkdir(parents=True)
    (mirror / "reasoning" / "gsm8k_train.jsonl").write_bytes(as_jsonl([SHAPES["gsm8k"]]))
    assert load_conversations("gsm8k") == [CHAT]
    assert load_conversations("reasoning/gsm8k_train.jsonl") == [CHAT]
    assert asked == [SETS["hh"].url]


def test_a_set_of_the_hub_is_kept_as_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversation_files, "FOLDER", tmp_path)
    monkeypatch.setattr(
        conversation_files.HubTable, "load", lambda table, streaming: iter([SHAPES["messages"]] * 3)
    )
    monkeypatch.setattr(conversation_files, "HUB_ROWS", 2)
    assert load_conversations("owner/some-set") == [CHAT] * 2
    assert (tmp_path / "owner--some-set.jsonl").is_file()


def test_a_set_that_cannot_be_had_says_what_could(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversation_files, "FOLDER", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"data \(nowhere.json\) must be a file, OWNER/NAME on the hub, or one"
    ):
        load_conversations("nowhere.json")

    def refuse(table: object, streaming: bool) -> None:
        raise DownloadError("no answer")

    monkeypatch.setattr(conversation_files.HubTable, "load", refuse)
    with pytest.raises(DownloadError, match="no answer"):
        load_conversations("owner/some-set")
    assert not list(tmp_path.iterdir())


def interact() -> None:
    for line in ask("record in JSON> "):
        try:
            print(*read_conversation(json.loads(line)), sep="\n")
        except ValueError as error:
            print(f"error: {one_line(error)}")


if __name__ == "__main__":
    run_validation(__file__, interact)
