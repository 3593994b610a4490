"""Checks of constrained decoding. --interactive lets a random model write by the regex that you type."""

import itertools
import json
import math
import random
import re
from functools import partial

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.script import ask, one_line, run_validation
from phase3_core_inference.project8_sampling.config import SamplingParams, WriterConfig
from phase3_core_inference.project8_sampling.constraint import DEAD, Automaton, Constraint, ConstraintState
from phase3_core_inference.project8_sampling.generate import Writer, write
from phase3_core_inference.project8_sampling.grammar import Grammar
from phase3_core_inference.project8_sampling.json_schema import schema_grammar
from phase3_core_inference.project8_sampling.random_schemas import random_recursive_schema, random_schema
from phase3_core_inference.project8_sampling.regex_syntax import parse_regex, utf8
from phase3_core_inference.project8_sampling.sampler import Sampler
from phase3_core_inference.project8_sampling.state import RequestState
from phase3_core_inference.project8_sampling.vocabulary import Vocabulary


def automaton(pattern: str) -> Automaton:
    grammar = Grammar()
    return Automaton(grammar, parse_regex(pattern, grammar, partial(utf8, grammar)))


def matches(machine: Automaton, text: str) -> bool:
    return machine.accepts(machine.step(machine.start, text.encode()))


# Regular expressions

PATTERNS = [
    "", "a", "ab|c", "(ab|c)*d", "a+b?", "[a-c]{2,3}", "a{0}", "(a{2}){1,2}", "[^ab]", ".", r"\d+\.\d*",
    r"\w\W\s\S\D", "[]a]", "[a\\-z]", "[a-]", "(?:x|yy)+?z", "é|🙂", "[à-ü]+", "[α-ω🙂-🙏]", "a{,2}",
    "a{1,}b", "{", "a{x}", "(?P<n>a)b", r"\x41\u00e9\n", r"[\d.]+", r"[^\d]", "(|a)b", "(a|)*", "((a*)*)*",
    r"\$\^\.", "a|", "(a?){3}", r"[\]\\]",
]  # fmt: skip
LETTERS = "abcxyz019.-_ {}[]\\$^\né🙂ωA,"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_pythons_re_matches(pattern: str):
    theirs, machine, draw = re.compile(pattern, re.ASCII), automaton(pattern), random.Random(0)
    texts = [
        *LETTERS,
        "".join(draw.choices("ab", k=3)),
        *("".join(t) for t in itertools.product("abcdyz", repeat=2)),
    ]
    texts += ["".join(draw.choices(LETTERS, k=draw.randrange(7))) for _ in range(300)]
    texts += ["12.5", "aabb", "abcd", "x-1a", "yyxz", "aab", "", "Aé\n", "A\xe9\n", "{", "a{x}", "$^."]
    for text in texts:
        assert matches(machine, text) == bool(theirs.fullmatch(text)), text


