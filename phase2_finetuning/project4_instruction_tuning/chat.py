"""Talk to a tuned model: uv run python phase2_finetuning/project4_instruction_tuning/chat.py

It remembers what was said, until the oldest turns no longer fit. Lines can be piped in; an empty one ends it.
"""

from collections.abc import Callable
from typing import Any

from common.device import pick_device
from common.script import ask, one_line, script
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase1_foundation.project3_pretrain.generate import generate, print_text
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.config import MODEL, TRAIN_COMMAND, ChatConfig
from phase2_finetuning.project4_instruction_tuning.conversations import Conversation, Message
from phase2_finetuning.project4_instruction_tuning.templates import TEMPLATES, template_for


class Chat:
    """A conversation with a model, which `load` fetches by its name."""

    def __init__(self, config: ChatConfig, load: Callable[[str], tuple[Any, Tokenizer]] = load_model) -> None:
        if config.model == str(MODEL) and not MODEL.is_file():
            raise FileNotFoundError(f"there is no checkpoint {MODEL}; make it with: {TRAIN_COMMAND}")
        self.config = config
        self.model, self.tokenizer = load(config.model)
        self.model.to(pick_device(config.device))
        auto = config.template == "auto"
        self.template = template_for(self.tokenizer) if auto else TEMPLATES[config.template]
        self.stop = self.template.stop(self.tokenizer)
        self.opening: Conversation = [Message("system", config.system)] if config.system else []
        self.turns: Conversation = []  # after the opening: user and assistant in turn

    def prompt_ids(self, said: str) -> list[int]:
        """Return what the model is given, ready for its answer; turns that no longer fit are forgotten.

        ValueError if what is said does not fit even alone.
        """
        most = self.model.config.block_size - min(
            self.config.max_new_tokens, self.model.config.block_size // 2
        )
        while True:
            conversation = [*self.opening, *self.turns, Message("user", said)]
            ids, _ = self.template.encode(self.tokenizer, conversation, answer=True)
            if len(ids) <= most:
                return ids
            if not self.turns:
                raise ValueError(f"message ({len(ids)} tokens) must have at most {most} with its marks")
            del self.turns[:2]

    def say(self, said: str, seed: int) -> str:
        """Print the answer as it comes, and return it; it is part of what the next one is given."""
        if self.config.forget:
            self.turns.clear()
        config, ids = self.config, self.prompt_ids(said)
        how = (config.max_new_tokens, config.temperature, config.top_k, config.top_p, seed, self.stop)
        answer = print_text(self.tokenizer, generate(self.model, ids, *how))
        self.turns += [Message("user", said), Message("assistant", answer)]
        return answer


def run(config: ChatConfig) -> list[str]:
    """Answer the lines that are typed or piped in, and return the answers."""
    chat = Chat(config)
    answers = []
    for turn, said in enumerate(ask("you> ")):
        try:
            answers.append(chat.say(said, config.seed + turn))
        except ValueError as error:  # what is too long should not end the conversation
            print(f"error: {one_line(error)}")
    return answers


@script
def main() -> None:
    """Parse and talk."""
    run(ChatConfig.from_cli())


if __name__ == "__main__":
    main()
