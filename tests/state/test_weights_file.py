"""Which file says where the tensors are; pickled ones are refused with commands that convert them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from state.errors import InputError
from state.weights_file import weights_file


def test_the_tensors_themselves_before_an_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert weights_file(tmp_path) == "model.safetensors.index.json"
    (tmp_path / "model.safetensors").write_text("")
    assert weights_file(tmp_path) == "model.safetensors"


def test_neither(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_text("")
    with pytest.raises(InputError, match=r"has neither .* \(found: training_args\.bin\)"):
        weights_file(tmp_path)
    with pytest.raises(InputError, match="is not a model folder"):
        weights_file(tmp_path / "none")


def test_pickled_weights_are_converted_by_the_commands_given(tmp_path: Path) -> None:
    folder = tmp_path / "it's a model"
    folder.mkdir()
    shared = torch.arange(6.0).reshape(2, 3).half()
    first, second = {"a.weight": shared, "tied.weight": shared}, {"b.weight": shared.t()}
    torch.save(first, folder / "pytorch_model-00001-of-00002.bin")
    torch.save(second, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(InputError, match=r"pickled \.bin files alone") as refused:
        weights_file(folder)
    _, *commands = str(refused.value).splitlines()
    script = "\n".join(commands).replace("python -c", f"{sys.executable} -c")
    subprocess.run(["bash", "-ec", script], check=True)
    assert weights_file(folder) == "model.safetensors"
    found = load_file(folder / "model.safetensors")
    assert found.keys() == {"a.weight", "tied.weight", "b.weight"}
    assert found["a.weight"].equal(shared) and found["b.weight"].equal(shared.t())
