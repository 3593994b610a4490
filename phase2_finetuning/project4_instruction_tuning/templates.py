r"""How a conversation becomes tokens, and which of them the assistant is to learn.

PAPERS
  [1] Training language models to follow instructions with human feedback, Ouyang et al., 2022,
      arXiv:2203.02155
  [2] LIMA: Less Is More for Alignment, Zhou et al., 2023, arXiv:2305.11206
  [3] The Llama 3 Herd of Models, Grattafiori et al., 2024, arXiv:2407.21783
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from phase1_foundation.project2_tokenizer.token_file import show
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer, split_special
from phase1_foundation.project3_pretrain.generate import IM_END, IM_START
from phase1_foundation.project3_pretrain.likelihood import STARTS
from phase2_finetuning.project4_instruction_tuning.conversations import Conversation, Message

ROLES = ("system", "user", "assistant")
CONTENT = "{content}"  # where a turn has what is said


class Piece(NamedTuple):
    """A part of a conversation's text."""

    text: str
    mark: bool  # the name of a special token, not text that looks like it
    learned: bool  # written by the assistant


@dataclass(frozen=True)
class ChatTemplate:
    r"""The marks around what system, user and assistant say.

    PAPER: [3] Sec. 4.1.1, headers and ends of turns, and 4.1.3, no loss on prompts; [2] Sec. 3, an end of
        turn that means nothing else.
    PAPER CONTEXT: A base model goes on writing: the user's next question as well. [1] tuned one on answers
        that people had written. Marks then tell it whose turn it is, and when an answer is over.
    INTUITION: A play: a name before each speech. The actor learns his own lines, and when to stop.
    IMPLEMENTATION: Marks go in as ids; what is said is encoded as mere text, so <|im_end|> typed by a user
        ends nothing. What the assistant says is encoded by itself, as it comes when the model writes it: so
        the ids of a prompt are always the first ids of the conversation that follows. The mask is true
        from the first token of the answer to the mark that ends it.
    WHY: If the ending mark is not learned the model never stops; if the user's words are, it learns to ask.
        Tests hold ids to transformers' for the templates of SmolLM2 and Llama 3, and masks to trl's.
    """

    name: str
    specials: tuple[str, ...]  # the special tokens; everything else in a turn is text
    turns: Mapping[str, str]  # by role, the text and marks around {content}
    start: str = ""  # before the first turn
    system: str = ""  # said first where a conversation has no system message of its own
    strip: bool = False  # white space around what is said goes

    def __post_init__(self) -> None:
        for role, turn in self.turns.items():
            if turn.count(CONTENT) != 1:
                raise ValueError(f"turn of {role} ({turn}) must have {CONTENT} once")
        if not any(piece.mark for piece in self._around("assistant")[1]):
            raise ValueError(
                f"turn of assistant ({self.turns['assistant']}) must end in one of {self.specials}"
            )

    @property
    def end(self) -> str:
        """The special token that ends an answer."""
        return next(piece.text for piece in self._around("assistant")[1] if piece.mark)

    def stop(self, tokenizer: Tokenizer) -> set[int]:
        """Return the ids at which an answer is over: the end mark, and where a document begins or ends."""
        names = {self.end, *STARTS} & tokenizer.special_tokens.keys()
        return {tokenizer.special_tokens[name] for name in names}

    def encode(
        self, tokenizer: Tokenizer, conversation: Conversation, answer: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and for each whether the assistant is to learn it.

        With `answer` they end where the assistant begins to speak. ValueError for a role that the template
        does not know, or a tokenizer without its special tokens.
        """
        return encode_pieces(tokenizer, self.pieces(conversation, answer), self.name)

    def render(self, conversation: Conversation, answer: bool = False) -> str:
        """Return the conversation as text, to look at; encode() does not go through it."""
        return "".join(piece.text for piece in self.pieces(conversation, answer))

    def pieces(self, conversation: Conversation, answer: bool = False) -> Iterator[Piece]:
        """Yield the parts of a conversation in order."""
        if self.system and (not conversation or conversation[0].role != "system"):
            conversation = [Message("system", self.system), *conversation]
        yield from self._marked(self.start)
        for role, content in conversation:
            before, after = self._around(role)
            yield from before
            yield Piece(content.strip() if self.strip else content, False, role == "assistant")
            yield from after
        if answer:
            yield from self._around("assistant")[0]

    def _around(self, role: str) -> tuple[list[Piece], list[Piece]]:
        """Return the pieces before and after what a role says; the assistant learns to end its turn."""
        if role not in self.turns:
            raise ValueError(f"role ({show(role)}) must be {', '.join(self.turns)} in {self.name}")
        before, after = (list(self._marked(part)) for part in self.turns[role].split(CONTENT))
        last = next((i for i, piece in enumerate(after) if piece.mark), -1)
        learned = role == "assistant"
        return before, [piece._replace(learned=learned and i <= last) for i, piece in enumerate(after)]

    def _marked(self, text: str) -> Iterator[Piece]:
        return (Piece(part, mark, False) for part, mark in split_special(text, self.specials))

    def parse(self, tokenizer: Tokenizer, ids: Iterable[int]) -> Conversation:
        """Return the conversation that encode() made ids of, if every turn has marks on both sides.

        ValueError if they are none.
        """
        marks = {name: chr(0xD800 + i) for i, name in enumerate(self.specials)}  # in no text that is decoded
        names = {tokenizer.special_tokens[name]: marks[name] for name in self.specials}
        text = "".join(
            "".join(map(names.__getitem__, group)) if special else tokenizer.decode(group)
            for special, group in groupby(ids, names.__contains__)
        )

        def pattern(part: str) -> str:
            return "".join(re.escape(marks[p.text] if p.mark else p.text) for p in self._marked(part))

        said = "([^\ud800-\udbff]*)"
        turns = {
            role: re.compile(said.join(map(pattern, turn.split(CONTENT))))
            for role, turn in self.turns.items()
        }
        conversation: Conversation = []
        place = len(pattern(self.start))
        while place < len(text):
            found = ((role, turn.match(text, place)) for role, turn in turns.items())
            role, match = next(((role, match) for role, match in found if match), ("", None))
            if match is None:
                raise ValueError(
                    f"turn {len(conversation) + 1} ({show(text[place:])}) must be one of {self.name}"
                )
            conversation.append(Message(role, match[1]))
            place = match.end()
        return conversation


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[Piece], name: str) -> tuple[list[int], list[bool]]:
    """Return ids and mask; text that is not interrupted by a mark or by the assistant is encoded in one."""
    ids: list[int] = []
    mask: list[bool] = []
    for (is_mark, learned), group in groupby(pieces, lambda piece: piece[1:]):
        texts = [piece.text for piece in group]
        if is_mark:
            if missing := [text for text in texts if text not in tokenizer.special_tokens]:
                known = ", ".join(tokenizer.special_tokens) or "none"
                raise ValueError(f"special tokens ({known}) must have {missing[0]} for the template {name}")
            new = [tokenizer.special_tokens[text] for text in texts]
        else:
            new = tokenizer.encode("".join(texts))
        ids += new
        mask += [learned] * len(new)
    return ids, mask


CHATML = ChatTemplate(
    "chatml",
    (IM_START, IM_END),
    {role: f"{IM_START}{role}\n{CONTENT}{IM_END}\n" for role in ROLES},
)
SMOLLM2 = replace(
    CHATML, name="smollm2", system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"
)
LLAMA3 = ChatTemplate(
    "llama3",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    {role: f"<|start_header_id|>{role}<|end_header_id|>\n\n{CONTENT}<|eot_id|>" for role in ROLES},
    start="<|begin_of_text|>",
    strip=True,
)
PLAIN = ChatTemplate(  # the course's own: one token says who speaks, one that the turn is over
    "plain",
    (*(f"<|{role}|>" for role in ROLES), "<|end|>"),
    {role: f"<|{role}|>{CONTENT}<|end|>" for role in ROLES},
)
TEXT = ChatTemplate(  # for models that were taught no marks; a user can forge these
    "text",
    ("<|endoftext|>",),
    {
        "system": f"{CONTENT}\n\n",
        "user": f"### Instruction:\n{CONTENT}\n\n",
        "assistant": f"### Response:\n{CONTENT}<|endoftext|>",
    },
    start="<|endoftext|>",
)
TEMPLATES = {template.name: template for template in (CHATML, SMOLLM2, LLAMA3, PLAIN, TEXT)}


def template_for(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the template whose special tokens a tokenizer has; ValueError if it has those of none."""
    for template in TEMPLATES.values():
        if tokenizer.special_tokens.keys() >= set(template.specials):
            return template
    known = ", ".join(tokenizer.special_tokens) or "none"
    raise ValueError(f"special tokens ({known}) must be those of a template: {', '.join(TEMPLATES)}")
