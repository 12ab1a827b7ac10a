"""The errors that are the user's to mend: each names the key or path, what came, what is allowed, what to do, and no credentials."""

import os
import re

_USER = re.compile(r"(?<=://)(?:[^\s/@]*@)+|(?<=://)[^\s/@:]+:(?!\d+/)[^\s@]*@")
"""User name and password in a URL; also where a slash in the password keeps it from being read as one."""
_QUERY = re.compile(r"(://[^\s?]*)\?[^\s'\"]*")
"""What follows the path of a URL: keys and signatures stand there."""


def without_credentials(text: str) -> str:
    """The text without the user names, passwords and queries of URLs in it."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


class OmmatidError(Exception):
    """Base of every error whose message is meant for the user; the CLI prints it without a traceback.

    >>> import ommatid
    >>> try:
    ...     ommatid.open_run("nowhere")
    ... except ommatid.OmmatidError as error:
    ...     print(error)
    nowhere holds no finished study: nowhere/sae: does not exist; make it with ...
    """


class ConfigError(OmmatidError):
    """A value in params.yaml or on the command line that cannot be used."""


class SourceError(OmmatidError):
    """Images or activations cannot be found, fetched or used at the place named in `images.source` or `extract.path`."""


class ModelError(OmmatidError):
    """A model, its weights or a hookpoint cannot be found or used."""


class ArtefactError(OmmatidError):
    """An artefact is missing, damaged, or of another schema version."""


class InputError(OmmatidError, ValueError):
    """Arrays given to a call of the library that cannot be used."""


class ExecutorError(OmmatidError):
    """Shards cannot be run: no cluster answers, or the workers of one die again and again."""


class GateError(OmmatidError):
    """A quality gate failed; the artefact was not published."""


class TrainingError(OmmatidError):
    """Training cannot go on (divergence, too little data)."""


class MachineError(OmmatidError):
    """The machine lacks or refuses what a stage needs: memory, disk, permission, files, threads."""


class StoppedError(OmmatidError):
    """The process was asked to end in the middle of a stage; what was done is kept, and the stage goes on when it is run again."""


class QueryError(OmmatidError):
    """SQL that cannot be answered: refused, too slow, or wrong."""


class RunError(OmmatidError):
    """A flow cannot start or go on: the checkout, git or DVC is not in the state it needs."""


def gist(error: Exception) -> str:
    """What a library's exception says, in one line and without what it quotes of a file, or addresses in memory.

    A file may be a link to another that is nobody's business, and messages are published: in the table `rejected`, in logs, in reports.
    """
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    said = re.sub(r" ?<[^>]* at 0x[0-9a-fA-F]+>", "", str(error)).strip().partition("\n")[0]
    unquoted = re.split(r"[\s:(\[{]*(?<!\w)b?['\"`]", said, maxsplit=1)[0]
    return unquoted if re.search("[A-Za-z]", unquoted) else type(error).__name__
