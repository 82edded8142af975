"""What a library says of a failure, fit to be quoted in a message of ours."""

LONGEST = 300


def reason(error: BaseException) -> str:
    """An error's first two lines as one, without what a terminal would obey, not too long and never empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = printable(" ".join(lines[:2])) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def printable(text: str) -> str:
    """The text with escapes for what is not printable, but for ends of lines."""
    return "".join(char if char == "\n" or char.isprintable() else ascii(char)[1:-1] for char in text)