expressions = st.recursive(
    st.sampled_from(["a", "b", "c", "[ab]", "[^a]", ".", "é"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(expressions, st.lists(st.text("abcé", max_size=6), max_size=8))
def test_random_patterns_match_what_pythons_re_matches(pattern: str, texts: list[str]):
    machine = automaton(pattern)
    for text in texts:
        assert matches(machine, text) == bool(re.fullmatch(pattern, text)), text


def test_every_character_is_its_bytes_and_nothing_else_is():
    grammar = Grammar()
    machine = Automaton(grammar, utf8(grammar, [(0, 0x10FFFF)]))
    for code in [*range(0x900), *range(0x900, 0x110000, 977), 0xFFFF, 0x10000, 0x10FFFF]:
        text = chr(code)
        if 0xD800 <= code < 0xE000:
            assert not machine.accepts(machine.step(machine.start, text.encode(errors="surrogatepass")))
        else:
            assert matches(machine, text)
    for wrong in (
        b"\x80",
        b"\xc0\x80",
        b"\xc3",
        b"\xe0\x80\x80",
        b"\xf4\x90\x80\x80",
        b"\xed\xa0\x80",
        b"\xff",
    ):
        assert not machine.accepts(machine.step(machine.start, wrong))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF))
def test_a_range_of_characters_has_just_those(a: int, b: int, code: int):
    low, high = sorted((a, b))
    grammar = Grammar()
    machine = Automaton(grammar, utf8(grammar, [(low, high)]))
    for point in (code, low, high, low - 1, high + 1):
        if 0 <= point <= 0x10FFFF and not 0xD800 <= point < 0xE000:
            assert matches(machine, chr(point)) == (low <= point <= high)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", r"must be regular and plain: \\1 at 5"),
        ("a(?=b)", r"must be regular: \(\?= at 4"),
        (r"\bword", r"must be regular and plain: \\b"),
        ("a^b", r"must have \^ and \$ at its ends only: \^ at 1"),
        ("(a$)b", r"must have \^ and \$ at its ends only: \$ at 2"),
        ("(a", r"must have brackets in pairs: \( at 2"),
        ("a)", r"must have brackets in pairs: \) at 1"),
        ("*a", r"must have something to repeat: \* at 1"),
        ("a**", r"must not repeat a repeat without brackets"),
        ("a++", r"must not have possessive repeats"),
        ("[b-a]", r"must have ranges that rise"),
        ("[a", r"must be whole: it ends at 2"),
        ("a{99999}", r"must repeat at most 10000 times"),
        ("a{3,2}", r"must repeat at most 10000 times"),
        ("(" * 200 + ")" * 200, r"must nest at most 100 deep"),
        (r"\u12", r"must be whole"),
        (r"\xgg", r"must have hexadecimal digits there"),
    ],
)
def test_what_is_not_regular_is_refused_in_a_sentence(pattern: str, message: str):
    with pytest.raises(ValueError, match=message):
        automaton(pattern)


def test_both_and_not_are_those_of_sets():
    grammar = Grammar()
    parse = partial(parse_regex, grammar=grammar, characters=partial(utf8, grammar))
    left, right = "(ab|a)*b?", "[ab]{2,4}"
    both = Automaton(grammar, grammar.both(parse(left), parse(right)))
    neither = Automaton(grammar, grammar.complement(grammar.either(parse(left), parse(right))))
    for text in map("".join, itertools.chain(*(itertools.product("abc", repeat=n) for n in range(6)))):
        flags = [bool(re.fullmatch(pattern, text)) for pattern in (left, right)]
        assert matches(both, text) == all(flags)
        assert matches(neither, text) == (not any(flags))


def test_no_state_is_a_dead_end_and_distances_are_exact():
    grammar = Grammar()
    parse = partial(parse_regex, grammar=grammar, characters=partial(utf8, grammar))
    node = grammar.both(parse("(abc|abd|xyz)*"), parse("(ab.|x..){2,3}"))
    machine = Automaton(grammar, node)
    assert machine.distance[machine.start] == 6
    seen, waiting = set(), [machine.start]
    while waiting:
        state = waiting.pop()
        if state in seen:
            continue
        seen.add(state)
        machine.fill(np.array([state]))
        following = set(machine.table[state].tolist()) - {DEAD}
        waiting += following
        if machine.distance[state] > 0:
            assert min(machine.distance[s] for s in following) == machine.distance[state] - 1
    nothing = Automaton(grammar, grammar.both(parse("a+b"), parse("a+c")))
    assert nothing.start == DEAD


# Masks


@pytest.mark.parametrize(
    "pattern", ["(日本語|naïve|🙂)+", '\\{"name": ".{2,5}"\\}', "[a-z ]*[0-9]{1,3}", "[^a]{3}"]
)
def test_a_mask_allows_the_tokens_that_can_be_spelled(pattern: str, vocabulary: Vocabulary):
    constraint, draw = Constraint.compile(vocabulary, "regex", pattern), random.Random(1)
    machine = constraint.automaton
    for _ in range(5):
        state = ConstraintState(constraint)
        for _ in range(8):
            allowed = ~state.forbidden(1000)
            expected = [bool(data) and machine.step(state.state, data) != DEAD for data in vocabulary.tokens]
            assert allowed.tolist() == expected
            if not allowed.any():
                break
            state.advance(draw.choice(allowed.nonzero()[:, 0].tolist()))


