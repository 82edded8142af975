"""The folders that the writer makes are those that transformers' own loader expects of the hub."""

import fnmatch
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.families.catalogue import FAMILIES
from tests.families.write import write_family


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_of_the_class_is_written_and_nothing_else(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]()
    weights = write_family(family, tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("quantization_config", None)
    (tmp_path / "config.json").write_text(json.dumps(config))

    built = getattr(transformers, family.config["architectures"][0])
    model, info = built.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)

    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not [
        key for key in info["unexpected_keys"] if not any(fnmatch.fnmatchcase(key, p) for p in family.unbuilt)
    ]
    if not family.runs:
        return
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 33)[None], use_cache=False).logits
    assert torch.isfinite(logits).all()
