"""Strict parsers of hand-written YAML and JSON, which refuse what two parsers could read differently."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from ommatid.errors import ConfigError, without_credentials

DEEPEST = 50
"""Largest depth of nested lists and mappings; params.yaml has a depth of six."""
MOST_VALUES = 1_000_000
"""Largest number of values in one file, counting those behind an alias each time it is used."""


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document.

    Args:
        text: The document.
        where: Name of the document for messages, such as the path of the file.

    Returns:
        The values of the document.

    Raises:
        ConfigError: The document is not valid YAML, gives a key twice, is ambiguous between YAML 1.1 and 1.2, or is too deep or too large.
    """
    loader = yaml.SafeLoader("")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if problem := next(_problems(node), None):
            raise ConfigError(f"{where}: {problem}")
        return loader.construct_document(node)
    except RecursionError:
        raise ConfigError(f"{where}: {_TOO_DEEP}") from None
    except yaml.MarkedYAMLError as error:  # not its own message, whose snippet of the text may show a secret
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}: not valid YAML: {line}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError for a date such as 2026-13-01 or a number of thousands of digits
        raise ConfigError(f"{where}: not valid YAML: {without_credentials(' '.join(str(error).split()))}") from None
    finally:
        loader.dispose()


def parse_json(text: str, where: str) -> Any:
    """Parse a JSON document.

    Args:
        text: The document.
        where: Name of the document for messages, such as the path of the file.

    Returns:
        The values of the document.

    Raises:
        ConfigError: The document is not valid JSON, gives a key twice, or is too deep.
    """

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConfigError(f"{where}: the key {twice!r} is given twice; keep one")
        return values

    try:
        return json.loads(text, object_pairs_hook=make_object)
    except RecursionError:
        raise ConfigError(f"{where}: {_TOO_DEEP}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None


_TOO_DEEP = f"nested more than {DEEPEST} levels deep; no file here is meant to be, so a bracket or an indent is wrong"


def _find_ambiguity(node: yaml.Node) -> str | None:
    """Describe an unquoted value that YAML 1.1, which PyYAML reads, and YAML 1.2, which DVC reads, understand differently; else None."""
    if not isinstance(node, yaml.ScalarNode) or node.style is not None:
        return None
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "bool" and text.lower() not in ("true", "false"):
        return f"some YAML parsers read {text} as a boolean, others as a string; write true or false, or put the string into quotes"
    if kind in ("int", "float") and ":" in text:
        return f"some YAML parsers read {text} as a number to base 60, others as a string; write the number, or put the string into quotes"
    if kind == "int" and re.fullmatch("[-+]?0[0-9_]+", text):
        return f"some YAML parsers read {text} as an octal number, others as a decimal one; write it without the leading zero"
    return None


def _problems(root: yaml.Node) -> Iterator[str]:
    """Iterate over the problems of a document that is valid YAML."""
    # walks the document without recursion, following an alias each time it is used, so that its values count each time
    pending = [(root, 1)]
    n_values = 0
    while pending:
        node, depth = pending.pop()
        n_values += 1
        if depth > DEEPEST:
            yield _TOO_DEEP
            return
        if n_values > MOST_VALUES:
            yield f"holds more than {MOST_VALUES:,} values with its aliases (*name) resolved; write them out or remove them"
            return
        if ambiguity := _find_ambiguity(node):
            yield f"line {node.start_mark.line + 1}: {ambiguity}"
            return
        if isinstance(node, yaml.SequenceNode):
            pending += [(inside, depth + 1) for inside in node.value]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                pending += [(key, depth + 1), (value, depth + 1)]
                if not isinstance(key, yaml.ScalarNode):
                    continue
                line = key.start_mark.line + 1
                if (key.tag, key.value) in lines:
                    yield f"line {line}: the key {key.value!r} is given twice, first on line {lines[key.tag, key.value]}; keep one"
                    return
                lines[key.tag, key.value] = line