def test_tokens_with_half_a_character_are_allowed_where_the_other_half_can_follow(vocabulary: Vocabulary):
    halves = [i for i, data in enumerate(vocabulary.tokens) if data == "日".encode()[:1]]
    constraint = Constraint.compile(vocabulary, "regex", "日|b")
    state = ConstraintState(constraint)
    assert not state.forbidden(9)[halves[0]]
    state.advance(halves[0])
    assert not state.complete
    allowed = [vocabulary.tokens[i] for i in (~state.forbidden(9)).nonzero()[:, 0]]
    assert allowed
    assert all("日".encode()[1:].startswith(data) for data in allowed)


def test_special_tokens_are_forbidden_and_stop_tokens_allowed_at_the_end(vocabulary: Vocabulary, tokenizer):
    end = tokenizer.special_tokens["<|endoftext|>"]
    state = ConstraintState(Constraint.compile(vocabulary, "regex", "a+"))
    assert state.forbidden(9, [end])[end]
    state.advance(tokenizer.encode("a")[0])
    assert not state.forbidden(9, [end])[end]
    assert not state.finished
    with pytest.raises(ValueError, match=r"token \(\d+: b'b'\) must be allowed by the constraint"):
        state.advance(tokenizer.encode("b")[0])


@pytest.mark.parametrize("pattern", [r"[a-z]{5,}", r"(yes|no), because .{0,50}\.", r"(\d{3}-){1,5}x", "🙂+"])
@pytest.mark.parametrize("room", [0, 1, 5])
def test_a_text_is_complete_even_when_it_runs_out_of_tokens(pattern: str, room: int, write_at_random):
    grammar = Grammar()
    least = grammar.shortest(parse_regex(pattern, grammar, partial(utf8, grammar)))
    for seed in range(10):
        state = write_at_random(seed, regex=pattern, max_new_tokens=int(least) + room)
        assert re.fullmatch(pattern, state.text), (state.text, state.finish_reason, state.error)


def test_a_grammar_that_grows_too_large_fails_its_own_request(vocabulary: Vocabulary, monkeypatch):
    states = [RequestState(SamplingParams(seed=i, regex="[a-z]+"), [], vocabulary) for i in range(2)]
    states.append(RequestState(SamplingParams(seed=3), [], vocabulary))

    def too_large(left: int, stop_tokens) -> None:
        raise ValueError("grammar (100001 states) must be simpler")

    monkeypatch.setattr(states[0].constraint, "forbidden", too_large)
    Sampler()(torch.randn(3, vocabulary.size), states)
    assert [state.finish_reason for state in states] == ["error", None, None]
    assert states[0].error == "grammar (100001 states) must be simpler"


def test_a_constraint_that_does_not_fit_into_its_tokens_is_refused(vocabulary: Vocabulary):
    with pytest.raises(ValueError, match=r"max_new_tokens \(5\) must be at least 9"):
        RequestState(SamplingParams(regex="a{9,}", max_new_tokens=5), [], vocabulary)


def test_odds_within_a_constraint_stay_those_of_the_model(vocabulary: Vocabulary, tokenizer):
    logits = torch.randn(1, vocabulary.size)
    state = RequestState(SamplingParams(regex="(a|b|c)x"), [], vocabulary)
    ids = [tokenizer.encode(letter)[0] for letter in "abc"]
    odds = Sampler().odds(logits, [state])[0]
    torch.testing.assert_close(odds[ids], logits[0, ids].softmax(0))
    assert float(odds.sum()) == pytest.approx(1)


def test_a_vocabulary_compiles_a_pattern_once_and_requests_do_not_share_their_place(vocabulary: Vocabulary):
    one, two = (RequestState(SamplingParams(regex="ab"), [], vocabulary) for _ in range(2))
    assert one.constraint.constraint is two.constraint.constraint
    one.constraint.advance(next(i for i, data in enumerate(vocabulary.tokens) if data == b"a"))
    assert (one.constraint.needed, two.constraint.needed) == (1, 2)


# JSON


def check(schema, text: str) -> None:
    """Parse and validate; the oracle is the library jsonschema."""
    value = json.loads(text)
    formats = jsonschema.FormatChecker(["date", "ipv4", "email"])
    jsonschema.Draft202012Validator(schema, format_checker=formats).validate(value)


