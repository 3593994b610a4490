r"""Chat templates as models bring them: small programs in Jinja, run where they can do no harm.

PAPERS
  [1] Templates for Chat Models (documentation of transformers), Hugging Face, 2023
  [2] Qwen3 Technical Report, Yang et al., 2025, arXiv:2505.09388
  [3] The Instruction Hierarchy: Training LLMs to Prioritize Privileged Instructions, Wallace et al., 2024,
      arXiv:2404.13208
"""

import json
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from common.script import one_line
from phase1_foundation.project2_tokenizer.gguf_metadata import read_gguf_metadata
from phase1_foundation.project2_tokenizer.token_file import read_json, read_text, show
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer, special_pattern, split_special
from phase1_foundation.project3_pretrain.likelihood import STARTS
from phase1_foundation.project3_pretrain.weights import find_model
from phase2_finetuning.project4_instruction_tuning.conversations import Conversation, Message
from phase2_finetuning.project4_instruction_tuning.templates import Piece, encode_pieces

HIDDEN = "\udfff"  # put into the name of a special token that is only text; in no text that can be encoded
BROKEN = (  # what running a template can raise
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)


class _GenerationTag(Extension):
    """Let {% generation %} stand in a template; transformers takes its mask from it, we need no such help."""

    tags = {"generation"}  # noqa: RUF012  # so Jinja declares it

    def parse(self, parser: Parser) -> Node:
        """Return what is between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


class _SafeNamespace(Namespace):
    """Jinja's variables that outlive a loop; no name may begin with an underscore, as Python's own do."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace must not hold {name}")
        super().__setitem__(name, value)


def make_sandbox() -> ImmutableSandboxedEnvironment:
    """Return what runs templates: as transformers sets Jinja up, with fewer functions to call."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **settings)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    sandbox.filters["tojson"] = to_json  # Jinja's own is for HTML
    sandbox.globals = {
        "range": sandbox.globals["range"],  # at most 100,000 numbers
        "dict": lambda **values: values,
        "namespace": _SafeNamespace,
        "raise_exception": raise_exception,
        "strftime_now": lambda layout: datetime.now().strftime(layout),
    }
    return sandbox


class JinjaTemplate:
    r"""A model's own template, with ids and mask as those of a ChatTemplate.

    PAPER: [1] is the interface; the template of [2] takes the thoughts out of earlier answers; [3], why
        what a user types must not be able to become a mark.
    PAPER CONTEXT: Each model was trained with marks of its own, and wrong ones cost quality without an
        error. So since 2023 a model's files bring a program that writes a conversation with the right ones.
    INTUITION: A stranger's recipe: follow it to the letter, in a kitchen without knives.
    IMPLEMENTATION: The sandbox allows no private attributes, no change of what it is given and no Python; a
        template could still take long, or much memory. Each answer's place is found by rendering what comes
        before it, ready for an answer, and what comes up to it: the difference is what the assistant says.
        Names of special tokens in what is said are hidden while the template runs. Of every order of roles
        it is checked once that each message comes out once.
    WHY: A template that loses a turn, or rewrites an answer when others follow, trains on something else than
        what was said; both are errors here. Tests render real templates as transformers does, to the letter.
    """

    def __init__(self, source: str, name: str = "jinja", variables: Mapping[str, str] | None = None) -> None:
        """Compile a template that may name the variables, such as bos_token; ValueError if it is no Jinja."""
        self.name, self.variables = name, dict(variables or {})
        try:
            self._template = make_sandbox().from_string(source)
        except BROKEN as error:
            raise ValueError(f"template ({name}) must be Jinja: {one_line(error)[:200]}") from error
        self._checked: set[tuple[str, ...]] = set()  # orders of roles of which no message is lost

    def render(self, conversation: Conversation, answer: bool = False, **variables: Any) -> str:
        """Return the conversation as text, as transformers does; ValueError if the template fails on it."""
        messages = [message._asdict() for message in conversation]
        known = {"tools": None, "documents": None} | self.variables | variables
        try:
            return self._template.render(messages=messages, add_generation_prompt=answer, **known)
        except BROKEN as error:
            raise ValueError(
                f"template ({self.name}) must take the conversation: {one_line(error)[:200]}"
            ) from error

    def encode(
        self, tokenizer: Tokenizer, conversation: Conversation, answer: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and for each whether the assistant is to learn it.

        ValueError if the template loses a message or rewrites an answer.
        """
        return encode_pieces(
            tokenizer, self.pieces(tokenizer.special_tokens, conversation, answer), self.name
        )

    def stop(self, tokenizer: Tokenizer) -> set[int]:
        """Return the ids at which an answer is over."""
        probe = [Message("user", "?"), Message("assistant", "!")]
        marks = [
            piece.text
            for piece in self.pieces(tokenizer.special_tokens, probe)
            if piece.mark and piece.learned
        ]
        return {
            tokenizer.special_tokens[name] for name in {*marks, *STARTS} & tokenizer.special_tokens.keys()
        }

    def pieces(
        self, specials: Collection[str], conversation: Conversation, answer: bool = False
    ) -> Iterator[Piece]:
        """Yield the parts of a conversation in order."""
        self.check_roles(tuple(message.role for message in conversation))
        pattern = special_pattern(frozenset(specials) or frozenset(HIDDEN))
        hidden = [
            message._replace(
                content=pattern.sub(lambda found: found[0][0] + HIDDEN + found[0][1:], message.content)
            )
            for message in conversation
        ]
        whole, place = self.render(hidden, answer), 0
        for number, message in enumerate(hidden):
            if message.role == "assistant":
                before, after = self.render(hidden[:number], True), self.render(hidden[: number + 1])
                said = message.content.strip()
                found = max(after.find(said, len(before)) + len(said), len(before))
                mark = pattern.search(after, found)
                end = mark.end() if mark else len(after)
                for text, start, rule in (
                    (after, before, "must begin where the model is asked to answer"),
                    (
                        whole,
                        after[:end],
                        "must not be rewritten when others follow: let conversations end there",
                    ),
                ):
                    if not text.startswith(start):
                        raise ValueError(f"message {number} (in template {self.name}) {rule}")
                yield from _pieces(whole[place : len(before)], specials, False)
                yield from _pieces(whole[len(before) : end], specials, True)
                place = end
        yield from _pieces(whole[place:], specials, False)

    def check_roles(self, roles: tuple[str, ...]) -> None:
        """Raise ValueError unless the template writes each message of such a conversation, and only once."""
        if roles in self._checked:
            return
        names = [f"message-{number}-of-{role}" for number, role in enumerate(roles)]
        text = self.render([Message(role, name) for role, name in zip(roles, names, strict=True)])
        for number, name in enumerate(names):
            if (times := text.count(name)) != 1:
                rule = f"must come out once, not {times} times"
                raise ValueError(f"message {number} ({roles[number]}, in template {self.name}) {rule}")
        self._checked.add(roles)


