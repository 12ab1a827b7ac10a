"""Files that people write, read strictly: what two readers could understand in two ways is refused, with its line where there is one."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from ommatid.errors import ConfigError, without_credentials

DEEPEST = 50
"""Levels of lists and mappings inside one another; params.yaml has six."""
MOST_VALUES = 1_000_000
"""Values in one file, those that an alias repeats counted each time."""


def parse_yaml(text: str, where: str) -> Any:
    """The values of one YAML document.

    Args:
        text: The document.
        where: What the error calls it, such as the path of the file.

    Raises:
        ConfigError: not valid YAML, a key that is given twice, or nested or repeated without end.
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
    except yaml.MarkedYAMLError as error:  # its snippet would show the text around, which may be secret
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}: not valid YAML: {line}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # of a date such as 2026-13-01, and of a number of thousands of digits
        raise ConfigError(f"{where}: not valid YAML: {without_credentials(' '.join(str(error).split()))}") from None
    finally:
        loader.dispose()


def parse_json(text: str, where: str) -> Any:
    """The values of a JSON document.

    Args:
        text: The document.
        where: What the error calls it, such as the path of the file.

    Raises:
        ConfigError: not valid JSON, a key that is given twice, or nested too deep.
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


_TOO_DEEP = f"nested more than {DEEPEST} levels deep; nothing here is, so a bracket or an indent is wrong"


def _two_meanings(node: yaml.Node) -> str | None:
    """What YAML 1.1, which is read here, and 1.2, which DVC reads, understand differently in a value without quotes."""
    if not isinstance(node, yaml.ScalarNode) or node.style is not None:
        return None
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "bool" and text.lower() not in ("true", "false"):
        return f"{text} is a truth value to some readers of YAML, and a word to others; write true or false, or put the word into quotes"
    if kind in ("int", "float") and ":" in text:
        return f"{text} is a number to base 60 to some readers of YAML, and a word to others; write the number, or put the word into quotes"
    if kind == "int" and re.fullmatch("[-+]?0[0-9_]+", text):
        return (
            f"{text} is an octal number to some readers of YAML, and a decimal one to others; write it without the zero that it begins with"
        )
    return None


def _problems(root: yaml.Node) -> Iterator[str]:
    """What is wrong with a document that is valid YAML."""
    # A walk without recursion over the document as it will be read: an alias is walked each time, so its value counts each time
    left = [(root, 1)]
    n_values = 0
    while left:
        node, depth = left.pop()
        n_values += 1
        if depth > DEEPEST:
            yield _TOO_DEEP
            return
        if n_values > MOST_VALUES:
            yield f"holds more than {MOST_VALUES:,} values, aliases (*name) resolved; write them out, or take them away"
            return
        if two := _two_meanings(node):
            yield f"line {node.start_mark.line + 1}: {two}"
            return
        if isinstance(node, yaml.SequenceNode):
            left += [(inside, depth + 1) for inside in node.value]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                left += [(key, depth + 1), (value, depth + 1)]
                if not isinstance(key, yaml.ScalarNode):
                    continue
                line = key.start_mark.line + 1
                if (key.tag, key.value) in lines:
                    yield f"line {line}: the key {key.value!r} is given twice, first on line {lines[key.tag, key.value]}; keep one"
                    return
                lines[key.tag, key.value] = line