def written(seed: int, depth: int, spread: float, room: int, write) -> RequestState | None:
    """Write a document by a random schema and check it; None if nothing (so short) satisfies the schema."""
    draw = random.Random(seed)
    schema = random_recursive_schema(draw) if seed % 6 == 0 else random_schema(draw, depth)
    try:
        state = write(seed, spread, json_schema=json.dumps(schema), max_new_tokens=room)
    except ValueError as error:
        if re.search("must be satisfied by some|must be at least", str(error)):
            return None
        raise
    check(schema, state.text)
    return state


def test_what_is_written_satisfies_random_schemas(write_at_random):
    found = [written(seed, 3, 3.0, (120, 400)[seed % 2], write_at_random) for seed in range(120)]
    states = [state for state in found if state is not None]
    assert len(states) > 110
    kinds = {type(json.loads(state.text)) for state in states}
    assert kinds == {dict, list, str, int, float, bool, type(None)}
    assert any(len(state.output) > 0.95 * state.params.max_new_tokens for state in states)  # had to hurry


@pytest.mark.slow
def test_what_is_written_satisfies_thousands_of_random_schemas(write_at_random):
    found = [
        written(seed, seed % 5, (1.0, 3.0, 10.0)[seed % 3], 400, write_at_random)
        for seed in range(1000, 4000)
    ]
    assert sum(state is not None for state in found) > 2800


@pytest.mark.slow
def test_what_smollm2_writes_satisfies_random_schemas():
    """A real model wants other things than random logits; each batch of 32 has 32 schemas."""
    try:
        writer = Writer(WriterConfig("smollm2-135m"))
    except OSError as error:
        pytest.skip(one_line(error))
    ids, done = writer.prompt_ids("Write a short JSON document."), 0
    for first in range(0, 1024, 32):
        schemas, states = [], []
        for seed in range(first, first + 32):
            draw = random.Random(seed)
            schema = random_recursive_schema(draw) if seed % 6 == 0 else random_schema(draw)
            params = SamplingParams(
                json_schema=json.dumps(schema), seed=seed, temperature=0.8, max_new_tokens=60
            )
            try:
                states.append(RequestState(params, ids, writer.vocabulary, writer.stop))
                schemas.append(schema)
            except ValueError:  # nothing so short satisfies it
                continue
        write(writer.model, states)
        for schema, state in zip(schemas, states, strict=True):
            check(schema, state.text)
        done += len(states)
    assert done > 900


