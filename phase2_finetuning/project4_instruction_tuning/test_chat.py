"""Checks of chat.py: what a model is given turn by turn. --interactive talks to project 4's model."""

import io
import sys
from pathlib import Path

import pytest

from common.script import run_validation
from phase2_finetuning.project4_instruction_tuning import chat
from phase2_finetuning.project4_instruction_tuning.chat import Chat
from phase2_finetuning.project4_instruction_tuning.config import ChatConfig
from phase2_finetuning.project4_instruction_tuning.conftest import ROOM
from phase2_finetuning.project4_instruction_tuning.conversations import Message
from phase2_finetuning.project4_instruction_tuning.templates import CHATML


def a_chat(checkpoint: Path, **settings) -> Chat:
    return Chat(ChatConfig(str(checkpoint), max_new_tokens=6, device="cpu", **settings))


def test_the_model_is_given_all_that_was_said(checkpoint: Path, capsys: pytest.CaptureFixture):
    talk = a_chat(checkpoint, system="Hi")
    talk.turns = [Message("user", "sea?"), Message("assistant", "blue")]
    told = [Message("system", "Hi"), *talk.turns, Message("user", "fox?")]
    assert talk.prompt_ids("fox?") == CHATML.encode(talk.tokenizer, told, answer=True)[0]
    said = talk.say("fox?", 0)
    assert talk.turns[-2:] == [Message("user", "fox?"), Message("assistant", said)]
    printed = capsys.readouterr()
    assert printed.out == said + "\n"
    assert "tokens/s" in printed.err


def test_the_oldest_turns_are_forgotten_first(checkpoint: Path):
    talk = a_chat(checkpoint, system="Hi")
    talk.turns = [Message("user", "q " * 50), Message("assistant", "q " * 50)]
    talk.turns += [Message("user", "a"), Message("assistant", "b")]
    ids = talk.prompt_ids("fox?")
    assert talk.turns == [Message("user", "a"), Message("assistant", "b")]
    assert len(ids) <= ROOM - 6
    assert "Hi" in talk.tokenizer.decode(ids)  # what stands above the conversation stays
    with pytest.raises(ValueError, match=r"message \(\d+ tokens\) must have at most 154 with its marks"):
        talk.prompt_ids("q " * 200)


def test_each_line_can_be_answered_for_itself(checkpoint: Path):
    talk = a_chat(checkpoint, forget=True)
    first = talk.say("sky?", 0)
    talk.say("fox?", 0)
    assert talk.say("sky?", 0) == first
    assert len(talk.turns) == 2


def test_marks_that_are_typed_are_text(checkpoint: Path):
    talk = a_chat(checkpoint)
    mark = talk.tokenizer.special_tokens["<|im_end|>"]
    assert talk.prompt_ids("<|im_end|>").count(mark) == 1


def test_lines_can_be_piped_in(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    long = "q " * 200
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"sky?\n{long}\nfox?\n"))
    answers = chat.run(ChatConfig(str(checkpoint), max_new_tokens=4, device="cpu"))
    assert len(answers) == 2  # an error in between did not end it
    assert "error: message (" in capsys.readouterr().out


def test_a_missing_model_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(chat, "MODEL", tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match=r"project4_instruction_tuning/train\.py"):
        Chat(ChatConfig(str(tmp_path / "model.pt")))


def interact() -> None:
    """Talk to project 4's model."""
    chat.run(ChatConfig())


if __name__ == "__main__":
    run_validation(__file__, interact)
