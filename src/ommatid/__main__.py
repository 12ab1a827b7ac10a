"""`python -m ommatid`: the command line, for launchers that start modules (torchrun)."""

from ommatid.cli import main

main()
