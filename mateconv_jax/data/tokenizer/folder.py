"""What belongs in a tokenizer's folder. (Without transformers, whose import takes 2 s.)"""

from pathlib import Path

FILES = {
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
}  # fmt: skip


def foreign_files(folder: Path) -> list[str]:
    """Names in a tokenizer's folder that transformers' `save_pretrained` does not write, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.name not in FILES)
