"""The code on which an artefact depends: the modules that a module uses, each with a digest of what it does.

Imports are followed without importing anything. Modules named for a `kind` of params.yaml, which others load by that name, count only if
the params select the kind. The digest of a module is taken of its syntax tree without docstrings, so that comments and formatting do not
change it, and that of a data file of its content. Neither depends on the machine, or on where Ommatid is installed.
"""

import ast
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ommatid.compute.collector import collector_paused
from ommatid.store.filesystem import cache_folder, replace_text

PACKAGE = "ommatid"
NO_NUMBERS = re.compile(r"ommatid(\.(config|errors|events|executors|stage|summaries|tracking)(\..*)?)?")
"""Modules that cannot change what a stage computes from the same params, nor can what they import: the values in config/ are the params,
of which the stage `sources` records those that params.yaml leaves out, executors only say where something is computed, summaries only name
keys, and tracking only says where an SAE came from."""
_ROOT = Path(__file__).parents[1]
_CACHED = 4096
"""Number of sources whose analysis is cached; beyond it, those that are not used now are forgotten."""
_LENGTH = 16
"""Number of hexadecimal digits of a digest."""


@dataclass(frozen=True)
class Source:
    """What the text of a module says, whatever the module is called."""

    digest: str
    """Digest of its syntax tree."""
    imports: list[list[str]]
    """Modules that it imports, each with the names that it takes from there, which may be modules too. In a relative import the module's
    name begins with a dot for each level."""
    rooms: list[str]
    """Beginnings of the names of modules that it loads by their kind, such as `ommatid.images.`; `__name__` is the module's own."""
    data: list[list[str]]
    """Packages that it reads data files from, each with all strings that may be the name of such a file, or of a folder of them."""


class Code:
    """The code of Ommatid as it is now; every file is read once."""

    def __init__(self, root: Path = _ROOT) -> None:
        self._root = root
        self._files = {_name_of(file): file for path in root.rglob("*.py") if (file := path.relative_to(root).as_posix())}
        self._sources: dict[str, Source] = {}
        self._cache = cache_folder() / "code" / f"{_text_digest(Path(__file__).read_bytes())}.json"
        self._known = _load(self._cache)
        self._used: dict[str, Source] = {}

    def used_by(self, *modules: str, kinds: Collection[str] = (), without: Collection[str] = ()) -> dict[str, str]:
        """Return the digest of every file of code and data that modules use.

        Args:
            modules: Names of the modules, such as `ommatid.extract.stage`.
            kinds: Kinds that the params select; of the modules that are loaded by their kind, only those with these names count.
            without: Modules that are not used under the present params, though one that is used imports them.

        Returns:
            Digests by path inside the package, such as `vlm/lite.py`.
        """
        digests: dict[str, str] = {}
        seen: set[str] = set()
        queue = list(modules)
        with collector_paused():
            while queue:
                name = queue.pop()
                if name in seen or name in without or NO_NUMBERS.fullmatch(name):
                    continue
                seen.add(name)
                source = self.source(name)
                digests[self._files[name]] = source.digest
                queue += self._imported_by(name, source)
                rooms = [room.replace("__name__", name) for room in source.rooms]
                queue += [module for room in rooms for kind in kinds if (module := f"{room}{kind}") in self._files]
                for package, inside in source.data:
                    digests |= self._data_files(package, inside)
        self._save()
        return dict(sorted(digests.items()))

    def source(self, name: str) -> Source:
        """Return the analysis of a module."""
        if name not in self._sources:
            text = (self._root / self._files[name]).read_bytes()
            key = _text_digest(text)
            if key not in self._known:
                self._known[key] = analyse(text)
            self._sources[name] = self._used[key] = self._known[key]
        return self._sources[name]

    def _imported_by(self, name: str, source: Source) -> Iterator[str]:
        package = name if self._files[name].endswith("__init__.py") else name.rpartition(".")[0]
        for module, *names in source.imports:
            bare = module.lstrip(".")
            if level := len(module) - len(bare):
                module = ".".join([*package.split(".")[: len(package.split(".")) + 1 - level], *filter(None, [bare])])
            modules = [inside for each in names if (inside := f"{module}.{each}") in self._files]
            yield from modules
            if module in self._files and (len(modules) < len(names) or not names):
                yield module

    def _data_files(self, package: str, inside: str) -> dict[str, str]:
        place = self._root / package.removeprefix(PACKAGE).strip(".").replace(".", "/") / inside
        files = [place] if place.is_file() else sorted(place.rglob("*")) if place.is_dir() else []
        found = [file for file in files if file.is_file() and file.suffix not in (".py", ".pyc")]
        return {file.relative_to(self._root).as_posix(): _text_digest(file.read_bytes()) for file in found}

    def _save(self) -> None:
        if self._known.keys() <= _load(self._cache).keys():
            return
        kept = self._known if len(self._known) <= _CACHED else self._used
        with suppress(OSError):  # without the cache every file is analysed again, which is only slower
            replace_text(self._cache, json.dumps({key: asdict(source) for key, source in kept.items()}))


