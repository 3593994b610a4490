r"""JSON Schema compiled to a grammar: what a model may write so that it satisfies the schema.

PAPERS
  [1] JSON Schema: A Media Type for Describing JSON Documents, Wright et al., 2022 (draft 2020-12)
  [2] Efficient Guided Generation for Large Language Models, Willard & Louf, 2023, arXiv:2307.09702
  [3] XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models,
      Dong et al., 2024, arXiv:2411.15100

SYMBOLS
  Supported: true, false, type (one or several), enum, const, anyOf, oneOf (of branches that exclude each
  other), allOf, $ref into the same document ($defs; rules may call themselves);
    string   minLength, maxLength, pattern, format (date, time, date-time, uuid, ipv4, email)
    number   minimum, maximum, exclusiveMinimum, exclusiveMaximum; integer besides: multipleOf
    array    items, prefixItems, minItems, maxItems
    object   properties, required, additionalProperties, patternProperties, propertyNames,
             minProperties, maxProperties
  What a schema leaves open is narrowed: properties come in the schema's order, and others only if
  additionalProperties says so (or the schema names none). Anything else is refused in a sentence.
"""

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from phase3_core_inference.project8_sampling.grammar import Grammar, Node
from phase3_core_inference.project8_sampling.json_text import FORMATS, JSONText
from phase3_core_inference.project8_sampling.schema_merge import Cases, merge

Schema = dict[str, Any]
MOST_RULES = 10_000
REMARKS = {"$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default"} | {
    "examples", "deprecated", "readOnly", "writeOnly"}  # say nothing about what is valid  # fmt: skip
TYPES = {
    "null": set[str](),
    "boolean": set[str](),
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties", "patternProperties", "propertyNames",
               "minProperties", "maxProperties"},
}  # fmt: skip
PYTHON_TYPES = {"null": type(None), "boolean": bool, "integer": int, "number": float, "string": str,
                "array": list, "object": dict}  # in this order: a bool is an int  # fmt: skip
OF_ANY_TYPE = {"type", "enum", "const"}


def schema_grammar(source: str, grammar: Grammar) -> Node:
    """Return the texts that satisfy a schema, given as JSON text; ValueError if there are none.

    PAPER: the meaning of the keywords, [1]; schemas to expressions, [2]; recursion needs a stack, [3].
    PAPER CONTEXT: [2] turns a schema into one regular expression, so that nesting has to end somewhere.
    INTUITION: A form with blanks; the schema says what each blank takes.
    IMPLEMENTATION: Each subschema is a rule of the grammar, made once; references are calls.
    WHY: A test compiles thousands of random schemas, lets a random model write, and has the library
        `jsonschema` check each document.
    """
    try:
        schema = json.loads(source, parse_constant=_refuse)
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()  # a lone surrogate has no bytes
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json_schema ({source[:40]}) must be JSON: {error}") from None
    return SchemaCompiler(schema, grammar).compile()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number there")


