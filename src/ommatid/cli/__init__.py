"""Command line: `ommatid <verb>`, what it prints, and how a process ends."""


def main() -> None:
    """Run the verb that the command line names; the entry point of `ommatid`."""
    from ommatid.cli.app import main as run_verb

    run_verb()
