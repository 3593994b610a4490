"""Make a model and its adapter one model: uv run python phase2_finetuning/project5_lora/merge.py

The result is a checkpoint like any other: --model of every script, and export.py turns it into GGUF.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path

from common.checkpoints import save_checkpoint
from common.files import shown
from common.script import script
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer
from phase2_finetuning.project5_lora.adapters import lora_layers, unload, use_adapters
from phase2_finetuning.project5_lora.config import MergeConfig
from phase2_finetuning.project5_lora.tuning import load_tuned


def run(config: MergeConfig) -> Path:
    """Write the merged model and return its path."""
    model, tokenizer, names = load_tuned(config.model, config.adapters)
    if not lora_layers(model):
        raise ValueError(f"adapter ({config.adapters[0]}) must be low-rank: a prompt is no part of a matrix")
    use_adapters(model, *names)
    unload(model, merge=True)
    save_checkpoint(
        config.out,
        config=asdict(model.config),
        model_state_dict=model.state_dict(),
        tokenizer=tokenizer_text(tokenizer),
    )
    print(f"written to {shown(config.out)}: {config.model} with {' + '.join(names)} in its weights")
    export = "uv run python phase1_foundation/project3_pretrain/export.py"
    print(f"next: {export} --format gguf --model {shown(config.out)}")
    return config.out


def tokenizer_text(tokenizer: Tokenizer) -> str:
    """Return a tokenizer's file as text, as checkpoints keep it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(path)
        return path.read_text(encoding="utf-8")


@script
def main() -> None:
    """Parse and merge."""
    run(MergeConfig.from_cli())


if __name__ == "__main__":
    main()
