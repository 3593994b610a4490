r"""What two flat JSON Schemas say together, and whether they exclude each other.

PAPERS
  [1] JSON Schema: A Media Type for Describing JSON Documents, Wright et al., 2022 (draft 2020-12)
"""

import json
from itertools import combinations
from typing import Any

Schema = dict[str, Any]
LARGEST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
SMALLEST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
NESTED = ("items", "propertyNames")
JOINTS = {"$ref", "allOf", "anyOf", "oneOf"}
MOST_BRANCHES = 256


class Cases:
    """A schema with combinations, multiplied out into flat schemas without any.

    PAPER: $ref, allOf, anyOf and oneOf, [1].
    PAPER CONTEXT: A validator runs the parts of a combination one after the other on the finished value. A
        generator must know what all of them ask for before it writes the first letter.
    INTUITION: (a or b) and (c or d) is ac or ad or bc or bd.
    IMPLEMENTATION: Only what stands at one place is multiplied out; schemas of properties and items wait,
        which is why a schema may refer to itself below them. Raises ValueError with the path of what it
        cannot take.
    WHY: A keyword that is not understood must not be ignored: the text would be valid by half the schema.
    """

    def __init__(self, root: Any, remarks: set[str], known: set[str]) -> None:
        """Take the whole schema, keywords that mean nothing, and those that are supported."""
        self.root, self.remarks, self.known = root, remarks, known

    def of(self, schema: Any, path: str, open_refs: tuple[str, ...] = ()) -> list[Schema]:
        """Return flat schemas, without $ref, allOf, anyOf and oneOf, that together say the same."""
        if schema is True or schema is False:
            return [{}] if schema else []
        if not isinstance(schema, dict):
            raise ValueError(f"json_schema ({path}) must be an object, true or false")
        if unknown := sorted(schema.keys() - self.known - self.remarks - JOINTS):
            raise ValueError(f"json_schema ({path}/{unknown[0]}) must keep to the supported keywords")
        found = [{name: value for name, value in schema.items() if name not in self.remarks | JOINTS}]
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference in open_refs:
                raise ValueError(f"json_schema ({path}: {reference}) must not refer to itself alone")
            referred = self.of(self.resolve(reference, path), str(reference), (*open_refs, reference))
            found = self.product(found, referred, path)
        for i, part in enumerate(self.listed(schema, "allOf", path)):
            found = self.product(found, self.of(part, f"{path}/allOf/{i}", open_refs), path)
        for joint in ("anyOf", "oneOf"):
            if joint in schema:
                branches = [
                    self.of(part, f"{path}/{joint}/{i}", open_refs)
                    for i, part in enumerate(self.listed(schema, joint, path))
                ]
                branches = [self.product(found, branch, path) for branch in branches]
                if joint == "oneOf":
                    for (i, left), (j, right) in combinations(enumerate(branches), 2):
                        check_exclusive(left, right, f"{path}/oneOf/{i} and {j}")
                found = [flat for branch in branches for flat in branch]
        return found

    def product(self, left: list[Schema], right: list[Schema], path: str) -> list[Schema]:
        """Return every flat schema of left merged with every one of right, as far as they can be met."""
        if len(left) * len(right) > MOST_BRANCHES:
            raise ValueError(f"json_schema ({path}) must have at most {MOST_BRANCHES} cases")
        merged = [merge(a, b, path) for a in left for b in right]
        return [flat for flat in merged if flat is not None]

    def listed(self, schema: Schema, joint: str, path: str) -> list[Any]:
        """Return the branches of a combination, none if it is not there."""
        parts = schema.get(joint, [])
        if not isinstance(parts, list) or (joint in schema and not parts):
            raise ValueError(f"json_schema ({path}/{joint}) must be a list of schemas")
        return parts

    def resolve(self, reference: Any, path: str) -> Any:
        """Return what a reference names."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise ValueError(f"json_schema ({path}: {reference}) must refer to a place in this schema: #/...")
        place: Any = self.root
        for step in reference[2:].split("/") if reference != "#" else []:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(place, list) and step.isdigit() and int(step) < len(place):
                place = place[int(step)]
            elif isinstance(place, dict) and step in place:
                place = place[step]
            else:
                raise ValueError(f"json_schema ({path}: {reference}) must refer to something that is there")
        return place


def merge(left: Schema, right: Schema, path: str) -> Schema | None:
    """Return the flat schema that asks for what both ask for; None if nothing can meet it.

    PAPER: the meaning of allOf, [1].
    PAPER CONTEXT: Most engines refuse allOf, or take one of its parts and hope.
    INTUITION: Of two deadlines the earlier counts, of two guest lists the names on both.
    IMPLEMENTATION: Keyword by keyword. Where additionalProperties of one side would have to judge the
        properties of the other, the keyword's meaning is not local any more, and we refuse. ValueError.
    WHY: A schema tool writes allOf with one $ref for every annotated field, so it must work.
    """
    for one, other in ((left, right), (right, left)):
        foreign = set(_names(other)) - set(_names(one))
        if one.get("additionalProperties", True) is not True and foreign:
            raise ValueError(
                f"json_schema ({path}) must not have additionalProperties beside other parts' properties"
            )
    merged = dict(left)
    for keyword, value in right.items():
        if keyword not in merged:
            merged[keyword] = value
            continue
        mine = merged[keyword]
        if _text(mine) == _text(value):
            continue
        try:
            both = _together(keyword, mine, value, path)
        except (TypeError, AttributeError):
            raise ValueError(f"json_schema ({path}/{keyword}) must have values of the right kind") from None
        if both is None:
            return None
        merged[keyword] = both
    if {"const", "enum"} <= merged.keys():
        if not isinstance(merged["enum"], list):
            raise ValueError(f"json_schema ({path}/enum) must be a list")
        if not _common([merged["const"]], merged["enum"]):
            return None
    return merged


def _names(schema: Schema) -> list[str]:
    properties = schema.get("properties", {})
    return list(properties) if isinstance(properties, dict) else []


def _together(keyword: str, left: Any, right: Any, path: str) -> Any:
    """Return the value of a keyword that both sides have, or None."""
    if keyword in LARGEST:
        return max(left, right)
    if keyword in SMALLEST:
        return min(left, right)
    if keyword == "type":
        return _common_types(left, right) or None
    if keyword == "enum":
        return _common(left, right) or None
    if keyword == "const":
        return None
    if keyword == "required":
        return list(dict.fromkeys([*left, *right]))
    if keyword == "pattern":
        patterns = [[side] if isinstance(side, str) else side for side in (left, right)]
        return [*patterns[0], *patterns[1]]
    if keyword in ("properties", "patternProperties"):
        shared = {name: {"allOf": [left[name], right[name]]} for name in left.keys() & right.keys()}
        return {name: shared.get(name, schema) for name, schema in {**left, **right}.items()}
    if keyword in NESTED:
        return {"allOf": [left, right]}
    if keyword == "prefixItems" and len(left) == len(right):
        return [{"allOf": [a, b]} for a, b in zip(left, right, strict=True)]
    raise ValueError(f"json_schema ({path}/{keyword}) must not be said twice in different ways")


def _common_types(left: Any, right: Any) -> list[str]:
    left, right = ([side] if isinstance(side, str) else side for side in (left, right))
    found = [kind for kind in left if kind in right or (kind == "integer" and "number" in right)]
    return found + [kind for kind in right if kind == "integer" and "number" in left and kind not in found]


def _common(left: list[Any], right: list[Any]) -> list[Any]:
    """Return the values that are in both lists; 1 and True differ, as they do in JSON."""
    texts = {_text(value) for value in right}
    return [value for value in left if _text(value) in texts]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def check_exclusive(left: list[Schema], right: list[Schema], path: str) -> None:
    """Raise ValueError unless no value can satisfy a case of left and one of right."""
    for a in left:
        for b in right:
            try:
                certain = exclusive(a, b)
            except TypeError:  # a keyword whose value is of a wrong kind
                certain = False
            if not certain:
                rule = "must exclude each other, by type or by a constant; or say anyOf"
                raise ValueError(f"json_schema ({path}) {rule}")


def exclusive(left: Schema, right: Schema) -> bool:
    """Say whether two flat schemas certainly have no value in common."""
    if "type" in left and "type" in right and not _common_types(left["type"], right["type"]):
        return True
    constants = [_constants(side) for side in (left, right)]
    if None not in constants:
        return not _common(*constants)  # type: ignore[arg-type]
    if left.get("type") != "object" or right.get("type") != "object":
        return False
    shared = (
        set(left.get("required", [])) & set(right.get("required", [])) & {*_names(left)} & {*_names(right)}
    )
    for name in sorted(shared):  # a property that both must have, with values that cannot be the same
        pair = [side["properties"][name] for side in (left, right)]
        if all(
            isinstance(schema, dict) and not schema.keys() & {"$ref", "allOf", "anyOf", "oneOf"}
            for schema in pair
        ) and exclusive(*pair):
            return True
    return any(
        one.get("additionalProperties") is False
        and not one.get("patternProperties")
        and set(other.get("required", [])) - set(_names(one))
        for one, other in ((left, right), (right, left))
    )


def _constants(schema: Schema) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")
