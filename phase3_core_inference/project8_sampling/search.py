"""Look for the text that scores best: beam search, diverse beam search, contrastive search.

uv run python phase3_core_inference/project8_sampling/search.py --model smollm2-135m --prompt "Hello!"
"""

from common.script import script
from phase1_foundation.project1_minimal_gpt.generate import stream_text
from phase3_core_inference.project8_sampling.beam_search import beam_search
from phase3_core_inference.project8_sampling.config import SearchConfig
from phase3_core_inference.project8_sampling.contrastive import contrastive_search
from phase3_core_inference.project8_sampling.generate import Writer


def run(config: SearchConfig) -> list[str]:
    """Search, print the texts with their scores, the best first, and return them."""
    writer = Writer(config.writer)
    ids = writer.prompt_ids(config.writer.prompt)
    if config.method == "contrastive":
        tokens = contrastive_search(
            writer.model, ids, config.max_new_tokens, config.alpha, config.top_k, writer.stop
        )
        pieces = []
        for piece in stream_text(writer.tokenizer, (token for token in tokens if token not in writer.stop)):  # type: ignore[arg-type]
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
        return ["".join(pieces)]
    found = beam_search(
        writer.model, ids, config.max_new_tokens, config.beams, writer.stop, config.length_penalty,
        config.early_stopping, config.groups, config.diversity if config.groups > 1 else 0.0,
    )  # fmt: skip
    texts = []
    for hypothesis in found:
        texts.append(writer.tokenizer.decode([t for t in hypothesis.tokens if t not in writer.stop]))
        group = f", group {hypothesis.group + 1}" if config.groups > 1 else ""
        print(f"--- score {hypothesis.score:.4f} nats per token{group}\n{texts[-1]}")
    return texts


@script
def main() -> None:
    """Parse and search."""
    run(SearchConfig.from_cli())


if __name__ == "__main__":
    main()
