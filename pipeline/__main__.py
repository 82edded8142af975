"""`python -m pipeline` is `holdfast`."""

from pipeline.cli import main

main()
