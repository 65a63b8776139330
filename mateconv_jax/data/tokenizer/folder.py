"""What belongs in a tokenizer's folder. (Without transformers, whose import takes 2 s.)"""

from pathlib import Path

FILES = {
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
}  # fmt: skip


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds tokenizer.json, or a SentencePiece or tiktoken model that transformers can convert."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def foreign_files(folder: Path) -> list[str]:
    """Names in a tokenizer's folder that transformers' `save_pretrained` does not write, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.name not in FILES)
