"""The demo's model and text."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.demo import DEAD_CHANNEL, UNREACHED_EXPERT, make_demo


def test_the_same_bytes_every_time(demo: Path, tmp_path: Path) -> None:
    make_demo(tmp_path)
    names = sorted(str(path.relative_to(demo)) for path in demo.rglob("*") if path.is_file())
    assert names == [
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "text.jsonl",
    ]
    for name in names:
        assert (tmp_path / name).read_bytes() == (demo / name).read_bytes(), name


def test_one_expert_is_out_of_reach_and_one_channel_dead(demo: Path) -> None:
    weights = load_file(demo / "model" / "model.safetensors")
    layer, expert = UNREACHED_EXPERT
    router = weights[f"model.layers.{layer}.mlp.gate.weight"]
    assert (router == 0).all(dim=1).nonzero().tolist() == [[expert]]
    layer, channel = DEAD_CHANNEL
    norm = weights[f"model.layers.{layer}.post_attention_layernorm.weight"]
    assert (norm == 0).nonzero().tolist() == [[channel]]
    assert all(torch.isfinite(weight.float()).all() for weight in weights.values())


def test_text_is_one_document_a_line(demo: Path) -> None:
    lines = (demo / "text.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 9
    assert all(list(json.loads(line)) == ["text"] for line in lines)
