r"""Conversations, and the shapes in which others keep theirs: Alpaca, ShareGPT, messages, GSM8K, preferences.

PAPERS
  [1] Self-Instruct: Aligning Language Models with Self-Generated Instructions, Wang et al., 2022,
      arXiv:2212.10560 (instruction, input, output)
  [2] Training Verifiers to Solve Math Word Problems, Cobbe et al., 2021, arXiv:2110.14168 (GSM8K)
  [3] Training a Helpful and Harmless Assistant with Reinforcement Learning from Human Feedback, Bai et al.,
      2022, arXiv:2204.05862 (HH)
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from phase1_foundation.project2_tokenizer.token_file import is_text, show


class Message(NamedTuple):
    """What somebody says in a conversation."""

    role: str  # system, user or assistant
    content: str


Conversation = list[Message]


class Preference(NamedTuple):
    """Two answers to a conversation, of which somebody liked one better."""

    prompt: Conversation
    chosen: str
    rejected: str


# What others call the three roles. The result of a function is told to the assistant, as by a user.
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "observation", "tool", "function"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "function_call"),
}
OURS = {theirs: ours for ours, names in ROLES.items() for theirs in names}
SPOKEN = re.compile(r"\n\n(Human|Assistant): ?")  # before each turn in the texts of [3]
CALCULATOR = re.compile(r"<<[^<>]*>>")  # what [2] noted for a calculator: <<48/2=24>>


def read_conversation(record: Any) -> Conversation:
    r"""Return the conversation of a record in any of the usual shapes; ValueError if there is none in it.

    PAPER: [1] has instruction, input and output; [2] Sec. 2, question and answer; the rest is usage.
    PAPER CONTEXT: Every set of instructions came in its own shape, and most bugs of those who mixed them were
        in the reading: a forgotten input, roles called otherwise, an answer that was None.
    INTUITION: Whatever the form, somebody says something and somebody answers.
    IMPLEMENTATION: A list of messages is under `messages` or `conversations`, as role and content or from
        and value; its functions (`tools`) are told first. Else an instruction, maybe with an input, and its
        output. [2]'s notes for a calculator go: a model that wrote them would be trusted with their results.
    WHY: A conversation in which nobody answers, or of which a turn is no text, would be trained on in
        silence; here it is an error that says which. Tests write one conversation in all shapes.
    """
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, Mapping):
        raise ValueError(f"record ({show(record)}) must be an object")
    turns = _turns(record)
    if turns is None:
        answer = CALCULATOR.sub("", _text(record, "output", "response", "completion", "answer", "solution"))
        return check_conversation([Message("user", _question(record)), Message("assistant", answer)])
    conversation = read_messages(turns)
    told = "\n\n".join(
        [*_optional(record, "system"), *(f"Tools: {text}" for text in _optional(record, "tools"))]
    )
    if told and conversation[0].role == "system":
        conversation[0] = Message("system", f"{conversation[0].content}\n\n{told}")
    elif told:
        conversation.insert(0, Message("system", told))
    return check_conversation(conversation)


def read_preference(record: Any) -> Preference:
    """Return the preference of a record in any of the usual shapes; ValueError if there is none in it.

    A prompt is a text or messages, and so are the answers; those of [3] are whole conversations in one text.
    """
    ends = [_ending(_field(record, name)) for name in ("chosen", "rejected")]
    prompt: Conversation = []
    if (turns := _turns(record)) is not None:
        prompt = read_messages(turns)
    elif isinstance(record.get("prompt"), list):
        prompt = read_messages(record["prompt"])
    elif "prompt" in record or "instruction" in record or "question" in record:
        prompt = [Message("user", _question(record))]
    if len(ends[0]) > 1:  # the answers bring the conversation along
        prompt = ends[0][:-1]
    if [end[:-1] for end in ends] not in ([[], []], [prompt, prompt]):
        raise ValueError("chosen and rejected (2) must be answers to one conversation")
    chosen, rejected = (check_conversation([*prompt, end[-1]])[-1] for end in ends)
    if (chosen.role, rejected.role) != ("assistant", "assistant"):
        raise ValueError(f"role ({chosen.role}, {rejected.role}) must be assistant in chosen and rejected")
    return Preference(prompt, chosen.content, rejected.content)


def _ending(value: Any) -> Conversation:
    """Return an answer, in a text of [3] or in messages with the conversation before it."""
    if not isinstance(value, str):
        return read_messages([value] if isinstance(value, Mapping) else value)
    first, *parts = SPOKEN.split(value)
    if first or not parts:
        return [Message("assistant", value)]
    return [Message(OURS[who.lower()], what) for who, what in zip(parts[::2], parts[1::2], strict=True)]


def _turns(record: Mapping[str, Any]) -> Any:
    return record["messages"] if "messages" in record else record.get("conversations")


def read_messages(turns: Any) -> Conversation:
    """Return messages that are objects with role and content, or from and value."""
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ValueError(f"messages ({show(turns)}) must be a list of some")
    messages = []
    for number, turn in enumerate(turns):
        who, what = (_field(turn, *names) for names in (("role", "from"), ("content", "value")))
        if isinstance(what, list):  # OpenAI's parts
            what = "".join(_text({"text": part} if isinstance(part, str) else part, "text") for part in what)
        if not isinstance(who, str) or who not in OURS:
            raise ValueError(f"messages[{number}] role ({show(who)}) must be one of {', '.join(OURS)}")
        messages.append(Message(OURS[who], what))
    return messages


def check_conversation(conversation: Conversation) -> Conversation:
    """Return a conversation of texts in which the assistant answers somebody; ValueError for another one."""
    for number, (role, content) in enumerate(conversation):
        if not isinstance(content, str) or not content.strip() or not is_text(content):
            raise ValueError(f"content of message {number} ({role}: {show(content)}) must be a text")
    if "assistant" not in [role for role, _ in conversation[1:]]:
        raise ValueError(
            f"roles ({', '.join(role for role, _ in conversation)}) must have an assistant's answer"
        )
    return conversation


def _question(record: Mapping[str, Any]) -> str:
    """Return what is asked for; an input of [1] follows the instruction."""
    question = _text(record, "instruction", "prompt", "question", "problem")
    return "\n\n".join([question, *_optional(record, "input")])


def _optional(record: Mapping[str, Any], name: str) -> list[str]:
    """Return the text of a name that may be missing or empty; lists and objects as JSON."""
    value = record.get(name)
    if value and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    return [value] if value else []


def _text(record: Any, *names: str) -> str:
    value = _field(record, *names)
    if not isinstance(value, str):
        raise ValueError(f"{names[0]} ({show(value)}) must be a text")
    return value


def _field(record: Any, *names: str) -> Any:
    """Return what stands under the first of these names that there is."""
    if not isinstance(record, Mapping):
        raise ValueError(f"record ({show(record)}) must be an object")
    for name in names:
        if name in record:
            return record[name]
    raise ValueError(f"record ({show(sorted(map(str, record)))}) must have {' or '.join(names)}")