class SchemaCompiler:
    """One schema on its way to a grammar.

    PAPER: [1]; the narrowing to one order of properties is that of [2] and of most engines.
    PAPER CONTEXT: A validator answers yes or no to a finished document. A generator must know at each byte
        what can still become valid, so keywords that compare distant parts (uniqueItems) do not fit.
    INTUITION: Multiply out what is combined, until each case is one type with its own keywords.
    IMPLEMENTATION: `Cases` (schema_merge.py) turns $ref, allOf, anyOf and oneOf into flat schemas; a
        method per type makes the text. Rules wait in a list, so that schemas may refer to themselves.
    WHY: What is produced must always be valid; that not everything valid is produced is the price.
    """

    def __init__(self, schema: Any, grammar: Grammar) -> None:
        self.root, self.grammar, self.text = schema, grammar, JSONText(grammar)
        self.cases = Cases(schema, REMARKS, OF_ANY_TYPE.union(*TYPES.values()))
        self.comma = grammar.sequence(grammar.text(","), self.text.space)
        self.waiting: list[tuple[str, Any, str]] = []

    def compile(self) -> Node:
        """Make all rules and return the first."""
        start = self.rule(self.root, "#")
        while self.waiting:
            name, schema, path = self.waiting.pop()
            cases = [self.case(flat, path) for flat in self.cases.of(schema, path)]
            self.grammar.rules[name] = self.grammar.either(*cases)
        if self.grammar.shortest(start) == math.inf:
            raise ValueError(
                "json_schema (as a whole) must be satisfied by some finite text that we can write"
            )
        return start

    def rule(self, schema: Any, path: str) -> Node:
        """Return a call of the rule for a subschema, which is made once."""
        name = json.dumps(schema, sort_keys=True)
        if name not in self.grammar.rules:
            if len(self.grammar.rules) >= MOST_RULES:
                raise ValueError(f"json_schema ({path}) must have at most {MOST_RULES} different subschemas")
            self.grammar.rules[name] = self.grammar.nothing
            self.waiting.append((name, schema, path))
        return self.grammar.call(name)

    # One case

    def case(self, flat: Schema, path: str) -> Node:
        """Return the texts of a flat schema."""
        kinds = flat.get("type")
        if kinds is None:  # the keywords tell what is meant
            told = [kind for kind, keywords in TYPES.items() if keywords & flat.keys() and kind != "integer"]
            kinds = told or [kind for kind in TYPES if kind != "integer"]
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in TYPES for kind in kinds):
            shown = ", ".join(map(str, kinds)) if isinstance(kinds, list) else kinds
            raise ValueError(f"json_schema ({path}/type: {shown}) must be of {', '.join(TYPES)}")
        if "enum" not in flat and "const" not in flat:
            return self.grammar.either(*(getattr(self, f"{kind}_text")(flat, path) for kind in kinds))
        values = flat.get("enum", [flat.get("const")])
        if not isinstance(values, list):
            raise ValueError(f"json_schema ({path}/enum) must be a list")
        if "const" in flat:
            values = [value for value in values if json.dumps(value) == json.dumps(flat["const"])]
        found = []
        for value in values:
            kind = next(kind for kind, type_ in PYTHON_TYPES.items() if isinstance(value, type_))
            if kind in kinds or (kind == "integer" and "number" in kinds):
                literal = self.text.literal(value)
                asked = TYPES[kind] & flat.keys()
                node = getattr(self, f"{kind}_text")(flat, path) if asked else literal
                found.append(self.grammar.both(literal, node))
        return self.grammar.either(*found)

    def null_text(self, flat: Schema, path: str) -> Node:
        """Return null."""
        return self.grammar.text("null")

    def boolean_text(self, flat: Schema, path: str) -> Node:
        """Return true and false."""
        return self.grammar.either(self.grammar.text("true"), self.grammar.text("false"))

    def string_text(self, flat: Schema, path: str) -> Node:
        """Return the strings."""
        least, most = self.counts(flat, "Length", path)
        content = self.text.content(least, most, tuple(self.patterns(flat, path)))
        if "format" in flat:
            if not isinstance(flat["format"], str) or flat["format"] not in FORMATS:
                raise ValueError(
                    f"json_schema ({path}/format: {flat['format']}) must be of {', '.join(FORMATS)}"
                )
            formatted = self.text.formatted(flat["format"])
            narrowed = {"minLength", "maxLength", "pattern"} & flat.keys()
            content = self.grammar.both(content, formatted) if narrowed else formatted
        return self.text.quoted(content)

    def patterns(self, flat: Schema, path: str) -> list[str]:
        """Return the patterns that a string must match: merging may have made a list of them."""
        patterns = flat.get("pattern", [])
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"json_schema ({path}/pattern) must be a string")
        return patterns

    def integer_text(self, flat: Schema, path: str) -> Node:
        """Return the integers."""
        low, high = self.bounds(flat, path)
        least = None if low is None else math.floor(low[0]) + 1 if low[1] else math.ceil(low[0])
        most = None if high is None else math.ceil(high[0]) - 1 if high[1] else math.floor(high[0])
        multiple = flat.get("multipleOf", 1)
        if type(multiple) is float and multiple.is_integer():
            multiple = int(multiple)
        if type(multiple) is not int or not 1 <= multiple <= 1000:
            raise ValueError(
                f"json_schema ({path}/multipleOf: {multiple}) must be a whole number from 1 to 1000"
            )
        return self.text.integer(least, most, multiple)

    def number_text(self, flat: Schema, path: str) -> Node:
        """Return the numbers; multiples of whole numbers are integers."""
        return (
            self.integer_text(flat, path)
            if "multipleOf" in flat
            else self.text.number(*self.bounds(flat, path))
        )

    def bounds(self, flat: Schema, path: str) -> tuple[Any, Any]:
        """Return the least and the largest number, each with whether it is itself out; None: no bound."""
        found: dict[str, tuple[Decimal, bool]] = {}
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if keyword in flat:
                value = flat[keyword]
                if type(value) not in (int, float) or not math.isfinite(value):
                    raise ValueError(f"json_schema ({path}/{keyword}: {value}) must be a number")
                found[keyword] = Decimal(repr(value)), keyword.startswith("exclusive")
        low = max((found[name] for name in ("minimum", "exclusiveMinimum") if name in found), default=None)
        highs = [found[name] for name in ("maximum", "exclusiveMaximum") if name in found]
        return low, min(highs, key=lambda bound: (bound[0], not bound[1]), default=None)

    def counts(self, flat: Schema, what: str, path: str) -> tuple[int, int | None]:
        """Return minWhat and maxWhat."""
        for keyword in (f"min{what}", f"max{what}"):
            value = flat.get(keyword, 0)
            if type(value) is float and value.is_integer():
                flat[keyword] = value = int(value)
            if type(value) is not int or value < 0:
                raise ValueError(
                    f"json_schema ({path}/{keyword}: {value}) must be a whole number, at least 0"
                )
        return flat.get(f"min{what}", 0), flat.get(f"max{what}")

    # Lists and objects

    def array_text(self, flat: Schema, path: str) -> Node:
        """Return the lists: first those items that have a schema each, then any number of others."""
        grammar, (least, most) = self.grammar, self.counts(flat, "Items", path)
        prefix = flat.get("prefixItems", [])
        if not isinstance(prefix, list):
            raise ValueError(f"json_schema ({path}/prefixItems) must be a list of schemas")
        firsts = [self.rule(schema, f"{path}/prefixItems/{i}") for i, schema in enumerate(prefix)]
        item = self.rule(flat.get("items", True), f"{path}/items")
        comma = self.comma
        limit = math.inf if most is None else most
        placed = max(1, len(firsts))  # items that are written one by one, the very first without a comma
        left = None if most is None else max(0, most - placed)
        rest = grammar.repeat(grammar.sequence(comma, item), max(0, least - placed), left)
        for i in reversed(range(placed)):
            one = firsts[i] if i < len(firsts) else item
            more = grammar.sequence(*([comma] if i else []), one, rest) if i < limit else grammar.nothing
            rest = grammar.either(more, grammar.empty if i >= least else grammar.nothing)
        return self.wrapped("[", rest, "]")

    def object_text(self, flat: Schema, path: str) -> Node:
        """Return the objects: the named properties in their order, then others."""
        grammar, (least, most) = self.grammar, self.counts(flat, "Properties", path)
        properties, required = flat.get("properties", {}), flat.get("required", [])
        if not all(isinstance(flat.get(name, {}), dict) for name in ("properties", "patternProperties")):
            raise ValueError(f"json_schema ({path}) must have objects as properties and patternProperties")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise ValueError(f"json_schema ({path}/required) must be a list of names")
        names = [*properties, *(name for name in dict.fromkeys(required) if name not in properties)]
        members = []
        for name in names:
            key = self.text.literal(name)
            if "propertyNames" in flat:
                key = grammar.both(key, self.key_text(flat, path))
            members.append((self.pair(key, self.value_of(name, flat, path)), name in required))
        others = grammar.either(*self.other_pairs(flat, names, path))
        return self.wrapped("{", self.members(members, others, least, most), "}")

    def members(self, members: list[tuple[Node, bool]], others: Node, least: int, most: int | None) -> Node:
        """Return the members between the braces; `least` is met by named ones, others may be repeated names.

        `rest[n]` is what may follow when n members are written, and n counts no further than it matters.
        """
        grammar, comma = self.grammar, self.comma
        cap = max(1, len(members) if most is not None else min(least, len(members) + 1))
        rest = []
        for n in range(cap + 1):
            room = None if most is None else most - n
            again = grammar.repeat(grammar.sequence(comma, others), 0, room if n else room and room - 1)
            if n == 0:
                again = grammar.maybe(grammar.sequence(others, again)) if room != 0 else grammar.empty
            rest.append(again if n >= least else grammar.nothing)
        for member, is_required in reversed(members):
            following = []
            for n in range(cap + 1):
                full = most is not None and n >= most
                written = grammar.sequence(*([comma] if n else []), member, rest[min(cap, n + 1)])
                skipped = grammar.nothing if is_required else rest[n]
                following.append(skipped if full else grammar.either(written, skipped))
            rest = following
        return rest[0]

    def value_of(self, name: str, flat: Schema, path: str) -> Node:
        """Return the rule of a named property: by its name, by patterns that match it, or by neither."""
        schemas = [flat["properties"][name]] if name in flat.get("properties", {}) else []
        schemas += [schema for pattern, schema in flat.get("patternProperties", {}).items()
                    if self.matches(pattern, name)]  # fmt: skip
        schemas = schemas or [flat.get("additionalProperties", True)]
        return self.rule(schemas[0] if len(schemas) == 1 else {"allOf": schemas}, f"{path}/properties/{name}")

    def matches(self, pattern: str, name: str) -> bool:
        """Say whether a pattern is found in a name."""
        quoted = json.dumps(name, ensure_ascii=False).encode()
        return self.grammar.accepts(self.text.string(patterns=(pattern,)), quoted)

    def other_pairs(self, flat: Schema, names: list[str], path: str) -> Iterator[Node]:
        """Yield the pairs whose names the schema does not list."""
        grammar = self.grammar
        listed = [self.text.literal(name) for name in names]
        patterns = flat.get("patternProperties", {})
        matching = {pattern: self.text.string(patterns=(pattern,)) for pattern in patterns}
        key = self.key_text(flat, path)
        for pattern, node in matching.items():  # keys that match this pattern and no other
            taken = grammar.either(*listed, *(other for name, other in matching.items() if name != pattern))
            own = grammar.both(grammar.both(key, node), grammar.complement(taken))
            yield self.pair(own, self.rule(patterns[pattern], f"{path}/patternProperties/{pattern}"))
        free = flat.get("additionalProperties", not (names or patterns))
        if free is not False:
            own = grammar.both(key, grammar.complement(grammar.either(*listed, *matching.values())))
            yield self.pair(own, self.rule(free, f"{path}/additionalProperties"))

    def key_text(self, flat: Schema, path: str) -> Node:
        """Return the names that properties may have."""
        if "propertyNames" not in flat:
            return self.text.string()
        cases = self.cases.of(flat["propertyNames"], f"{path}/propertyNames")
        cases = [merged for case in cases if (merged := merge(case, {"type": "string"}, path)) is not None]
        return self.grammar.either(*(self.case(flat, f"{path}/propertyNames") for flat in cases))

    def pair(self, key: Node, value: Node) -> Node:
        """Return the pairs of a name and a value."""
        colon = self.grammar.text(":"), self.grammar.maybe(self.grammar.text(" "))
        return self.grammar.sequence(key, *colon, value)

    def wrapped(self, opening: str, content: Node, closing: str) -> Node:
        """Return the content between brackets, with space on both sides."""
        grammar, space = self.grammar, self.text.space
        return grammar.sequence(grammar.text(opening), space, content, space, grammar.text(closing))
