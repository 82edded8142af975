import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from state.errors import IdentityMismatch, InputError
from state.identity import tensor_digest
from state.source import Source, TensorEntry

Header = dict[str, Any]


def entry(dtype: str, shape: list[int], start: int, end: int) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(path: Path, header: Header | str, data: bytes) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)
    return path.parent


def single(folder: Path, header: Header | str, data: bytes) -> Path:
    return write(folder / "model.safetensors", header, data)


def sharded(folder: Path, weight_map: Header) -> Path:
    """Shard 1 has `a` and shard 2 has `b`, 4 bytes each."""
    write(folder / "model-1.safetensors", {"a": entry("F32", [1], 0, 4)}, b"aaaa")
    write(folder / "model-2.safetensors", {"b": entry("F16", [2], 0, 4)}, b"bbbb")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


INDEX = {"a": "model-1.safetensors", "b": "model-2.safetensors"}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.zeros((0, 4), np.int64),
        "scalar": np.array(7, np.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = Source.open(tmp_path)
    assert list(source.tensors) == ["empty", "scalar", "w"]
    assert (source.tensors["w"].dtype, source.tensors["w"].shape) == ("F32", (2, 3))
    for name, values in tensors.items():
        assert bytes(source.read(name)) == values.tobytes()
    assert source.digests(threads=2) == {
        "empty": tensor_digest("I64", (0, 4), b""),
        "scalar": tensor_digest("U8", (), b"\x07"),
        "w": tensor_digest("F32", (2, 3), tensors["w"].tobytes()),
    }


def test_reading_is_mapped_and_read_only(tmp_path: Path) -> None:
    data = Source.open(single(tmp_path, {"a": entry("U8", [2], 0, 2)}, b"xy")).read("a")
    assert data.readonly and bytes(data) == b"xy"


def test_shards_by_index_and_resharding_keeps_the_digests(tmp_path: Path) -> None:
    source = Source.open(sharded(tmp_path / "two", INDEX))
    start = 8 + len(json.dumps({"a": entry("F32", [1], 0, 4)}))
    assert source.tensors["a"] == TensorEntry("a", "F32", (1,), "model-1.safetensors", start, 4)
    assert bytes(source.read("b")) == b"bbbb"

    header = {"b": entry("F16", [2], 0, 4), "a": entry("F32", [1], 4, 8), "__metadata__": {"x": "y"}}
    assert Source.open(single(tmp_path / "one", header, b"bbbbaaaa")).digests(1) == source.digests(2)


def test_sub_byte_dtypes(tmp_path: Path) -> None:
    source = Source.open(single(tmp_path, {"a": entry("F4", [2, 3], 0, 3)}, b"xyz"))
    assert source.tensors["a"].nbytes == 3


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    sharded(tmp_path, INDEX)
    single(tmp_path, {"c": entry("U8", [1], 0, 1)}, b"c")
    assert list(Source.open(tmp_path).tensors) == ["c"]


def test_no_such_tensor(tmp_path: Path) -> None:
    source = Source.open(single(tmp_path, {"a": entry("U8", [1], 0, 1)}, b"a"))
    with pytest.raises(InputError, match="has no tensor b"):
        source.read("b")


def test_a_file_that_was_only_touched_is_digested_again(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(4, dtype=np.float32)}, path)
    source = Source.open(tmp_path)
    time.sleep(0.02)  # file systems tell times by the tick
    path.chmod(0o600)
    with pytest.raises(IdentityMismatch):  # nothing was digested, so nothing tells
        source.require_unchanged()
    source = Source.open(tmp_path)
    source.digests(1)
    time.sleep(0.02)
    path.chmod(0o644)
    (tmp_path / "another name").hardlink_to(path)
    source.require_unchanged()
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(IdentityMismatch, match="has changed while it was worked from"):
        source.require_unchanged()


def test_bytes_are_compared_with_what_was_digested(tmp_path: Path) -> None:
    source = Source.open(single(tmp_path, {"a": entry("U8", [2], 0, 2)}, b"xy"))
    source.require_digested("a", b"zz")  # nothing was digested yet
    source.digests(threads=1)
    source.require_digested("a", b"xy")
    with pytest.raises(IdentityMismatch, match=r"model\.safetensors holds other bytes than when it was dig"):
        source.require_digested("a", b"xz")


