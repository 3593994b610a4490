r"""Constraints as masks of tokens: an automaton, its walk through the vocabulary, its state in a text.

PAPERS
  [1] Efficient Guided Generation for Large Language Models, Willard & Louf, 2023, arXiv:2307.09702
  [2] XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models,
      Dong et al., 2024, arXiv:2411.15100

SHAPES
  V  vocab_size    M  nodes of the trie of tokens    S  states found so far
"""

import math
import time
from collections import OrderedDict
from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from phase3_core_inference.project8_sampling.grammar import Grammar, Node
from phase3_core_inference.project8_sampling.json_schema import schema_grammar
from phase3_core_inference.project8_sampling.regex_syntax import parse_regex, utf8
from phase3_core_inference.project8_sampling.vocabulary import Vocabulary

Array = np.ndarray[Any, Any]
DEAD = 0  # the state from which nothing can be completed
MASKS = 1024  # masks that a constraint keeps, of a bit per token


class Mask(NamedTuple):
    """Which tokens may come next."""

    bits: Array  # (V / 8,) bytes: a bit is set if its token is forbidden
    furthest: float  # after these tokens the text can be completed in so many bytes, at most


class Automaton:
    """The states of a grammar, found as they are reached.

    PAPER: from a pattern to states, [1] Sec. 3; the states are derivatives (grammar.py).
    PAPER CONTEXT: Counters and nested rules make a machine that is built whole large, or endless.
    INTUITION: A map that is drawn on the way.
    IMPLEMENTATION: `table` (S, 256) has the next state for each byte; a row is filled when its state is
        first left. What cannot be completed any more is DEAD, so every state that lives has a way out,
        and `distance` knows how many bytes the shortest takes.
    WHY: A dead end that is found only when the model stands in it is too late.
    """

    def __init__(self, grammar: Grammar, start: Node) -> None:
        self.grammar = grammar
        self.nodes: list[Node] = [grammar.nothing]
        self.numbers = {grammar.nothing: DEAD}
        self.table = np.zeros((64, 256), dtype=np.int32)
        self.filled = np.zeros(64, dtype=bool)
        self.filled[DEAD] = True
        self.distance = np.full(64, math.inf)
        self.start = self.number(start)

    def number(self, node: Node) -> int:
        """Return the state of what is left to be written."""
        if node not in self.numbers:
            length = self.grammar.shortest(node)
            self.numbers[node] = DEAD if length == math.inf else len(self.nodes)
            if length < math.inf:
                if len(self.nodes) == len(self.table):
                    self.table = np.concatenate([self.table, np.zeros_like(self.table)])
                    self.filled = np.concatenate([self.filled, np.zeros_like(self.filled)])
                    self.distance = np.concatenate([self.distance, np.full_like(self.distance, math.inf)])
                self.distance[len(self.nodes)] = length
                self.nodes.append(node)
        return self.numbers[node]

    def fill(self, states: Array) -> None:
        """Make sure that the rows of these states are there."""
        for state in states[~self.filled[states]].tolist():
            for members, rest in self.grammar.derivatives(self.nodes[state]):
                number = self.number(rest)  # may move the table
                self.table[state, bytes_of(members)] = number
            self.filled[state] = True

    def step(self, state: int, data: bytes) -> int:
        """Return the state after some bytes."""
        for byte in data:
            if not self.filled[state]:
                self.fill(np.array([state]))
            state = int(self.table[state, byte])
        return state

    def accepts(self, state: int) -> bool:
        """Say whether the text may end here."""
        return bool(self.distance[state] == 0)

    def is_final(self, state: int) -> bool:
        """Say whether the text must end here."""
        self.fill(np.array([state]))
        return self.accepts(state) and not self.table[state].any()


def bytes_of(members: int) -> Array:
    """Return the bytes of a set as an array."""
    bits = np.frombuffer(members.to_bytes(32, "little"), dtype=np.uint8)
    return np.unpackbits(bits, bitorder="little").nonzero()[0]


