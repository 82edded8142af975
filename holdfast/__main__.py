"""`python -m holdfast` is the command `holdfast`."""

from pipeline.cli import main

main()
