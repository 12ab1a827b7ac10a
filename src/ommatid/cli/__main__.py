"""`python -m ommatid.cli`: the command line."""

from ommatid.cli import main

main()
