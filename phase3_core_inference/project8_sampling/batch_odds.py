r"""The odds of a batch whose rows want different things, and a draw from each, sorting only what is needed.

PAPERS
  [1] Non-Uniform Random Variate Generation, Devroye, 1986 (inversion: chapter 2)

SHAPES
  R  rows, one request each      N  blocks of a row, each of BLOCK tokens
  V  vocab_size                  W  N * BLOCK, V rounded up    K  tokens ranked
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phase3_core_inference.project8_sampling.config import NEUTRAL
from phase3_core_inference.project8_sampling.penalties import apply_penalties
from phase3_core_inference.project8_sampling.state import RequestState
from phase3_core_inference.project8_sampling.truncation import (
    Ranked,
    falling,
    kept_interval,
    spread,
    truncate,
)
from phase3_core_inference.project8_sampling.watermark import green_tokens

Array = np.ndarray[Any, Any]
BLOCK = 32  # neighbouring tokens that are summed and searched as one
RANKED = 64  # tokens of a row that are ranked at first
DEEPER = 512  # tokens, at least, for rows that need more; for those that need still more, all


class BatchOdds:
    """The logits of a batch after penalties, constraints and temperature, and what is drawn from them.

    PAPER: drawing by inverting the cumulative odds, [1].
    PAPER CONTEXT: The plain way sorts each row and sums it up: for 32 rows of 49152 logits that takes longer
        than some models take to make them. But a draw looks at few tokens.
    INTUITION: Ask each shelf for its best book first, then open the best shelves only.
    IMPLEMENTATION: Of blocks of 32 logits only the maxima are ranked: the k largest logits are in the k
        blocks with the largest maxima. truncation.py decides by the first 64 logits; a row for which they
        do not suffice is ranked deeper, alone. A row that nothing is cut from is drawn in two steps, block
        and token. Odds are added up in the order of token ids, so ties and batch mates change nothing.
        What has V numbers stays on the device; what has 64 goes to NumPy.
    WHY: Tests hold the odds to the plain way (`warp`); benchmark.py holds the time to a decode step.
    """

    def __init__(self, logits: Tensor, states: Sequence[RequestState], space: Tensor | None = None) -> None:
        """Take the logits (R, V) of requests, which stay as they are, and `space_for` them to work in."""
        R, V = logits.shape
        self.space = space_for(logits) if space is None else space
        if len(states) != R:
            raise ValueError(f"states ({len(states)}) must be as many as the rows of logits ({R})")
        self.states, self.device, self.vocab_size = states, logits.device, V
        table = np.stack([state.row for state in states])  # (R, 1 + settings)
        self.greedy = table[:, 0] == 0
        self.settings = dict(zip(NEUTRAL, np.split(table[:, 1:], len(NEUTRAL), axis=1), strict=True))
        self.on = {name: self.settings[name][:, 0] != neutral for name, neutral in NEUTRAL.items()}  # (R,)
        if self.on["mirostat"].any():
            mu = np.array([[state.mu] for state in states])
            self.settings["mirostat"] = np.hstack([self.settings["mirostat"], mu, np.full((R, 1), V)])
        self.problems: dict[int, str] = {}  # of rows, in a sentence
        self.scaled = self._scale(logits, 1 / np.where(self.greedy, 1, table[:, 0]))
        self.maxima = self.scaled.view(R, -1, BLOCK).amax(dim=2)  # (R, N)
        self.top = self.maxima.amax(dim=1, keepdim=True)  # (R, 1)
        self.good = self.top.squeeze(1).isfinite().cpu().numpy()  # amax hands a NaN on
        self.mass, self.entropy, self.sigma = np.zeros((3, R, 1))  # of rows whose rules ask for them

    def _scale(self, logits: Tensor, scales: Array) -> Tensor:
        """Return the logits (R, W) over the temperature, after all that depends on the request's text."""
        V, states, scaled = self.vocab_size, self.states, self.space[0]
        torch.mul(logits, torch.from_numpy(scales).to(scaled)[:, None], out=scaled[:, :V])
        scaled[:, V:] = -math.inf
        apply_penalties(scaled, V, [s.history for s in states], scales, [s.banned() for s in states])
        for row, state in enumerate(states):
            params, text = state.params, (*state.prompt[-1:], *state.output[-1:])
            if params.watermark and text:  # the first of all tokens has no colour
                green = green_tokens(text[-1], V, params.watermark_share, params.watermark_key)
                more = scaled.new_full(green.shape, params.watermark * scales[row])
                scaled[row].index_add_(0, green.to(self.device), more)
            if state.constraint is not None:
                self._constrain(scaled[row], row, state)
        return scaled

    def _constrain(self, scaled: Tensor, row: int, state: RequestState) -> None:
        """Take out of a row (W,) what its constraint forbids."""
        left = state.params.max_new_tokens - len(state.output)
        try:
            forbidden = state.constraint.forbidden(left, state.stop_tokens)  # type: ignore[union-attr]
        except ValueError as error:  # a grammar that turns out too large must not hurt the neighbours
            self.problems[row] = str(error)
            forbidden = torch.ones(0, dtype=torch.bool)
        scaled[: len(forbidden)].masked_fill_(forbidden.to(self.device), -math.inf)
        scaled[len(forbidden) :] = -math.inf

    # Drawing

    def draw(self, uniforms: Sequence[float]) -> Array:
        """Return a token for each row (R,) by a number in [0, 1) for each; -1 where there is none to draw."""
        u = np.array(uniforms)[:, None]
        tokens = np.full(len(u), -1)
        if (rows := self.good & self.greedy).any():
            tokens[rows] = self._likeliest(self._index(rows))
        drawing = self.good & ~self.greedy
        cutting = drawing & np.any(list(self.on.values()), axis=0)
        odds = self._sum_up(drawing, plain := drawing & ~cutting)
        if plain.any():
            tokens[plain] = draw_from_all(odds, u[plain])
        if cutting.any():
            rows = cutting.nonzero()[0]
            values, ids = self.rank(rows, RANKED)
            ranked = self._ranked(rows, values)
            sure = ~truncate(ranked, self._settings(rows))
            tokens[rows[sure]] = draw_from_head(ranked.weights[sure], ids[sure], u[rows[sure]])
            if len(rows := rows[~sure]):
                tokens[rows], sure = self._draw_deeper(rows, u[rows])
                rows = rows[~sure]
            if len(rows):
                tokens[rows] = draw_from_all(self.odds_of(rows), u[rows])
        return tokens

    def _draw_deeper(self, rows: Array, u: Array) -> tuple[Array, Array]:
        """Return tokens (R',) of rows by ranking more of their logits, and for which rows that sufficed.

        At least as many logits as blocks are not below the least of these blocks' maxima: one comparison
        finds them, in the order of their ids.
        """
        index = self._index(rows)
        maxima = self.maxima[index]
        least = maxima.topk(min(DEEPER, maxima.shape[1])).values[:, -1:]
        scaled = self.scaled[index]
        places = (scaled >= least).nonzero(as_tuple=True)
        found = scaled[places].cpu().numpy()
        row, ids = (part.cpu().numpy() for part in places)
        count = np.bincount(row, minlength=len(rows))
        place = np.arange(len(row)) - np.repeat(count.cumsum() - count, count)
        values, tokens = (
            np.full((len(rows), count.max()), -np.inf),
            np.zeros((len(rows), count.max()), np.int64),
        )
        values[row, place], tokens[row, place] = found, ids
        ranked = self._ranked(rows, np.sort(values, axis=1)[:, ::-1][:, : count.min()])
        sure = ~truncate(ranked, self._settings(rows))
        low, high = kept_interval(ranked)
        weights = np.exp(values - values.max(axis=1, keepdims=True)) * ((values >= low) & (values <= high))
        return np.take_along_axis(tokens, pass_point(weights, u)[0], axis=1)[:, 0], sure

    def odds_of(self, rows: Array) -> Tensor:
        """Return the odds (R', W) of rows, by ranking all of their tokens."""
        scaled = self.scaled[self._index(rows)]
        ranked = self._ranked(rows, falling(scaled))
        truncate(ranked, self._settings(rows))
        low, high = (torch.from_numpy(bound).to(scaled) for bound in kept_interval(ranked))
        return scaled.masked_fill_((scaled < low) | (scaled > high), -math.inf).softmax(dim=1)

    def odds(self) -> Tensor:
        """Return the odds (R, W) of all rows; zeros for a row without a token to draw."""
        drawing = self.good & ~self.greedy
        self._sum_up(drawing, np.zeros_like(drawing))
        odds = torch.zeros_like(self.scaled)
        if len(rows := drawing.nonzero()[0]):
            odds[self._index(rows)] = self.odds_of(rows)
        if (rows := self.good & self.greedy).any():
            odds[rows.nonzero()[0], self._likeliest(self._index(rows))] = 1
        return odds

    def surprise(self, row: int, token: int) -> float:
        """Return the bits that a token told, before anything was cut; of a row with mirostat."""
        nats = math.log(self.mass[row, 0]) + float(
            self.top[row, 0].double() - self.scaled[row, token].double()
        )
        return nats / math.log(2)

    # What the rules must know

    def rank(self, rows: Array, number: int) -> tuple[Array, Array]:
        """Return the `number` largest logits (R', K) of rows, falling, as float64, and their ids."""
        index = self._index(rows)
        maxima = self.maxima[index]
        N = maxima.shape[1]
        blocks = maxima.topk(min(number, N), sorted=False).indices  # (R', n)
        inside = self.scaled.view(-1, BLOCK)[blocks + index[:, None] * N].flatten(1)  # (R', n * BLOCK)
        values, places = inside.topk(min(number, inside.shape[1]))
        ids = blocks.gather(1, places // BLOCK) * BLOCK + places % BLOCK
        return values.cpu().numpy().astype(np.float64), ids.cpu().numpy()

    def _ranked(self, rows: Array, values: Array) -> Ranked:
        return Ranked.of(values, self.mass[rows], self.entropy[rows], self.sigma[rows])

    def _settings(self, rows: Array) -> dict[str, Array]:
        return {name: column[rows] for name, column in self.settings.items()}

    def _sum_up(self, rows: Array, plain: Array) -> Tensor:
        """Sum up the rows whose first rule asks for the weight, entropy or spread of all tokens.

        Return the odds (R', W) of the `plain` rows, which no rule cuts.
        """
        on = self.on
        if (spreading := rows & on["top_n_sigma"]).any():
            scaled = self.scaled[self._index(spreading), : self.vocab_size]
            self.sigma[spreading] = spread(scaled).double().cpu().numpy()
        needless = on["top_n_sigma"] | on["top_k"] | (on["min_p"] & ~on["top_p"])
        summing = rows & ~needless
        if not summing.any():
            return self.scaled[:0]
        most = 2 * summing.sum() > len(rows)  # then copying them takes longer than summing all
        scaled = self.scaled if most else self.scaled[self._index(summing)]
        place = np.arange(len(rows)) if most else summing.cumsum() - 1  # of each row in odds
        odds = torch.softmax(scaled, dim=1, out=self.space[1, : len(scaled)])
        largest = odds.amax(dim=1, keepdim=True).double().cpu().numpy()
        self.mass[summing] = 1 / largest[place[summing]]
        asking = summing & (on["typical_p"] | on["eta"])
        if asking.any():
            index = self._index(place[asking])
            below_top = (scaled[index] - self.top[self._index(asking)]).clamp_min_(-1e9)  # 0 * -inf is NaN
            mean = torch.linalg.vecdot(odds[index], below_top).double().cpu().numpy()
            self.entropy[asking] = np.log(self.mass[asking]) - mean[:, None]
        return odds[self._index(place[plain])]

    def _likeliest(self, rows: Tensor) -> Array:
        """Return the likeliest token of each of these rows (R',), of several the one with the smallest id."""
        block = self.maxima[rows].argmax(dim=1)
        inside = self.scaled.view(len(self.maxima), -1, BLOCK)[rows, block]
        return (block * BLOCK + inside.argmax(dim=1)).cpu().numpy()

    def _index(self, rows: Array) -> Tensor:
        """Return row numbers, or flags of rows, as an index on the device."""
        return torch.from_numpy(rows.nonzero()[0] if rows.dtype == bool else rows).to(self.device)


def space_for(logits: Tensor, space: Tensor | None = None) -> Tensor:
    """Return room (2, R, W) for rows of logits (R, V): what is there, if it fits: new memory costs time."""
    R, V = logits.shape
    shape = (2, R, -(-V // BLOCK) * BLOCK)
    if space is not None and space.shape == shape and space.device == logits.device:
        return space
    with torch.inference_mode(False):  # else it could not be written to outside of that mode
        return torch.empty(shape, device=logits.device)


def draw_from_head(weights: Array, ids: Array, u: Array) -> Array:
    """Return the token (R',) at which the cumulative weights (R', K) of tokens `ids` pass u (R', 1)."""
    order = ids.argsort(axis=1)
    place, _ = pass_point(np.take_along_axis(weights, order, axis=1), u)
    return np.take_along_axis(ids, np.take_along_axis(order, place, axis=1), axis=1)[:, 0]


def draw_from_all(odds: Tensor, u: Array) -> Array:
    """Return the token (R',) at which the cumulative odds (R', W) pass u (R', 1): its block, then itself."""
    blocks = odds.view(len(odds), -1, BLOCK)
    block, left = pass_point(blocks.sum(dim=2).cpu().numpy().astype(np.float64), u)
    index = torch.from_numpy(block[:, 0]).to(odds.device)
    inside = blocks[torch.arange(len(odds), device=odds.device), index].cpu().numpy()
    place, _ = pass_point(inside.astype(np.float64), left)
    return (block * BLOCK + place)[:, 0]


def pass_point(weights: Array, u: Array) -> tuple[Array, Array]:
    """Return where (R, 1) the cumulative weights (R, K) pass the share u, and the share left of that weight.

    Rounding must lead neither past the last nor to a token of weight 0.
    """
    cumulative = weights.cumsum(axis=1)
    target = u * cumulative[:, -1:]
    place = (cumulative <= target).sum(axis=1, keepdims=True)
    last = weights.shape[1] - 1 - (weights[:, ::-1] > 0).argmax(axis=1, keepdims=True)
    place = np.minimum(place, last)
    weight = np.take_along_axis(weights, place, axis=1)
    share = (target - (np.take_along_axis(cumulative, place, axis=1) - weight)) / weight
    return place, share.clip(0, 1)
