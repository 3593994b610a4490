"""Checks of Jinja templates against transformers, and of the sandbox. --interactive renders a model's."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from common.script import ask, one_line, run_validation
from phase2_finetuning.project4_instruction_tuning.conversations import Conversation, Message
from phase2_finetuning.project4_instruction_tuning.jinja_template import JinjaTemplate, load_jinja_template
from phase2_finetuning.project4_instruction_tuning.templates import LLAMA3, SMOLLM2
from phase2_finetuning.project4_instruction_tuning.test_templates import (
    CHAT,
    LLAMA3_JINJA,
    REAL,
    SMOLLM2_JINJA,
    conversations,
    tokenizer,
)

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
ZEPHYR = (  # of zephyr-7b-beta: its line breaks tell whether trim_blocks is on
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MISTRAL = (  # of Mistral-7B-Instruct-v0.1
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
THINKING = (  # what Qwen3's and DeepSeek-R1's templates do to earlier answers, by itself
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTALLED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))  # dozens of real ones
SOME = [
    file for file in INSTALLED if re.fullmatch("qwen3|llama3|gemma_training|phi3_training|gptoss", file.stem)
]
DIALOGUES = [
    [
        Message("user", "Hi  there\n"),
        Message("assistant", " Hello"),
        Message("user", "2+2?"),
        Message("assistant", "4\n"),
    ],
    [Message("system", "Be nice."), Message("user", "Hi <|im_end|>"), Message("assistant", "Größe 🙂")],
    [Message("user", 'A "quote" & <tag>')],
]


def render_theirs(
    source: str, conversation: Conversation, answer: bool, **settings: object
) -> tuple[str, list[str]]:
    """What transformers renders, and what is between the tags {% generation %}."""
    messages = [message._asdict() for message in conversation]
    (text,), spans = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=answer, **VARIABLES, **settings
    )
    return text, [text[start:end] for start, end in (spans[0] if spans else [])]


def agree(source: str, conversation: Conversation, answer: bool) -> str | None:
    """Return what both render, or None where both refuse."""
    try:
        expected = render_theirs(source, conversation, answer)[0]
    except Exception:  # whatever the template raises
        with pytest.raises(ValueError, match=r"template \(jinja\) must take the conversation: "):
            JinjaTemplate(source, variables=VARIABLES).render(conversation, answer)
        return None
    assert JinjaTemplate(source, variables=VARIABLES).render(conversation, answer) == expected
    return expected


@pytest.mark.parametrize("source", [SMOLLM2_JINJA, LLAMA3_JINJA, ZEPHYR, MISTRAL, THINKING])
@settings(max_examples=40, deadline=None)
@given(conversation=conversations, answer=st.booleans())
def test_a_template_renders_as_in_transformers(source, conversation, answer):
    agree(source, conversation, answer)


@pytest.mark.parametrize("file", SOME, ids=lambda file: file.stem)
def test_installed_templates_render_as_in_transformers(file):
    found = [agree(file.read_text(), dialogue, answer) for dialogue in DIALOGUES for answer in (False, True)]
    assert sum(text is not None for text in found) >= 4


@pytest.mark.slow
def test_all_installed_templates_render_as_in_transformers():
    assert len(INSTALLED) > 20
    for file in INSTALLED:
        for dialogue in DIALOGUES:
            agree(file.read_text(), dialogue, answer=False)
            agree(file.read_text(), dialogue, answer=True)


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3_instruct_2507", "phi3", "lfm2"])
def test_masks_are_those_of_the_generation_tags(name):
    # In these trl says what is to be learned; some count in the line break after the end mark.
    source = next((file.read_text() for file in INSTALLED if file.stem == f"{name}_training"), None)
    if source is None:
        pytest.skip(f"this version of trl has no {name}_training.jinja")
    _, spans = render_theirs(source, CHAT, False, return_assistant_tokens_mask=True)
    marks = {*re.findall(r"<\|\w+\|>", source), *VARIABLES.values()}
    pieces = list(JinjaTemplate(source, variables=VARIABLES).pieces(marks, CHAT))
    learned = "".join(piece.text for piece in pieces if piece.learned)
    assert learned == "".join(span.strip() for span in spans if span not in VARIABLES.values())
    assert "".join(piece.text for piece in pieces) == render_theirs(source, CHAT, False)[0]


@pytest.mark.parametrize(("template", "jinja", "pattern"), REAL, ids=["smollm2", "llama3"])
@settings(max_examples=60, deadline=None)
@given(conversation=conversations, answer=st.booleans())
def test_ids_and_masks_equal_those_of_our_own_template(template, jinja, pattern, conversation, answer):
    # Both are told apart from the marks, whatever is said: the program of strangers and our table of turns.
    ours = JinjaTemplate(jinja, variables={"bos_token": "<|begin_of_text|>"})
    if conversation[0].role == "assistant":  # before it, the template has nothing to begin with
        conversation = [Message("user", "Hi."), *conversation]
    assert ours.encode(tokenizer(pattern), conversation, answer) == template.encode(
        tokenizer(pattern), conversation, answer
    )


def test_answers_end_where_those_of_our_own_templates_do():
    for template, jinja, _ in REAL:
        assert JinjaTemplate(jinja, variables={"bos_token": ""}).stop(tokenizer()) == template.stop(
            tokenizer()
        )


# Historic bugs


def test_a_template_that_loses_a_turn_is_refused():
    # SmolVLM's template, for one, expects a list of parts as content; what is said in a text it leaves out.
    lost = SMOLLM2_JINJA.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    with pytest.raises(
        ValueError, match=r"message 0 \(system, in template jinja\) must come out once, not 0 times"
    ):
        JinjaTemplate(lost).encode(tokenizer(), CHAT)
    last = SMOLLM2_JINJA.replace("in messages %}", "in messages[-2:] %}")
    assert JinjaTemplate(last).encode(tokenizer(), CHAT[1:3])
    with pytest.raises(
        ValueError, match=r"message 0 \(user, in template jinja\) must come out once, not 0 times"
    ):
        JinjaTemplate(last).encode(tokenizer(), CHAT[1:])
    twice = SMOLLM2_JINJA.replace("+ message['content']", "+ message['content'] + message['content']")
    with pytest.raises(ValueError, match="must come out once, not 2 times"):
        JinjaTemplate(twice).encode(tokenizer(), CHAT)


def test_a_template_that_rewrites_earlier_answers_is_refused_where_it_does():
    thoughts = [*CHAT[:2], Message("assistant", "<think>Easy.</think>4")]
    template = JinjaTemplate(THINKING)
    ids, mask = template.encode(tokenizer(), thoughts)
    assert (
        tokenizer().decode([i for i, flag in zip(ids, mask, strict=True) if flag])
        == "<think>Easy.</think>4<|im_end|>"
    )
    with pytest.raises(
        ValueError, match=r"message 2 \(in template jinja\) must not be rewritten when others follow"
    ):
        template.encode(tokenizer(), [*thoughts, *CHAT[3:]])


def test_a_prompt_that_the_answer_does_not_begin_with_is_refused():
    opened = SMOLLM2_JINJA.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'")
    with pytest.raises(ValueError, match=r"message 2 .* must begin where the model is asked to answer"):
        JinjaTemplate(opened).encode(tokenizer(), CHAT)


def test_a_mask_needs_no_tags_and_is_not_misled_by_an_answer_that_was_said_before():
    # Megatron-Bridge#3359: without {% generation %} in the template all was learned, in silence.
    # ArcticTraining#339: short answers were looked for in the whole text, and found in the question.
    chat = [
        Message("user", "4 or 5?"),
        Message("assistant", "4"),
        Message("user", "5?"),
        Message("assistant", "5"),
    ]
    assert "generation %" not in SMOLLM2_JINJA
    pieces = list(JinjaTemplate(SMOLLM2_JINJA).pieces(SMOLLM2.specials, chat))
    assert [piece.text for piece in pieces if piece.learned] == ["4", "<|im_end|>", "5", "<|im_end|>"]
    for before, piece in pairwise(pieces):
        assert before.text.endswith("assistant\n") == (piece.text in ("4", "5"))


# The sandbox


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% set x = namespace(__class__=1) %}",
        "{% set x = namespace() %}{% set x.__class__ = 1 %}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ messages.__init__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ range(10**9)|list }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ nobody.nothing }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_reaches_for_more_gets_one_line_of_error_or_nothing(source):
    try:
        text = JinjaTemplate(source).render(CHAT)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017  # if there is one
        text = ""
    assert text == ""


def test_what_is_no_jinja_is_one_line_of_error():
    with pytest.raises(ValueError, match=r"template \(mine\) must be Jinja: "):
        JinjaTemplate("{% for %}", "mine")


# Files


@pytest.mark.parametrize("kind", ["text", "list", "file"])
def test_a_template_is_found_in_the_folder_of_a_model(kind, tmp_path: Path):
    config = {
        "bos_token": {"content": "<|begin_of_text|>"},
        "eos_token": "<|eot_id|>",
        "chat_template": LLAMA3_JINJA,
    }
    if kind == "list":
        config["chat_template"] = [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": LLAMA3_JINJA},
        ]
    if kind == "file":
        config["chat_template"] = "old"
        (tmp_path / "chat_template.jinja").write_text(LLAMA3_JINJA, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    template = load_jinja_template(tmp_path)
    assert template.render(CHAT) == LLAMA3.render(CHAT)


@pytest.mark.slow
def test_smollm2_brings_its_template_along():
    template = load_jinja_template("smollm2-135m")
    assert template.render(CHAT[1:], answer=True) == SMOLLM2.render(CHAT[1:], answer=True)
    assert template.variables["eos_token"] == "<|im_end|>"


def test_a_folder_without_a_template_says_so(tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"chat_template \(None, in .*\) must be a text"):
        load_jinja_template(tmp_path)
    (tmp_path / "model.pt").touch()
    with pytest.raises(ValueError, match=r"model \(.*model.pt\) must be a .gguf file or a folder"):
        load_jinja_template(tmp_path / "model.pt")


def interact() -> None:
    for name in ask("model (smollm2-135m, a .gguf file, a folder)> "):
        try:
            print(load_jinja_template(name).render(CHAT, answer=True))
        except (ValueError, OSError) as error:
            print(f"error: {one_line(error)}")


if __name__ == "__main__":
    run_validation(__file__, interact)