def digest_of(*modules: str) -> str:
    """Return the digest of some modules alone, without what they import."""
    code = Code()
    return _text_digest(" ".join(code.source(name).digest for name in modules).encode())


def analyse(text: bytes) -> Source:
    """Analyse the text of a module."""
    tree = ast.parse(text)
    parts: list[str] = []
    found = _Finder()
    found.visit(tree)
    _write(tree, parts)
    return Source(_text_digest(" ".join(parts).encode()), found.imports, found.rooms, found.data())


class _Finder(ast.NodeVisitor):
    """Finds what a module imports and loads, except for type checking alone."""

    def __init__(self) -> None:
        self.imports: list[list[str]] = []
        self.rooms: list[str] = []
        self._packages: list[str] = []
        self._strings: set[str] = set()

    def data(self) -> list[list[str]]:
        return [[package, name] for package in self._packages for name in sorted(self._strings)]

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.imports += [[alias.name] for alias in node.names if _is_ours(alias.name)]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or _is_ours(node.module or ""):
            self.imports.append(["." * node.level + (node.module or ""), *(alias.name for alias in node.names)])

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
        match called, node.args:
            case "import_module", [ast.JoinedStr(values=[*first, ast.FormattedValue()])]:
                self.rooms.append("".join(map(_text_of, first)))
            case "files", [ast.Constant(value=str(package))] if _is_ours(package):
                self._packages.append(package)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and re.fullmatch(r"[\w.-]+", node.value) and not node.value.startswith("."):
            self._strings.add(node.value)


def _text_of(part: ast.expr) -> str:
    """Return the text of a part of an f-string; `__name__` for that variable, and something that is no module's name for others."""
    match part:
        case ast.Constant(value=str(text)):
            return text
        case ast.FormattedValue(value=ast.Name(id="__name__")):
            return "__name__"
        case _:
            return "?"


def _write(node: Any, parts: list[str]) -> None:
    """Append the words of a syntax tree, without what only says how it was written, and equal in all versions of Python."""
    if isinstance(node, ast.AST):
        parts.append(type(node).__name__)
        for field in node._fields:
            value = getattr(node, field, None)
            if field not in ("ctx", "kind", "type_ignores") and value is not None and value != []:
                parts.append(field)
                _write(value, parts)
    elif isinstance(node, list):
        parts.append("[")
        for each in node:
            if not _is_idle(each):
                _write(each, parts)
        parts.append("]")
    else:
        parts.append(repr(node))


def _is_idle(statement: Any) -> bool:
    """Return whether a statement does nothing: a docstring, or `pass`."""
    text = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(statement, ast.Pass) or (isinstance(text, ast.Constant) and isinstance(text.value, str))


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE


def _name_of(file: str) -> str:
    return ".".join([PACKAGE, *file.removesuffix(".py").removesuffix("__init__").strip("/").split("/")]).strip(".")


def _text_digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:_LENGTH]


def _load(cache: Path) -> dict[str, Source]:
    try:
        os.utime(cache)  # by which `ommatid gc` knows that it is used
        return {key: Source(**values) for key, values in json.loads(cache.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
