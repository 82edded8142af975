"""Places to fold are found by what stands where, whatever the model is called."""

from stages.fold.candidates import Attempt, LayerParts, attempts
from stages.fold.folds import Operand

LAYER = "model.layers.3"


def linear(name: str, rows: int, columns: int) -> Operand:
    module = f"{LAYER}.{name}"
    return Operand(module, f"{module}.weight", (rows, columns))


def parts(*operands: Operand, norms: dict[str, list[str]], **more: object) -> LayerParts:
    """A layer of width 64 with 2 key-value heads of 16."""
    given = {operand.module: operand for operand in operands}
    seen = {f"{LAYER}.{norm}": [f"{LAYER}.{module}" for module in modules] for norm, modules in norms.items()}
    shapes = {f"{norm}.weight": (64,) for norm in seen} | more.pop("shapes", {})  # type: ignore[operator]
    return LayerParts(given, seen, {f"{LAYER}.self_attn": (32, 2)}, shapes=shapes, **more)  # type: ignore[arg-type]


def described(attempt: Attempt) -> list[tuple[str, str, int, int, int]]:
    """(kind, source, its period, its first row, degree) of every alternative's first site."""
    sites = [alternative[0] for alternative in attempt.alternatives]
    return [
        (site.kind, site.name.removeprefix(f"{LAYER}."), source.period, source.first, site.degree)
        for site in sites
        for source in site.sources[:1]
    ]


def test_rows_of_fused_projections() -> None:
    """Phi: Q, K and V in one matrix, gate and up in another."""
    layer = parts(
        linear("self_attn.qkv_proj", 128, 64),
        linear("self_attn.o_proj", 64, 64),
        linear("mlp.gate_up_proj", 80, 64),
        linear("mlp.down_proj", 64, 40),
        norms={"first": ["self_attn.qkv_proj"], "second": ["mlp.gate_up_proj"]},
    )
    first, second, value, down = attempts(layer)
    assert [alternative[0].plus_one for alternative in first.alternatives[:2]] == [False, True]
    assert second.consumers == (f"{LAYER}.mlp.gate_up_proj",)
    assert described(value) == [
        ("v_to_o", "self_attn.qkv_proj", 128, 96, 1),
        ("v_to_o", "self_attn.qkv_proj", 64, 48, 1),
    ]
    assert (value.alternatives[0][0].block, value.alternatives[0][0].repeat) == (16, 2)
    assert described(down) == [
        ("up_to_down", "mlp.gate_up_proj", 80, 40, 1),
        ("up_to_down", "mlp.gate_up_proj", 80, 0, 1),
        ("up_to_down", "mlp.gate_up_proj", 80, 40, 2),
        ("up_to_down", "mlp.gate_up_proj", 80, 0, 2),
    ]


def test_the_projection_that_is_called_last_comes_first() -> None:
    layer = parts(
        linear("self_attn.q_proj", 64, 64),
        linear("self_attn.k_proj", 32, 64),
        linear("self_attn.v_proj", 32, 64),
        linear("self_attn.o_proj", 64, 64),
        norms={"norm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]},
    )
    _, value = attempts(layer)
    assert [name for _, name, *_ in described(value)][:2] == ["self_attn.v_proj", "self_attn.k_proj"]


def test_what_reads_one_tensor_stands_side_by_side() -> None:
    """OLMo 3 has no norm before its projections; gate and up read the same, down what becomes of them."""
    layer = parts(
        linear("mlp.gate_proj", 64, 64),
        linear("mlp.up_proj", 64, 64),
        linear("mlp.down_proj", 64, 64),
        norms={},
        reads={f"{LAYER}.mlp.gate_proj": 1, f"{LAYER}.mlp.up_proj": 1, f"{LAYER}.mlp.down_proj": 2},
    )
    (down,) = attempts(layer)
    assert down.consumers == (f"{LAYER}.mlp.down_proj",)


def test_a_reader_that_was_not_seen_is_tried_too() -> None:
    """A router that casts its input to float32 reads another tensor than the norm's output."""
    layer = parts(
        linear("mlp.gate.wg", 8, 64),
        linear("mlp.up", 40, 64),
        linear("mlp.down", 64, 40),
        norms={"norm": ["mlp.up"]},
    )
    norm = attempts(layer)[0]
    readers = [[part.module for part in site.consumers] for (site,) in norm.alternatives]
    seen, router = f"{LAYER}.mlp.up", f"{LAYER}.mlp.gate.wg"
    assert readers == [[seen], [seen], [seen, router], [seen, router]]
    assert norm.consumers == (seen,)


def test_why_a_norm_can_not_be_divided() -> None:
    narrow = linear("out", 64, 128)
    layer = parts(narrow, norms={"norm": ["out"]})
    assert attempts(layer)[0].alternatives == ()
    assert attempts(layer)[0].reason == "norm has 64 channels, but out reads 128"
    weightless = LayerParts({narrow.module: narrow}, {f"{LAYER}.norm": [narrow.module]})
    assert attempts(weightless)[0].reason == "norm has no weight that could be divided"
    unknown = parts(norms={"norm": ["elsewhere"]})
    assert attempts(unknown)[0].reason == "norm also feeds elsewhere, of which the checkpoint has no weight"
