"""Say whether a text bears a watermark: uv run python phase3_core_inference/project8_sampling/detect.py"""

from common.script import ask, one_line, script
from phase3_core_inference.project8_sampling.config import DetectConfig
from phase3_core_inference.project8_sampling.generate import load_tokenizer_of
from phase3_core_inference.project8_sampling.watermark import Detection, detect


def run(config: DetectConfig) -> list[Detection]:
    """Print and return what is found in the text, or in each line that is typed."""
    tokenizer, vocab_size = load_tokenizer_of(config.model)
    found = []
    for text in [config.text] if config.text else ask("text> "):
        tokens = tokenizer.encode(text)
        try:
            found.append(detect(tokens, vocab_size, config.watermark_share, config.watermark_key))
        except ValueError as error:
            if config.text:
                raise
            print(f"error: {one_line(error)}")
            continue
        last = found[-1]
        verdict = "bears the watermark" if last.z > 4 else "shows no watermark"
        print(
            f"{last.green} of {last.scored} tokens are green, z = {last.z:.2f}, p = {last.p_value:.2g}: "
            f"{verdict}"
        )
    return found


@script
def main() -> None:
    """Parse and detect."""
    run(DetectConfig.from_cli())


if __name__ == "__main__":
    main()
