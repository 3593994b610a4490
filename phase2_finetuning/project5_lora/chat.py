"""Talk to a model through its adapters: uv run python phase2_finetuning/project5_lora/chat.py

/use NAME changes the adapter in the middle of a conversation, /use NAME NAME adds two up, /use takes all off.
"""

from typing import Any

from common.script import ask, one_line, script
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase2_finetuning.project4_instruction_tuning import chat
from phase2_finetuning.project5_lora.adapters import active_adapters, use_adapters
from phase2_finetuning.project5_lora.config import ChatConfig
from phase2_finetuning.project5_lora.tuning import load_tuned


class Chat(chat.Chat):
    """A conversation with a model whose adapters can be changed."""

    def __init__(self, config: ChatConfig) -> None:
        self.names: list[str] = []

        def load(name: str) -> tuple[Any, Tokenizer]:
            model, tokenizer, self.names = load_tuned(name, config.adapters)
            return model, tokenizer

        super().__init__(config, load)

    def use(self, names: list[str]) -> str:
        """Change the adapters in use; return which they are now, and which could be."""
        use_adapters(self.model, *names)
        return f"in use: {', '.join(active_adapters(self.model)) or 'none'}; there: {', '.join(self.names)}"


def run(config: ChatConfig) -> list[str]:
    """Answer the lines that are typed or piped in, and return the answers."""
    talk, answers = Chat(config), []
    print(f"adapters: {', '.join(talk.names)}; /use NAME changes them, /use takes them off")
    for turn, said in enumerate(ask("you> ")):
        command, *names = said.split() or [""]
        try:
            if command == "/use":
                print(talk.use(names))
            else:
                answers.append(talk.say(said, config.seed + turn))
        except ValueError as error:  # a wrong name, or a line too long, should not end the conversation
            print(f"error: {one_line(error)}")
    return answers


@script
def main() -> None:
    """Parse and talk."""
    run(ChatConfig.from_cli())


if __name__ == "__main__":
    main()