def accepts(schema, text: str) -> bool:
    grammar = Grammar()
    return matches(Automaton(grammar, schema_grammar(json.dumps(schema), grammar)), text)


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": "integer"}, ["0", "-7", "123"], ["01", "-0", "+1", "1.0", "1e2", "--1", ""]),
        ({"type": "number"}, ["0", "-0.5", "1e10", "1.5E-3"], [".5", "1.", "01", "1e", "NaN", "Infinity"]),
        ({"type": "string"}, ['""', '"é"', r'"\n"', r'"\u0001"'], ['"\n"', r'"\u0041"', r'"\/"', '"a']),
        ({"type": "boolean"}, ["true", "false"], ["True", "1"]),
        ({"type": "string", "maxLength": 1}, ['"🙂"', r'"\n"'], ['"ab"']),
        ({"type": "integer", "minimum": -3, "exclusiveMaximum": 12}, ["-3", "0", "11"], ["-4", "12", "100"]),
        ({"type": "integer", "multipleOf": 7}, ["0", "7", "-14", "1001"], ["1", "-13", "1000"]),
        (
            {"type": "number", "minimum": 0.5, "maximum": 1},
            ["0.5", "0.75", "1", "1.0"],
            ["0.4999", "1.01", "-1"],
        ),
        ({"type": "number", "exclusiveMinimum": 0.5}, ["0.51", "0.500001", "3"], ["0.5", "0.50", "0"]),
        ({"type": "number", "maximum": -0.25}, ["-0.25", "-1", "-0.3"], ["-0.2", "0", "-0", "0.25"]),
        ({"items": {"type": "null"}, "maxItems": 2}, ["[]", "[null, null]"], ["[null,null,null]", "[,]"]),
        ({"const": {"a": [1, None]}}, ['{"a": [1, null]}'], ['{"a": [1]}']),
        ({"enum": [1, True, "1"]}, ["1", "true", '"1"'], ["1.0", "false"]),
        ({"type": "string", "enum": ["a", 1]}, ['"a"'], ["1"]),
        (
            {"properties": {"a": True}, "required": ["b"]},
            ['{"b": 1}', '{"a": {}, "b": 1}'],
            ['{"a": 1}', "{}"],
        ),
        ({"properties": {"a": True}, "type": "object"}, ['{"a": 1}', "{}"], ['{"b": 1}', '{"a": 1, "b": 1}']),
        (
            {"properties": {"a": {"const": 1}}, "additionalProperties": {"const": 2}},
            ['{"a": 1, "b": 2}', '{"aa":2}', "{}"],
            ['{"a": 2}', '{"b": 1}', '{"b":2,"a":1}'],
        ),
        ({"type": "object"}, ['{"a": [{}], "b": -1.5}'], ["[]"]),
        ({"pattern": "^a.*z$", "minLength": 4}, ['"abcz"', '"a\\"\\\\z"'], ['"abz"', '"bcdz"']),
        ({"allOf": [{"minimum": 3}, {"maximum": 5}], "type": "integer"}, ["3", "5"], ["2", "6"]),
        (
            {"anyOf": [{"required": ["a"]}, {"required": ["b"]}], "properties": {"a": True, "b": True}},
            ['{"a":1}', '{"b":1}', '{"a":1,"b":2}'],
            ["{}"],
        ),
        ({"items": {"$ref": "#"}, "type": "array"}, ["[[], [[]]]"], ["[1]"]),
        ({"$ref": "#/$defs/a%1~1b", "$defs": {"a%1/b": {"const": 1}}}, ["1"], ["2"]),
        ({"maxProperties": 1, "properties": {"a": True, "b": True}}, ["{}", '{"b":1}'], ['{"a":1,"b":1}']),
        ({"minProperties": 1, "properties": {"a": True, "b": True}}, ['{"a":1}', '{"a":1, "b":1}'], ["{}"]),
        ({"type": "string", "format": "date"}, ['"2024-02-28"'], ['"2024-02-30"', '"2024-13-01"']),
    ],
)
def test_schemas_allow_and_forbid(schema, valid: list, invalid: list):
    for text in valid:
        check(schema, text)
        assert accepts(schema, text), text
    for text in invalid:
        assert not accepts(schema, text), text


