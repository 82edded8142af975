"""The files that an export carries along from the source."""

from pathlib import Path

CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",
)
"""Files of the source folder that are copied byte for byte."""


def carried_files(folder: Path) -> list[str]:
    """Names, relative to the source folder, of the files to carry along; sorted."""
    found = {path for pattern in CARRIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found)
