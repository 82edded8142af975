"""A proof as it is kept: the same sites for every layer of its kind, whatever the number of experts."""

import json

import pytest

from stages.fold.folds import FoldSite, Operand
from stages.fold.proof import LayerProof
from state.errors import InputError

EXPERTS = 3


def sites(layer: int) -> dict[str, FoldSite]:
    """A norm before a router and experts in one tensor, and each expert's up before its down."""
    mlp = f"model.layers.{layer}.mlp"
    router = Operand(f"{mlp}.gate", f"{mlp}.gate.weight", (EXPERTS, 8))
    up = [
        Operand(f"{mlp}.experts.{n}.up_proj", f"{mlp}.experts.gate_up_proj", (EXPERTS, 8, 12), n, True, 2, 1)
        for n in range(EXPERTS)
    ]
    down = [
        Operand(f"{mlp}.experts.{n}.down_proj", f"{mlp}.experts.down_proj", (EXPERTS, 6, 8), n, True)
        for n in range(EXPERTS)
    ]
    norm = Operand(f"model.layers.{layer}.norm", f"model.layers.{layer}.norm.weight", (8,))
    found = [FoldSite("norm", norm.module, 8, (norm,), (router, *up), plus_one=True)]
    found += [
        FoldSite("up_to_down", source.module, 6, (source,), (reader,), degree=2)
        for source, reader in zip(up, down, strict=True)
    ]
    return {site.name: site for site in found}


def test_it_comes_back_as_it_was_for_every_layer() -> None:
    proof = LayerProof.of("kind", sites(1).values(), {"model.layers.1.mlp.shared": "why"})
    kept = LayerProof.decode(json.loads(json.dumps(proof.encode())))
    assert kept == LayerProof.decode(proof.encode())
    assert {site.name: site for site in kept.sites_of(1)} == sites(1)
    assert {site.name: site for site in kept.sites_of(5)} == sites(5)
    folds = kept.folds(5, ["model.layers.5.mlp.shared", "model.layers.5.mlp.gate"])
    assert folds.sites == sites(5)
    assert folds.impossible == {"model.layers.5.mlp.shared": "why"}


def test_its_size_does_not_grow_with_the_experts() -> None:
    assert len(LayerProof.of("kind", sites(0).values(), {}).encode()["sites"]) == 2


def test_another_version_is_refused() -> None:
    with pytest.raises(InputError, match="proof of folding has version 2, and this Holdfast reads 1"):
        LayerProof.decode(LayerProof.of("kind", [], {}).encode() | {"version": 2})
