"""What a recipe leaves out is told in a line for each reason."""

from stages.recipe.quantizer_plan import told_left_out


def test_reasons_are_told_once() -> None:
    left_out = {f"layers.{number}.norm": "a norm" for number in range(5)} | {"tower.q": "no text"}
    assert told_left_out(left_out) == [
        "not quantized: layers.0.norm, layers.1.norm, layers.2.norm and 2 more (a norm)",
        "not quantized: tower.q (no text)",
    ]
    assert told_left_out({}) == []
