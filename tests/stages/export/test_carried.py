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
    "onnx/model.onnx_data_1",
    "original/consolidated.00.pth",
    "params.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "weights.GGUF",
]


def test_what_lies_inside_and_is_something_of_its_own(tmp_path: Path) -> None:
    for name in (
        "tokenizer.json",
        "runs/a/HEAD",
        "runs/a/run.json",
        "begun/notes.txt",
        "out/tokenizer.json",
        "out.partial/holdfast_partial.json",
        "out.partial/tokenizer.json",
        "quantized/config.json",
        "quantized/tokenizer.json",
        "env/pyvenv.cfg",
        "env/lib/x.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    apart = (tmp_path / "begun", tmp_path / "out")
    assert carried_files(tmp_path, apart) == ["tokenizer.json"]


def test_all_but_weights_records_and_hidden_files(tmp_path: Path) -> None:
    for name in (*CARRIED, *LEFT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert carried_files(tmp_path) == CARRIED
