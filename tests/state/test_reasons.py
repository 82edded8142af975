"""What is quoted of a library's error."""

import pytest

from state.reasons import printable, reason


@pytest.mark.parametrize(
    ("error", "quoted"),
    [
        (ValueError("\n no such thing\nat all"), "no such thing"),
        (ValueError("no such thing:\n\n  a thing\nat all"), "no such thing: a thing"),
        (ValueError(), "ValueError"),
        (ValueError("  \n"), "ValueError"),
        (ValueError("bad \x1b[2J"), "bad \\x1b[2J"),
        (ValueError("amax is tensor([[1., 2.],\n  [3., 4.]])"), "amax is a tensor"),
        (ValueError("tensor(1., device='cuda:0') is not array([1]) here"), "a tensor is not a tensor here"),
        (ValueError("x" * 1000), "x" * 300 + "..."),
    ],
)
def test_reason(error: Exception, quoted: str) -> None:
    assert reason(error) == quoted


def test_printable_keeps_lines_and_letters() -> None:
    assert printable("é\nb\x00\ud800") == "é\nb\\x00\\ud800"
