"""The bytes of a safetensors file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from stages.export.shards import TensorSpec, encode, in_file_order, index

BYTE = TensorSpec("b", "U8", (3,))
FLOAT = TensorSpec("z.scale", "F32", ())
HALF = TensorSpec("a", "BF16", (2, 1))
DATA = {"b": b"\x01\x02\x03", "z.scale": b"\x00\x00\x80\x3f", "a": b"\x80\x3f\x00\x40"}


def test_wide_dtypes_come_first_and_names_are_sorted() -> None:
    assert [spec.name for spec in in_file_order([BYTE, HALF, FLOAT, TensorSpec("c", "F32", (1,))])] == [
        "c",
        "z.scale",
        "a",
        "b",
    ]


def test_the_whole_file() -> None:
    file = encode([BYTE, FLOAT, HALF], lambda spec: DATA[spec.name])
    head = (
        b'{"__metadata__":{"format":"pt"},"z.scale":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"a":{"dtype":"BF16","shape":[2,1],"data_offsets":[4,8]},'
        b'"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}'
    )
    head += b" " * (-len(head) % 8)
    assert (
        bytes(file)
        == len(head).to_bytes(8, "little") + head + b"\x00\x00\x80\x3f\x80\x3f\x00\x40\x01\x02\x03"
    )


def test_the_reference_reader_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode([BYTE, FLOAT, HALF], lambda spec: DATA[spec.name]))
    with safe_open(path, "pt") as file:
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            "a": [[1.0], [2.0]],
            "b": [1, 2, 3],
            "z.scale": 1.0,
        }
        assert file.metadata() == {"format": "pt"}


def test_planned_and_made_bytes_must_agree() -> None:
    with pytest.raises(ValueError, match="b: 2 bytes where 3 were planned"):
        encode([BYTE], lambda _: b"\x01\x02")


def test_index() -> None:
    content = json.loads(
        index([("model-00001-of-00002.safetensors", [HALF]), ("model-00002-of-00002.safetensors", [BYTE])])
    )
    assert content == {
        "metadata": {"total_size": 7},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }


def test_writing_shards_needs_no_torch() -> None:
    code = "import sys, stages.export.shards, stages.export.folder; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode
        == 0
    )
