r"""Languages of bytes as expressions, and what is left of one after a byte: its derivative.

PAPERS
  [1] Derivatives of Regular Expressions, Brzozowski, 1964
  [2] Partial Derivatives of Regular Expressions and Finite Automaton Constructions, Antimirov, 1996
  [3] Regular-expression Derivatives Re-examined, Owens, Reppy & Turon, 2009

SYMBOLS
  bytes are sets of them, as integers of 256 bits: bit b is set if byte b is in
"""

import math
from collections.abc import Iterable
from functools import reduce

ALL_BYTES = 2**256 - 1
MOST_STATES = 100_000  # that the search for a shortest text looks at before it gives up


class Node:
    """An expression; equal ones of a grammar are one object, so that states can be compared by identity.

    PAPER: the operations are those of [1], which has "and" and "not" beside the usual three.
    PAPER CONTEXT: The usual way from a pattern to a machine, by way of a graph without a direction of
        reading, has neither "and" nor "not", nor rules that call themselves.
    INTUITION: A recipe, of which you can always ask: may it end here? What can come next, and then what?
    IMPLEMENTATION: `first` is the answer as pairs (set of bytes, what is left then), the linear form of
        [2]. It is found when asked for and kept. Made by the methods of a Grammar only.
    WHY: What is left is an expression again, with counters and calls unrolled as far as was read: states,
        stack and counters of a machine, without a machine.
    """

    __slots__ = ("first_pairs", "fixed", "kind", "nullable", "number", "parts", "shortest")

    def __init__(self, number: int, kind: str, parts: tuple, nullable: bool | None) -> None:
        self.number, self.kind, self.parts = number, kind, parts
        self.nullable = nullable  # whether the empty text is in; None: ask the rule
        self.first_pairs: list[tuple[int, Node]] | None = None
        self.shortest: float | None = None  # bytes of the shortest text; math.inf: there is none

    def __repr__(self) -> str:
        return f"{self.kind}{self.parts}"