@settings(max_examples=60, deadline=None)
@given(st.integers(-3000, 3000), st.integers(-3000, 3000), st.integers(-4000, 4000))
def test_integers_between_bounds_are_exact(a: int, b: int, value: int):
    low, high = sorted((a, b))
    schema = {"type": "integer", "minimum": low, "maximum": high}
    for number in (value, low, high, low - 1, high + 1, 0):
        assert accepts(schema, str(number)) == (low <= number <= high)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(-50_000, 50_000),
    st.integers(-50_000, 50_000),
    st.integers(-60_000, 60_000),
    st.booleans(),
    st.booleans(),
)
def test_numbers_between_bounds_are_exact(a: int, b: int, value: int, above: bool, below: bool):
    low, high = sorted((a / 1000, b / 1000))
    names = "exclusiveMinimum" if above else "minimum", "exclusiveMaximum" if below else "maximum"
    schema = {"type": "number", names[0]: low, names[1]: high}
    if low == high and (above or below):
        return
    for number in (value / 1000, low, high, round(low - 0.001, 3), round(high + 0.001, 3)):
        expected = (low < number if above else low <= number) and (number < high if below else number <= high)
        for text in {
            format(number, ".3f"),
            format(number, "g") if abs(number) > 1e-3 else "0",
            format(number, ".6f"),
        }:
            if not re.match("-0(.0*)?$", text) and float(text) == number:
                assert accepts(schema, text) == expected, text


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", r"json_schema \(\{\) must be JSON"),
        ({"uniqueItems": True}, r"json_schema \(#/uniqueItems\) must keep to the supported keywords"),
        (
            {"properties": {"a": {"not": {}}}},
            r"json_schema \(#/properties/a/not\) must keep to the supported",
        ),
        ({"type": "text"}, r"json_schema \(#/type: text\) must be of null, boolean"),
        ({"$ref": "#/$defs/x"}, r"json_schema \(#: #/\$defs/x\) must refer to something that is there"),
        ({"$ref": "other.json"}, r"json_schema \(#: other.json\) must refer to a place in this schema"),
        ({"$ref": "#"}, r"json_schema \(#: #\) must not refer to itself alone"),
        (
            {"oneOf": [{"type": "integer"}, {"type": "number"}]},
            r"\(#/oneOf/0 and 1\) must exclude each other",
        ),
        ({"type": "string", "format": "hostname"}, r"json_schema \(#/format: hostname\) must be of date"),
        ({"type": "integer", "multipleOf": 0.5}, r"multipleOf: 0.5\) must be a whole number"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, r"must be satisfied by some finite text"),
        ({"enum": []}, r"must be satisfied by some finite text"),
        (False, r"must be satisfied by some finite text"),
        (
            {"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"},
            r"satisfied by some finite text",
        ),
        ({"allOf": [{"format": "date"}, {"format": "uuid"}]}, r"\(#/format\) must not be said twice"),
        ({"type": "string", "pattern": "(?=a)"}, r"regex \(\(\?=a\)\) must be regular"),
        ({"minLength": -1}, r"minLength: -1\) must be a whole number"),
        ({"anyOf": []}, r"json_schema \(#/anyOf\) must be a list of schemas"),
        ({"items": 5}, r"json_schema \(#/items\) must be an object, true or false"),
    ],
)
def test_what_is_not_supported_is_refused_in_a_sentence(schema, message: str, vocabulary: Vocabulary):
    source = schema if isinstance(schema, str) else json.dumps(schema)
    with pytest.raises(ValueError, match=message):
        RequestState(SamplingParams(json_schema=source), [], vocabulary)


junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text("a#/$\\", max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["type", "a"]), inner)
    ),
    max_leaves=3,
)
KEYWORDS = [
    "type", "enum", "const", "$ref", "allOf", "anyOf", "oneOf", "minLength", "pattern", "format", "minimum",
    "multipleOf", "items", "prefixItems", "maxItems", "properties", "required", "additionalProperties",
    "patternProperties", "propertyNames", "minProperties", "$defs",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYWORDS), junk, max_size=4), st.integers(0, 10**6))
def test_whatever_is_sent_as_a_schema_is_understood_or_refused_in_a_sentence(wrong: dict, seed: int):
    for schema in (wrong, {"allOf": [random_schema(random.Random(seed)), wrong]}):
        try:
            schema_grammar(json.dumps(schema), Grammar())
        except ValueError as error:
            assert re.match("json_schema|regex|bounds|grammar", str(error)), str(error)  # noqa: PT017


def test_additional_names_are_none_of_the_listed_however_they_are_spelled():
    schema = {"properties": {"a": {"const": 1}, "\n": {"const": 1}}, "additionalProperties": {"const": 2}}
    assert not accepts(schema, r'{"\u0061": 2}')
    assert not accepts(schema, r'{"\n": 2}')
    assert accepts(schema, r'{"\n": 1, "\t": 2}')


def test_deep_nesting_and_long_literals_are_no_trouble(write_at_random):
    schema = {"type": "array", "items": {"$ref": "#"}}
    text = "[" * 300 + "]" * 300
    assert accepts(schema, text)
    long = "x" * 5000
    assert accepts({"const": long}, json.dumps(long))
    assert math.isfinite(
        write_at_random(0, json_schema=json.dumps({"const": "y" * 300}), max_new_tokens=400).mu
    )


def interact() -> None:
    tokens = Vocabulary([bytes([i]) for i in range(256)])
    for pattern in ask("regex> "):
        try:
            state = RequestState(SamplingParams(regex=pattern, max_new_tokens=60), [], tokens)
            while state.finish_reason is None:
                Sampler()(torch.randn(1, 256), [state])
            print(repr(state.text))
        except ValueError as error:
            print(f"error: {one_line(error)}")


if __name__ == "__main__":
    run_validation(__file__, interact)
