"""The command line: the verbs of `ommatid`, their output and their exit statuses."""


def main() -> None:
    """Run the verb named on the command line; entry point of `ommatid`."""
    from ommatid.cli.app import main as run_verb

    run_verb()
