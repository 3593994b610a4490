r"""Random JSON schemas of the supported kind, for tests and benchmarks.

PAPERS
  [1] JSON Schema: A Media Type for Describing JSON Documents, Wright et al., 2022 (draft 2020-12)
  [2] QuickCheck: A Lightweight Tool for Random Testing of Haskell Programs, Claessen & Hughes, ICFP 2000
"""

import random
from typing import Any

NAMES = ["name", "age", "tags", "größe", "a b", "x", "y", 'say "hi"', "z/1", "id"]
PATTERNS = ["^[a-z]{1,5}$", "[0-9]+", "^(foo|bar)-?", "x$", '^["\\\\a]+$', "^[^a-z]{2,3}$", "^.{1,3}$"]


def random_schema(draw: random.Random, depth: int = 3) -> Any:
    """Return a schema; every keyword that is supported has a chance.

    PAPER: the keywords, [1]; random cases instead of chosen ones, [2].
    PAPER CONTEXT: [2] tests a property on values that nobody would have thought of.
    INTUITION: A form designer without taste.
    IMPLEMENTATION: A kind is drawn, and keywords that can be met together; deeper schemas only while
        `depth` lasts. Where a node calls itself ($ref to the root) there is always a way to end.
    WHY: What schemas people write is known only to people; what the grammar must hold is everything.
    """
    simple = [_null, _boolean, _integer, _number, _string, _enum, _format]
    nested = [_array, _tuple, _object, _object, _map, _any_of, _one_of, _all_of]
    return draw.choice(simple + nested * (depth > 0))(draw, depth)


def random_recursive_schema(draw: random.Random) -> dict[str, Any]:
    """Return the schema of a tree or a list."""
    properties, required = {"value": random_schema(draw, 0)}, ["value"]
    if draw.random() < 0.5:
        properties["children"] = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3}
    else:
        properties["next"] = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
        required.append("next")
    node = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


def _null(draw: random.Random, depth: int) -> Any:
    return {"type": "null"}


def _boolean(draw: random.Random, depth: int) -> Any:
    return {"type": "boolean"}


def _range(draw: random.Random, low: Any, high: Any) -> dict[str, Any]:
    bounds = {
        draw.choice(["minimum", "exclusiveMinimum"]): low,
        draw.choice(["maximum", "exclusiveMaximum"]): high,
    }
    return {name: value for name, value in bounds.items() if draw.random() < 0.7}


def _integer(draw: random.Random, depth: int) -> Any:
    low = draw.choice([-1000, -7, 0, 3, 99, 12345])
    schema = {"type": "integer", **_range(draw, low, low + draw.choice([30, 31, 500, 10**6]))}
    return schema | ({"multipleOf": draw.choice([2, 3, 7, 10])} if draw.random() < 0.3 else {})


def _number(draw: random.Random, depth: int) -> Any:
    low = draw.choice([-10.5, -1, -0.001, 0, 0.25, 3.14159, 100])
    return {"type": "number", **_range(draw, low, low + draw.choice([0.01, 1, 2.5, 1000]))}


def _string(draw: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "string"}
    if draw.random() < 0.6:
        schema["maxLength"] = draw.choice([3, 5, 12, 60])
    if draw.random() < 0.4:
        schema["minLength"] = draw.choice([0, 1, 3])
    if draw.random() < 0.3:
        schema = {"type": "string", "pattern": draw.choice(PATTERNS)}
    return schema


def _format(draw: random.Random, depth: int) -> Any:
    return {"type": "string", "format": draw.choice(["date", "time", "date-time", "uuid", "ipv4", "email"])}


def _enum(draw: random.Random, depth: int) -> Any:
    values = ["red", "grün", 'a"b\\c\n', 0, -1, 2.5, True, None, ["a", 1], {"k": "v"}]
    if draw.random() < 0.3:
        return {"const": draw.choice(values)}
    return {"enum": draw.sample(values, draw.randrange(1, 6))}


def _array(draw: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "array", "items": random_schema(draw, depth - 1)}
    if draw.random() < 0.5:
        schema["minItems"] = draw.randrange(3)
    if draw.random() < 0.7:
        schema["maxItems"] = schema.get("minItems", 0) + draw.randrange(4)
    return schema


def _tuple(draw: random.Random, depth: int) -> Any:
    firsts = [random_schema(draw, depth - 1) for _ in range(draw.randrange(1, 4))]
    return {"type": "array", "prefixItems": firsts, "items": draw.choice([False, {"type": "integer"}]),
            "minItems": draw.randrange(len(firsts) + 1)}  # fmt: skip


def _object(draw: random.Random, depth: int) -> Any:
    names = draw.sample(NAMES, draw.randrange(5))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(draw, depth - 1) for name in names},
    }
    schema["required"] = [name for name in names if draw.random() < 0.6]
    if draw.random() < 0.7:
        schema["additionalProperties"] = draw.choice([False, False, {"type": "integer"}, True])
    if draw.random() < 0.2:
        schema["maxProperties"] = len(schema["required"]) + draw.randrange(3)
    if draw.random() < 0.2:
        schema["minProperties"] = draw.randrange(len(schema["required"]) + 1)
    return schema


def _map(draw: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "object", "additionalProperties": random_schema(draw, depth - 1)}
    if draw.random() < 0.5:
        schema["propertyNames"] = {"pattern": "^[a-z_]{1,8}$"}
    if draw.random() < 0.5:
        schema["patternProperties"] = {"^n": {"type": "integer"}, "s$": {"type": "string", "maxLength": 4}}
    if draw.random() < 0.5:
        schema["maxProperties"] = draw.randrange(1, 4)
    return schema


def _any_of(draw: random.Random, depth: int) -> Any:
    return {"anyOf": [random_schema(draw, depth - 1) for _ in range(draw.randrange(1, 4))]}


def _one_of(draw: random.Random, depth: int) -> Any:
    kinds = draw.sample(["circle", "square", "line"], 2)
    return {"oneOf": [
        {"type": "object", "properties": {"kind": {"const": kind}, "size": random_schema(draw, depth - 1)},
         "required": ["kind", "size"]} for kind in kinds]}  # fmt: skip


def _all_of(draw: random.Random, depth: int) -> Any:
    parts = [{"type": ["integer", "string"], "minLength": 1}, {"maxLength": 6, "maximum": 50, "minimum": -3}]
    return {"allOf": parts, "description": "a remark"}
