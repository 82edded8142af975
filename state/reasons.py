"""What a library says of a failure, fit to be quoted in a message of ours."""

import re

LONGEST = 300

VALUES = re.compile(r"\b(?:tensor|array)\([^()]*(?:\)|$)")
"""A tensor or array as it is printed, or the first line of it."""


def reason(error: BaseException) -> str:
    """An error's first line, with the one that it announces, without what a terminal would obey and without
    the values of tensors; not too long and never empty.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[:2] if lines and lines[0].endswith(":") else lines[:1]
    text = printable(VALUES.sub("a tensor", " ".join(told))) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def printable(text: str) -> str:
    """The text with escapes for what is not printable, but for ends of lines."""
    return "".join(char if char == "\n" or char.isprintable() else ascii(char)[1:-1] for char in text)
