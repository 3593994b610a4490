r"""Whose turn it is: a counter of the service that each client has had.

PAPERS
  [1] Fairness in Serving Large Language Models, Sheng et al., 2024, arXiv:2401.00588

SYMBOLS (code = [1])
  prompt_weight = w_p, output_weight = w_q  cost of a token read, and of one written
  counters      = c_i                       of client i
"""

from collections.abc import Collection


class VirtualTokenCounter:
    """Serve next the client that has been served least, and give nobody credit for having been away.

    PAPER: [1] Algorithm 2.
    PAPER CONTEXT: First come, first served lets one client with a thousand requests shut out all others; a
        limit of requests per minute wastes what nobody else uses. Fair queueing of networks knows a packet's
        length; that of an answer is known when it is over.
    INTUITION: A tab for each guest, and the next dish goes to the shortest one. Who comes late starts from
        the shortest tab in the room, not from zero: waiting at home earns nothing.
    IMPLEMENTATION: A prompt is charged when it is admitted, each token of the answer when it is written. A
        client that had nothing waiting is lifted to the least counter of those who wait, or, if nobody does,
        to that of the last one who left. Nothing is charged twice for a text that had to be computed again.
    WHY: While two clients both wait their service differs by a bounded amount, as [1] proves; a test
        floods the engine from one side and measures the difference.
    """

    def __init__(self, prompt_weight: float = 1.0, output_weight: float = 2.0) -> None:
        self.prompt_weight, self.output_weight = prompt_weight, output_weight
        self.counters: dict[str, float] = {}
        self.last_left = ""  # the client of the last request that left the queue

    def arrive(self, client: str, waiting: Collection[str]) -> None:
        """Note a request of a client, before it joins a queue of requests of these clients."""
        counter = self.counters.setdefault(client, 0.0)
        if client in waiting:
            return
        if waiting:
            least = min(self.counters[other] for other in waiting)
        else:
            least = self.counters.get(self.last_left, 0.0)
        self.counters[client] = max(counter, least)

    def admit(self, client: str, prompt_tokens: int) -> None:
        """Charge a prompt that leaves the queue."""
        self.counters[client] += self.prompt_weight * prompt_tokens
        self.last_left = client

    def write(self, client: str, tokens: int = 1) -> None:
        """Charge tokens written."""
        self.counters[client] += self.output_weight * tokens
