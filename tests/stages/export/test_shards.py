"""The bytes of a safetensors file."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from stages.export.shards import Assembly, Made, TensorSpec, digest_of_shard, in_file_order, index

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


def file_of(specs: list[TensorSpec], made: list[Made]) -> bytes:
    """What a disk holds once all parts are where they belong."""
    shard = Assembly(specs)
    file = bytearray(shard.nbytes)
    for start, data in shard.parts(made):
        file[start : start + len(data)] = data
    assert digest_of_shard(io.BytesIO(file), len(file)) == shard.digest()
    return bytes(file)


WHOLE = [Made(*item) for item in DATA.items()]


def test_the_whole_file() -> None:
    file = file_of([BYTE, FLOAT, HALF], WHOLE)
    head = (
        b'{"__metadata__":{"format":"pt"},"z.scale":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"a":{"dtype":"BF16","shape":[2,1],"data_offsets":[4,8]},'
        b'"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}'
    )
    head += b" " * (-len(head) % 8)
    assert file == len(head).to_bytes(8, "little") + head + b"\x00\x00\x80\x3f\x80\x3f\x00\x40\x01\x02\x03"


def test_the_reference_reader_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of([BYTE, FLOAT, HALF], WHOLE))
    with safe_open(path, "pt") as file:
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            "a": [[1.0], [2.0]],
            "b": [1, 2, 3],
            "z.scale": 1.0,
        }
        assert file.metadata() == {"format": "pt"}


def test_planned_and_made_bytes_must_agree() -> None:
    with pytest.raises(ValueError, match="b: 1 bytes fewer than were planned"):
        file_of([BYTE], [Made("b", b"\x01\x02")])
    with pytest.raises(ValueError, match="b: more bytes than were planned"):
        file_of([BYTE], [Made("b", b"\x01\x02"), Made("b", b"\x03\x04")])


def test_tensors_come_in_any_order_and_in_parts() -> None:
    parts = [Made("b", b"\x01"), Made("a", DATA["a"][:3]), Made("b", b"\x02\x03"), Made("a", DATA["a"][3:])]
    specs = [BYTE, FLOAT, HALF]
    assert file_of(specs, [*parts, Made("z.scale", DATA["z.scale"])]) == file_of(specs, WHOLE)


def test_a_flipped_bit_changes_the_digest_wherever_it_is() -> None:
    file = file_of([BYTE, FLOAT, HALF], WHOLE)
    known = digest_of_shard(io.BytesIO(file), len(file))
    for place in range(len(file)):
        broken = bytearray(file)
        broken[place] ^= 4
        try:
            found = digest_of_shard(io.BytesIO(broken), len(broken))
        except (ValueError, LookupError, TypeError, AttributeError):  # as `is_intact` has it
            continue
        assert found != known


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
