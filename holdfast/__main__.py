"""`python -m holdfast` is the command `holdfast`."""

from pipeline.entry import main

main()
