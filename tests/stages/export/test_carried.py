"""Which files of the source go along."""

from pathlib import Path

from stages.export.carried import carried_files

CARRIED = [
    "added_tokens.json",
    "chat_template.jinja",
    "custom_generate/generate.py",
    "generation_config.json",
    "modeling_own.py",
    "preprocessor_config.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "video_preprocessor_config.json",
]
LEFT = [
    "README.md",
    ".cache/huggingface/tokenizer.json.lock",
    ".gitattributes",
    "__pycache__/modeling_own.cpython-311.pyc",
    "config.json",
    "hf_quant_config.json",
    "holdfast_export.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "weights.GGUF",
]


def test_all_but_weights_records_and_hidden_files(tmp_path: Path) -> None:
    for name in (*CARRIED, *LEFT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert carried_files(tmp_path) == CARRIED