class Constraint:
    """An automaton on a vocabulary.

    PAPER: which tokens a state allows, [1] Alg. 4; kept per state, as there.
    PAPER CONTEXT: [1] computes this for all states before the first token; with counters and nesting there
        are too many, and a text visits few of them. [2] finds most of it once per grammar, in C++.
    INTUITION: Spell all words of the dictionary at once, and strike out a branch at its first wrong letter.
    IMPLEMENTATION: Level by level through the trie, all nodes of a level in one step of NumPy; a token is
        allowed if the state at its end is not DEAD, wherever characters, strings or brackets begin and end
        inside of it. Masks are kept for the states that were seen last.
    WHY: A test compares with trying each token by itself, byte for byte.
    """

    def __init__(self, vocabulary: Vocabulary, grammar: Grammar, start: Node) -> None:
        began = time.perf_counter()
        if grammar.shortest(start) == math.inf:
            raise ValueError("constraint (empty) must be satisfied by some text")
        self.vocabulary, self.automaton = vocabulary, Automaton(grammar, start)
        self.masks: OrderedDict[int, Mask] = OrderedDict()
        self.seconds = time.perf_counter() - began  # that compiling took; masks come later

    @classmethod
    def compile(cls, vocabulary: Vocabulary, kind: str, source: str) -> Self:
        """Return the constraint of a regex or json_schema. Raises ValueError."""
        began, grammar = time.perf_counter(), Grammar()
        if kind == "regex":
            start = parse_regex(source, grammar, partial(utf8, grammar))
        else:
            start = schema_grammar(source, grammar)
        constraint = cls(vocabulary, grammar, start)
        constraint.seconds = time.perf_counter() - began
        return constraint

    def mask(self, state: int) -> Mask:
        """Return the mask of a state, as if there were room for any length; special tokens are forbidden."""
        if state in self.masks:
            self.masks.move_to_end(state)
            return self.masks[state]
        tokens, after = self.walk(state)
        furthest = float(self.automaton.distance[after].max(initial=0))
        self.masks[state] = Mask(np.packbits(self.all_but(tokens)), furthest)
        if len(self.masks) > MASKS:
            self.masks.popitem(last=False)
        return self.masks[state]

    def all_but(self, tokens: Array) -> Array:
        """Return flags (V,) that forbid all other tokens."""
        flags = np.ones(self.vocabulary.size, dtype=bool)
        flags[tokens] = False
        return flags

    def walk(self, state: int) -> tuple[Array, Array]:
        """Return the tokens that a state allows, and the state after each."""
        trie, automaton = self.vocabulary.trie, self.automaton
        reached = np.full(len(trie.letters), DEAD, dtype=np.int32)  # (M,)
        nodes, states = np.array([0]), np.array([state])
        while len(nodes):
            children, families = trie.children(nodes)
            if not len(children):
                break
            automaton.fill(np.unique(states))
            states = automaton.table[states[families], trie.letters[children]]
            alive = states != DEAD
            nodes, states = children[alive], states[alive]
            reached[nodes] = states
        after = reached[trie.end_nodes]
        return trie.end_tokens[after != DEAD], after[after != DEAD]


class ConstraintState:
    """Where one text stands in its constraint.

    PAPER: the running state, [1] Sec. 3.
    PAPER CONTEXT: A model that has to end by a number of tokens leaves half a document, valid or not.
    INTUITION: A speaker who sees the clock, and keeps enough time for the closing words.
    IMPLEMENTATION: `forbidden` lets only those tokens through after which the text can still be completed
        with the tokens that are left, a byte each. Stop tokens are allowed where the text may end.
    WHY: Whatever the model wants, what is written satisfies the schema, even at max_new_tokens.
    """

    def __init__(self, constraint: Constraint) -> None:
        self.constraint, self.state = constraint, constraint.automaton.start

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return self.constraint.automaton.is_final(self.state)

    @property
    def complete(self) -> bool:
        """Whether the text satisfies the constraint as it is."""
        return self.constraint.automaton.accepts(self.state)

    @property
    def needed(self) -> float:
        """How many bytes the shortest completion has."""
        return float(self.constraint.automaton.distance[self.state])

    def forbidden(self, left: int, stop_tokens: Collection[int] = ()) -> Tensor:
        """Return the tokens (V,) that must not come next, with `left` tokens to go."""
        bits, furthest = self.constraint.mask(self.state)
        if furthest <= left - 1:
            flags = np.unpackbits(bits, count=self.constraint.vocabulary.size).astype(bool)
        else:
            tokens, after = self.constraint.walk(self.state)
            near = self.constraint.automaton.distance[after] <= left - 1
            flags = self.constraint.all_but(tokens[near])
        if self.complete:
            flags[[token for token in stop_tokens if token < len(flags)]] = False
        return torch.from_numpy(flags)

    def advance(self, token: int) -> None:
        """Take the next token. Raises ValueError for one that is not allowed."""
        data = self.constraint.vocabulary.token_bytes(token)
        state = self.constraint.automaton.step(self.state, data)
        if not data or state == DEAD:
            raise ValueError(f"token ({token}: {data!r}) must be allowed by the constraint")
        self.state = state
