r"""What the tokens of a vocabulary spell, as a trie, so that all of them can be tried at once.

PAPERS
  [1] Efficient Guided Generation for Large Language Models, Willard & Louf, 2023, arXiv:2307.09702
  [2] XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models,
      Dong et al., 2024, arXiv:2411.15100

SHAPES
  V  vocab_size    M  nodes of the trie
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np

from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase3_core_inference.project8_sampling.config import SamplingParams

if TYPE_CHECKING:
    from phase3_core_inference.project8_sampling.constraint import Constraint, ConstraintState

KEPT = 64  # compiled constraints
MOST_STATES = 50_000  # of an automaton, before it is made anew: it grows with every text that goes new ways


class Vocabulary:
    """The bytes of every token, and the constraints that were compiled for them.

    PAPER: tokens and automata, [1] Sec. 3; tokens in a tree, [2].
    PAPER CONTEXT: [1] tries each token of the vocabulary in each state of the automaton, beforehand. Most
        tokens share their beginnings: 49152 of them spell 300,000 bytes, but a tree of them has 100,000.
    INTUITION: To look up all words that begin with "th", one does not read the dictionary from A.
    IMPLEMENTATION: Special tokens spell nothing, and no constraint lets them through. Byte-level tokens may
        hold halves of characters; the tree is one of bytes, so that needs no care.
    WHY: Which tokens a state allows is one walk through the tree, in which a dead branch ends at once.
    """

    def __init__(self, tokens: Sequence[bytes | None], vocab_size: int | None = None) -> None:
        """Take the bytes of each token by id; None or b"" for special ones and ids without a token."""
        if vocab_size is not None and vocab_size < len(tokens):
            raise ValueError(f"vocab_size ({vocab_size}) must be at least the {len(tokens)} tokens")
        self.tokens = [token or b"" for token in tokens]
        self.tokens += [b""] * ((vocab_size or 0) - len(tokens))
        self._compiled: OrderedDict[tuple[str, str], Constraint] = OrderedDict()

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int | None = None) -> Self:
        """Return the vocabulary of a tokenizer, of a model with `vocab_size` tokens if it has more."""
        special = set(tokenizer.special_tokens.values())
        tokens: list[bytes] = []
        for i in range(tokenizer.vocab_size):
            try:
                tokens.append(b"" if i in special else tokenizer.decode_bytes([i]))
            except ValueError:  # an id without a token
                tokens.append(b"")
        return cls(tokens, vocab_size)

    @property
    def size(self) -> int:
        """How many ids there are."""
        return len(self.tokens)

    def token_bytes(self, token: int) -> bytes:
        """Return what a token spells; nothing for a special one."""
        return self.tokens[token] if 0 <= token < len(self.tokens) else b""

    def constraint(self, params: SamplingParams) -> "ConstraintState | None":
        """Return the state in which a request with these settings begins, if it is constrained at all.

        A pattern or schema is compiled once. Raises ValueError for one that is wrong or not supported.
        """
        from phase3_core_inference.project8_sampling.constraint import Constraint, ConstraintState

        kinds = {"regex": params.regex, "json_schema": params.json_schema}
        kind, source = next(((kind, text) for kind, text in kinds.items() if text is not None), ("", ""))
        if not kind:
            return None
        known = self._compiled.pop((kind, source), None)
        if known is None or len(known.automaton.nodes) > MOST_STATES:
            known = Constraint.compile(self, kind, source)
        self._compiled[kind, source] = known  # the last used come last
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return ConstraintState(known)

    @cached_property
    def trie(self) -> "Trie":
        """The tokens as a tree of bytes, made when it is first asked for."""
        return Trie(self.tokens)


class Trie:
    """A tree of bytes whose nodes lie level by level, so that a whole level is one operation of NumPy.

    PAPER: the tree as in [2]; level by level is ours.
    PAPER CONTEXT: Engines walk such a tree in C++ node by node; in Python that takes a tenth of a second.
    INTUITION: A choir singing a canon: each beat all voices take their next note together.
    IMPLEMENTATION: Nodes are numbered level by level, so the children of a node are neighbours: a first one
        and a number of them. Two tokens with the same bytes end in one node, so the ends are a list apart.
    WHY: With the nodes of a level side by side the walk costs some operations per level, not per node.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        parents, letters, ends = [-1], [-1], list[tuple[int, int]]()
        waiting = [(0, token, i) for i, token in enumerate(tokens) if token]
        depth = 0
        while waiting:  # all tokens move one byte on; sorted, so that children are neighbours
            waiting.sort(key=lambda entry: (entry[0], entry[1][depth]))
            further = []
            for node, token, i in waiting:
                if (parents[-1], letters[-1]) != (node, token[depth]):
                    parents.append(node)
                    letters.append(token[depth])
                child = len(parents) - 1
                if depth + 1 == len(token):
                    ends.append((child, i))
                else:
                    further.append((child, token, i))
            waiting, depth = further, depth + 1
        self.letters = np.array(letters, dtype=np.int64)  # (M,) the byte that leads to each node
        self.child_count = np.bincount(parents[1:], minlength=len(parents))
        self.first_child = 1 + np.cumsum(self.child_count) - self.child_count
        self.end_nodes, self.end_tokens = np.array(ends, dtype=np.int64).reshape(-1, 2).T

    def children(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return all children of some nodes, and for each which of the nodes is its parent."""
        count = self.child_count[nodes]
        families = np.repeat(np.arange(len(nodes)), count)
        starts = self.first_child[nodes] - (np.cumsum(count) - count)
        return starts[families] + np.arange(len(families)), families