GOOD = {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 4, 8)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (GOOD, b"1234567", "truncated"),
        (GOOD, b"123456789", "longer than its header says"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, b"123456", "b overlaps"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, b"1234", "overlaps"),
        ({"a": entry("F32", [1], 2, 6)}, b"123456", "a leaves a hole"),
        ({"a": entry("F32", [2], 0, 4)}, b"1234", r"a is F32\[2\], which does not take 4 bytes"),
        ({"a": entry("F32", [2**62, 2**62], 0, 4)}, b"1234", "does not take"),
        ({"a": entry("F33", [1], 0, 4)}, b"1234", "unknown dtype 'F33'"),
        ({"a": entry("F32", [-1], 0, 4)}, b"1234", "has shape"),
        ({"a": entry("F32", [1.0], 0, 4)}, b"1234", "has shape"),
        ({"a": entry("F32", [True], 0, 4)}, b"1234", "has shape"),
        ({"a": entry("F32", "1", 0, 4)}, b"1234", "has shape"),
        ({"a": entry("F32", [1], 4, 0)}, b"1234", "does not take -4"),
        ({"a": entry("F32", [1], -4, 0)}, b"1234", "has shape"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", "lacks"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234", "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234", "lacks"),
        ({"a": 3}, b"", "lacks"),
        ("[]", b"", "no JSON object"),
        ("{", b"", "malformed JSON"),
        (10_000 * "[", b"", "malformed JSON"),
        ('{"a": 1, "a": 2}', b"", "'a' is named twice"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Source.open(single(tmp_path, header, data))
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"1234567", struct.pack("<Q", 100), struct.pack("<Q", 2**63) + b"{}"])
def test_no_safetensors_file_at_all(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"is empty|truncated or no safetensors file"):
        Source.open(tmp_path)


def test_truncated_at_every_offset(tmp_path: Path) -> None:
    path = single(tmp_path, GOOD, b"12345678") / "model.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            Source.open(tmp_path)


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_changes_the_identity(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    path = single(folder, GOOD, b"12345678") / "model.safetensors"
    before = Source.open(folder).digests(1)
    whole = bytearray(path.read_bytes())
    whole[position % len(whole)] ^= 1 << bit
    path.write_bytes(whole)
    try:
        after = Source.open(folder).digests(1)
    except InputError:
        return
    assert after != before


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (INDEX | {"a": "../model-1.safetensors"}, "no file in the model folder"),
        (INDEX | {"a": "/etc/passwd"}, "no file in the model folder"),
        (INDEX | {"a": "x" * 5000}, "no file in the model folder"),
        (INDEX | {"a": "x\0y"}, "no file in the model folder"),
        (INDEX | {"a": 3}, "no file in the model folder"),
        (INDEX | {"a": "model-9.safetensors"}, "'model-9.safetensors', which is missing"),
        (
            INDEX | {"c": "model-1.safetensors"},
            "'c' is said to be in 'model-1.safetensors', which does not have",
        ),
        ({"a": "model-2.safetensors", "b": "model-2.safetensors"}, "'a' is said to be in 'model-2"),
        ({"a": "model-1.safetensors"}, None),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_contradicts_the_folder(tmp_path: Path, weight_map: Any, message: str | None) -> None:
    folder = sharded(tmp_path, weight_map)
    if message is None:
        # A shard that the index does not mention is not part of the model.
        assert list(Source.open(folder).tensors) == ["a"]
        return
    with pytest.raises(InputError, match=message):
        Source.open(folder)


def test_a_tensor_that_the_index_leaves_out_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path, INDEX)
    write(folder / "model-1.safetensors", GOOD, b"12345678")
    with pytest.raises(InputError, match=r"b is in both model-1.safetensors and model-2.safetensors"):
        Source.open(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(InputError, match=r"does not name b, which model-1.safetensors has"):
        Source.open(folder)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a model folder"):
        Source.open(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pickled \.bin files alone"):
        Source.open(tmp_path)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "a..b", "../x.weight", "a\nb", "a\x1b[2J", "a\x00", "x" * 201]
)
def test_odd_names_of_tensors_are_refused(tmp_path: Path, name: str) -> None:
    header = json.dumps({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(InputError, match="is no name for a tensor") as raised:
        Source.open(tmp_path)
    assert str(raised.value).replace(str(tmp_path), "").isprintable()
