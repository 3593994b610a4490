r"""One request: its settings, what was written, and all that must be remembered from token to token.

PAPERS
  [1] Efficient Guided Generation for Large Language Models, Willard & Louf, 2023, arXiv:2307.09702
  [2] Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity, Basu et al., 2020,
      arXiv:2007.14966
"""

import secrets
from collections.abc import Collection, Sequence

import numpy as np

from phase3_core_inference.project8_sampling.config import NEUTRAL, SamplingParams
from phase3_core_inference.project8_sampling.penalties import History
from phase3_core_inference.project8_sampling.stop_texts import StreamedText
from phase3_core_inference.project8_sampling.vocabulary import Vocabulary


class RequestState:
    """A request while it is being written; nothing in it belongs to the batch that it is in.

    PAPER: the state of a constraint, [1]; of mirostat, [2] Alg. 1; the rest is bookkeeping.
    PAPER CONTEXT: transformers keeps the state of sampling in objects for the whole batch; an engine whose
        batch changes at each step cannot.
    INTUITION: A bookmark: enough to go on from here, alone or in any company.
    IMPLEMENTATION: `append` takes the next token, whoever chose it, and moves everything that depends on
        the text: penalties, the constraint, stop texts. `finish_reason` is None until the last token:
        "stop" (a stop token or text, or the constraint is fulfilled), "length", or "error".
    WHY: The tokens of a request in a batch of 32 are those of the request alone, a test finds.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int] = (),
        vocabulary: Vocabulary | None = None,
        stop_tokens: Collection[int] = (),
    ) -> None:
        """Begin; `vocabulary` is needed for stop texts and constraints, `stop_tokens` end the text.

        Raises ValueError for settings that cannot work, such as a schema that is none.
        """
        params.validate_config()
        if vocabulary is None and (params.stop or params.regex is not None or params.json_schema is not None):
            raise ValueError("vocabulary (None) must be given for stop, regex and json_schema")
        self.params, self.prompt, self.output = params, list(prompt), list[int]()
        self.stop_tokens = frozenset(stop_tokens)
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.mu = 2 * params.mirostat_tau  # bits; what mirostat allows
        self.history = History(params, self.prompt)
        self.vocabulary = vocabulary
        self.streamed = StreamedText(params.stop)
        self.constraint = vocabulary.constraint(params) if vocabulary is not None else None
        if self.constraint is not None and self.constraint.needed > params.max_new_tokens:
            rule = f"must be at least {self.constraint.needed:.0f} for the shortest text of its constraint"
            raise ValueError(f"max_new_tokens ({params.max_new_tokens}) {rule}")
        self.finish_reason: str | None = None
        self.error = ""  # one sentence, if finish_reason is "error"
        self.row = np.array([params.temperature, *(getattr(params, name) for name in NEUTRAL)])

    @property
    def text(self) -> str:
        """The text so far, as far as it can be shown."""
        return self.streamed.text

    def banned(self) -> Collection[int]:
        """Return tokens that may not come next because the text is too short to end."""
        return self.stop_tokens if len(self.output) < self.params.min_new_tokens else ()

    def append(self, token: int) -> str:
        """Take the next token and return what can be shown of the text since the last."""
        if self.finish_reason:
            raise ValueError(f"token ({token}) must not come after the end ({self.finish_reason})")
        self.output.append(token)
        self.history.append(token)
        if token in self.stop_tokens:
            return self._finish("stop")
        shown = ""
        if self.vocabulary is not None:
            shown = self.streamed.add(self.vocabulary.token_bytes(token))
            if self.streamed.stopped:
                return shown + self._finish("stop")
        if self.constraint is not None:
            self.constraint.advance(token)
            if self.constraint.finished:
                return shown + self._finish("stop")
        if len(self.output) >= self.params.max_new_tokens:
            return shown + self._finish("length")
        return shown

    def fail(self, sentence: str) -> None:
        """End the request because of an error; its neighbours go on."""
        self.error = sentence
        self._finish("error")

    def _finish(self, reason: str) -> str:
        self.finish_reason = reason
        return self.streamed.finish()