def _pieces(text: str, specials: Collection[str], learned: bool) -> Iterator[Piece]:
    for part, mark in split_special(text, specials):
        yield Piece(part if mark else part.replace(HIDDEN, ""), mark, learned)


def load_jinja_template(name_or_path: str | Path) -> JinjaTemplate:
    """Return the template in a model's files: a .gguf file, or a folder with tokenizer_config.json.

    ValueError if there is none, or none without a name.
    """
    path = find_model(name_or_path)
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"model ({path}) must be a .gguf file or a folder: others bring no template")
    source, variables = _from_gguf(path) if path.is_file() else _from_folder(path)
    if isinstance(source, list):  # several, for several uses
        uses = [item for item in source if isinstance(item, dict) and item.get("name") == "default"]
        source = uses[0].get("template") if uses else None
    if not isinstance(source, str):
        raise ValueError(f"chat_template ({show(source)}, in {path}) must be a text")
    return JinjaTemplate(source, path.name, variables)


def _from_gguf(path: Path) -> tuple[Any, dict[str, str]]:
    facts = read_gguf_metadata(path)
    tokens, variables = facts.get("tokenizer.ggml.tokens", []), {}
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        i = facts.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(i, int) and 0 <= i < len(tokens):
            variables[f"{ours}_token"] = tokens[i]
    return facts.get("tokenizer.chat_template"), variables


def _from_folder(folder: Path) -> tuple[Any, dict[str, str]]:
    config = read_json(folder / "tokenizer_config.json")
    variables = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            variables[name] = token
    file = folder / "chat_template.jinja"
    return read_text(file) if file.is_file() else config.get("chat_template"), variables
