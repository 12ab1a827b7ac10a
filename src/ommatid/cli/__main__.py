"""Entry point of `python -m ommatid.cli`."""

from ommatid.cli import main

main()