class Grammar:
    """A set of rules, and the maker of all expressions in them.

    PAPER: that similar expressions must be one for derivatives to be finitely many, [1] and [3].
    PAPER CONTEXT: Derivatives were long thought to be of theory only. [3] shows that expressions in a
        normal form, each kept once, give small machines directly.
    INTUITION: A workshop that never builds the same part twice.
    IMPLEMENTATION: Alternatives are sets, sequences lean right, what can never match disappears. `rules`
        are looked up when a call is reached, so a rule may call itself once it has read a byte.
    WHY: JSON nests, so its machine needs a stack; here the stack is the sequence of what is left to do.
    """

    def __init__(self) -> None:
        self.rules: dict[str, Node] = {}
        self._known: dict[tuple, Node] = {}
        self.nothing = self._node("nothing", (), False)  # no text at all
        self.empty = self._node("empty", (), True)  # the empty text
        self.anything = self.complement(self.nothing)

    def _node(self, kind: str, parts: tuple, nullable: bool | None) -> Node:
        key = (kind, *(part.number if isinstance(part, Node) else part for part in parts))
        if key not in self._known:
            self._known[key] = Node(len(self._known), kind, parts, nullable)
        return self._known[key]

    # Making expressions

    def one_of(self, members: int) -> Node:
        """Return the texts of one byte of a set."""
        return self._node("byte", (members,), False) if members else self.nothing

    def span(self, low: int, high: int) -> Node:
        """Return the texts of one byte from low to high."""
        return self.one_of((1 << (high + 1)) - (1 << low))

    def text(self, data: bytes | str) -> Node:
        """Return one text."""
        data = data.encode() if isinstance(data, str) else data
        return self.sequence(*(self.one_of(1 << byte) for byte in data))

    def sequence(self, *parts: Node) -> Node:
        """Return the texts that are one of each part, one after the other."""
        return reduce(lambda tail, head: self._pair(head, tail), reversed(parts), self.empty)

    def _pair(self, head: Node, tail: Node) -> Node:
        if head is self.nothing or tail is self.nothing:
            return self.nothing
        if head is self.empty:
            return tail
        if tail is self.empty:
            return head
        if head.kind == "pair":
            return self._pair(head.parts[0], self._pair(head.parts[1], tail))
        return self._node("pair", (head, tail), _and(head.nullable, tail.nullable))

    def either(self, *parts: Node) -> Node:
        """Return the texts of any of the parts."""
        members: dict[Node, None] = {}
        for part in parts:
            members.update(dict.fromkeys(part.parts if part.kind == "either" else (part,)))
        members.pop(self.nothing, None)
        if self.anything in members:
            return self.anything
        if len(members) < 2:
            return next(iter(members), self.nothing)
        flags = [node.nullable for node in members]
        nullable = True if True in flags else None if None in flags else False
        return self._node("either", tuple(sorted(members, key=lambda node: node.number)), nullable)

    def repeat(self, part: Node, least: int = 0, most: int | None = None) -> Node:
        """Return the texts that are `least` to `most` texts of the part; None: any number."""
        if most is not None and most < least:
            return self.nothing
        if most == 0 or part is self.empty:
            return self.empty
        if part is self.nothing:
            return self.empty if least == 0 else self.nothing
        if (least, most) == (1, 1):
            return part
        if part.nullable:
            least = 0  # the empty text can stand for any of them
        return self._node("repeat", (part, least, most), True if least == 0 else part.nullable)

    def maybe(self, part: Node) -> Node:
        """Return the texts of the part, and the empty one."""
        return self.either(self.empty, part)

    def both(self, left: Node, right: Node) -> Node:
        """Return the texts that are in left and in right."""
        if left is right or right is self.anything:
            return left
        if left is self.anything:
            return right
        if self.nothing in (left, right):
            return self.nothing
        left, right = sorted((left, right), key=lambda node: node.number)
        return self._node("both", (left, right), _and(left.nullable, right.nullable))

    def complement(self, part: Node) -> Node:
        """Return all other texts; the part must not call rules that call themselves."""
        if part.kind == "not":
            return part.parts[0]
        return self._node("not", (part,), None if part.nullable is None else not part.nullable)

    def call(self, name: str) -> Node:
        """Return the texts of a rule, which may be made later."""
        return self._node("call", (name,), None)

    # Reading

    def is_nullable(self, node: Node) -> bool:
        """Say whether the empty text is in."""
        if node.nullable is None:
            parts = node.parts
            match node.kind:
                case "call":
                    node.nullable = self.is_nullable(self._rule(parts[0]))
                case "pair" | "both":
                    node.nullable = self.is_nullable(parts[0]) and self.is_nullable(parts[1])
                case "either":
                    node.nullable = any(map(self.is_nullable, parts))
                case "not":
                    node.nullable = not self.is_nullable(parts[0])
                case "repeat":
                    node.nullable = parts[1] == 0 or self.is_nullable(parts[0])
        return bool(node.nullable)

    def _rule(self, name: str) -> Node:
        if name not in self.rules:
            raise ValueError(f"rule ({name}) must be one of the grammar's {len(self.rules)}")
        return self.rules[name]

    def first(self, node: Node) -> list[tuple[int, Node]]:
        """Return which bytes a text can begin with, and what is left then; sets may overlap."""
        if node.first_pairs is None:
            merged: dict[Node, int] = {}
            for members, rest in self._first(node):
                merged[rest] = merged.get(rest, 0) | members
            merged.pop(self.nothing, None)
            node.first_pairs = [(members, rest) for rest, members in merged.items() if members]
        return node.first_pairs

    def _first(self, node: Node) -> Iterable[tuple[int, Node]]:
        parts = node.parts
        match node.kind:
            case "byte":
                yield parts[0], self.empty
            case "pair":
                head, tail = parts
                yield from ((members, self._pair(rest, tail)) for members, rest in self.first(head))
                if self.is_nullable(head):
                    yield from self.first(tail)
            case "either":
                for part in parts:
                    yield from self.first(part)
            case "repeat":
                part, least, most = parts
                again = self.repeat(part, max(0, least - 1), None if most is None else most - 1)
                yield from ((members, self._pair(rest, again)) for members, rest in self.first(part))
            case "call":
                yield from self.first(self._rule(parts[0]))
            case "both":
                for left, left_rest in self.first(parts[0]):
                    for right, right_rest in self.first(parts[1]):
                        if left & right:
                            yield left & right, self.both(left_rest, right_rest)
            case "not":
                covered = 0
                for members, rest in self.derivatives(parts[0]):
                    covered |= members
                    yield members, self.complement(rest)
                yield ALL_BYTES & ~covered, self.anything

    def derivatives(self, node: Node) -> list[tuple[int, Node]]:
        """Return the bytes that a text can begin with in disjoint sets, and all that is left after each.

        PAPER: derivatives, [1]; from the partial ones of [2].
        PAPER CONTEXT: The derivative of a language by a byte is what may follow that byte.
        INTUITION: Sort the bytes into heaps that lead to the same place.
        IMPLEMENTATION: Each set of `first` splits the heaps that it cuts.
        WHY: The next byte then leads to one state: the machine is deterministic, and states are few.
        """
        heaps: list[tuple[int, tuple[Node, ...]]] = []
        for members, rest in self.first(node):
            split: list[tuple[int, tuple[Node, ...]]] = []
            for heap, rests in heaps:
                if common := heap & members:
                    split.append((common, (*rests, rest)))
                    members &= ~heap
                if others := heap & ~common:
                    split.append((others, rests))
            heaps = [*split, (members, (rest,))] if members else split
        return [(heap, self.either(*rests)) for heap, rests in heaps]

    def accepts(self, node: Node, data: bytes) -> bool:
        """Say whether a text is in."""
        for byte in data:
            node = next((rest for heap, rest in self.derivatives(node) if heap >> byte & 1), self.nothing)
        return self.is_nullable(node)

    # Lengths

    def shortest(self, node: Node) -> float:
        """Return how many bytes the shortest text has; math.inf if there is none. All rules must be there."""
        if node.shortest is None:
            calls = [self.call(name) for name in self.rules]
            if any(call.shortest is None for call in calls):
                self._improve(calls)
            node.shortest = self._length(node)
        return node.shortest

    def _improve(self, calls: list[Node]) -> None:
        """Find the shortest text of every rule: begin with none, and improve until nothing improves."""
        for call in calls:
            call.shortest = math.inf
        changed = True
        while changed:
            changed = False
            for call in calls:
                length = self._length(self._rule(call.parts[0]))
                if length < (call.shortest or 0):
                    call.shortest, changed = length, True

    def _length(self, node: Node) -> float:
        total = 0.0
        while node.kind == "pair" and node.shortest is None:  # a loop: sequences can be long
            total += self._length(node.parts[0])
            node = node.parts[1]
        if node.shortest is not None:
            return total + node.shortest
        parts = node.parts
        match node.kind:
            case "nothing":
                return math.inf
            case "empty":
                return total
            case "byte":
                return total + 1
            case "either":
                return total + min(map(self._length, parts))
            case "repeat":
                return total + (parts[1] * self._length(parts[0]) if parts[1] else 0)
            case _:  # both, not
                return total + self._search(node)

    def _search(self, start: Node) -> float:
        """Return the length of the shortest text by looking at all texts of 0, 1, 2, ... bytes."""
        level, seen, steps = [start], {start}, 0
        best = math.inf
        while level and steps < best:
            following = []
            for node in level:
                if self.is_nullable(node):
                    best = min(best, steps)
                elif node.shortest is not None and node is not start:
                    best = min(best, steps + node.shortest)
                else:
                    following += [rest for _, rest in self.first(node) if rest not in seen]
                    seen.update(following)
            if len(seen) > MOST_STATES:
                raise ValueError(f"grammar ({len(seen)} states) must be simpler to find its shortest text")
            level, steps = following, steps + 1
        return best


def _and(left: bool | None, right: bool | None) -> bool | None:
    """Return left and right, of which None is not known yet."""
    return False if False in (left, right) else None if None in (left, right) else True
