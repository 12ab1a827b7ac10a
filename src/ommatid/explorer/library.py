"""The catalogue that pages read: opened when it is first asked for, and opened anew when the file has been replaced."""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ommatid.catalog.question import Question
from ommatid.catalog.reader import ANSWER_MB, Catalog, Column, QueryResult
from ommatid.errors import QueryError

PAGES_MB = 40
"""Memory limit of a page's statements, in MB for each reader process."""
RETAINED_MB = 192
"""Memory that a reader process may retain after a page's statement, in MB of addresses, of which about a third is in use: what DuckDB
keeps of the catalogue within its limit, and of its allocator."""
AT_ONCE = 2
"""Statements of pages that run at the same time."""
CONSOLE_MB = 512
"""Memory limit of a statement of the SQL console, in MB."""
CONSOLE_RETAINED_MB = 48
"""Memory that a reader process of the console may retain, in MB of addresses, so that idle ones are small."""
TIMEOUT = 30.0
"""Seconds after which a page's statement is stopped; it is far above what any takes, so that only a hang reaches it."""
NEEDED = (
    "features", "examples", "meanings", "directions", "near_misses", "mistakes", "previews", "image_latents", "class_latents",
)  # fmt: skip
"""Relations that older catalogues may lack and pages need."""

_CLASSES = "SELECT label, list(image) AS images FROM images WHERE split = 'eval' AND label IS NOT NULL GROUP BY label ORDER BY label"
_SAES = """
    SELECT runs.*, comparisons.ms_low, comparisons.ms_high
    FROM runs JOIN comparisons ON comparisons.sae = runs.sae AND comparisons.dictionary = 'sae'
    ORDER BY comparisons.ms - comparisons.ms_floor DESC NULLS LAST, runs.sae
"""


class NoCatalogue(QueryError):
    """There is no catalogue, or it cannot be opened."""


class OldCatalogue(NoCatalogue):
    """A catalogue was built by an older version of Ommatid, which did not write what pages need."""


@dataclass(frozen=True)
class Classes:
    """The classes of the evaluation images, for counting on which of them a latent fires."""

    names: list[str]
    """Name of each class."""
    sizes: list[int]
    """Number of evaluation images of each class."""
    codes: np.ndarray
    """Index of each image's class by the number of the image, int32; -1 for images without a class and for training images."""


@dataclass
class Opened:
    """An open catalogue."""

    catalog: Catalog
    """The catalogue."""
    key: str
    """Text that differs after the file has been replaced."""
    users: int = 0
    """Number of requests that are using it."""
    is_current: bool = True
    """Whether the file has not been replaced since."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """Answers that are the same for every request, such as counts of all features, by question."""
    held: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is held of all latents of an SAE, and of images, by kind and SAE; see `ommatid.explorer.cards`."""

    def ask(self, question: Question, timeout: float = TIMEOUT) -> QueryResult:
        """Answer a question.

        Raises:
            QueryError: The catalogue cannot answer it.
        """
        return self.catalog.ask(question.sql, dict(question.values), timeout=timeout)

    def rows(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """Answer a question with a dict for each row."""
        return self.ask(Question(sql, values)).dicts()

    def answers(self, questions: Mapping[str, Question]) -> dict[str, list[dict[str, Any]]]:
        """Answer several questions at once, which is faster than one by one, with dicts for the rows of each, by their names."""
        found = self.catalog.ask_all([(one.sql, dict(one.values)) for one in questions.values()], timeout=TIMEOUT)
        return {name: answer.dicts() for name, answer in zip(questions, found, strict=True)}

    def rows_of(self, questions: Mapping[str, str], **values: Any) -> dict[str, list[dict[str, Any]]]:
        """Answer several questions at once, as `answers` does; each takes those of the values that it names."""
        named = {name: {key: value for key, value in values.items() if re.search(rf"\${key}\b", sql)} for name, sql in questions.items()}
        return self.answers({name: Question(sql, named[name]) for name, sql in questions.items()})

    def kept(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """Answer a question as `rows` does, and keep the answer while the catalogue is open; for small answers only."""
        key = (sql, *sorted(values.items()))
        if key not in self.cache:
            self.cache[key] = self.rows(sql, **values)
        return self.cache[key]

    @cached_property
    def classes(self) -> "Classes":
        """The classes of the evaluation images."""
        found = self.rows(_CLASSES)
        codes = np.full(max((max(row["images"]) for row in found), default=0) + 1, -1, np.int32)
        for code, row in enumerate(found):
            codes[row["images"]] = code
        return Classes([row["label"] for row in found], [len(row["images"]) for row in found], codes)

    @cached_property
    def relations(self) -> dict[str, list[Column]]:
        """The columns of each relation."""
        return self.catalog.relations()

    @property
    def is_intervened(self) -> bool:
        """Whether the catalogue says what features do; those that older versions built do not."""
        return "interventions" in self.relations

    @cached_property
    def saes(self) -> dict[str, dict[str, Any]]:
        """Rows of `runs` about evaluated SAEs by their names, the one with the highest mean MS above its floor first."""
        return {row["sae"]: row for row in self.rows(_SAES)}


class Library:
    """Holds the catalogue at a path open for all requests.

    Args:
        path: The DuckDB file. It need not exist yet.
        memory_mb: Memory limit of a statement, in MB.
        answer_mb: Memory limit of an answer, in MB.
        niceness: How much statements give way to others that need the processor.
        threads: Threads of a statement; None: one for each processor, up to four.
        retained_mb: Memory in MB above which a reader process is replaced after a statement.
    """

    def __init__(
        self,
        path: Path,
        memory_mb: int = PAGES_MB,
        answer_mb: int = ANSWER_MB,
        niceness: int = 0,
        threads: int | None = 1,
        retained_mb: int = RETAINED_MB,
    ) -> None:
        self.path = path
        self._memory_mb = memory_mb
        self._answer_mb = answer_mb
        self._niceness = niceness
        self._threads = threads
        self._retained_mb = retained_mb
        self._lock = threading.Lock()
        self._opened: Opened | None = None

    @contextmanager
    def open(self) -> Iterator[Opened]:
        """Lend the catalogue that is at the path now; it stays open until the block ends, even if the file is replaced meanwhile.

        Raises:
            NoCatalogue: There is no catalogue, or it cannot be read.
            OldCatalogue: It lacks what pages need.
        """
        opened = self._take()
        try:
            yield opened
        finally:
            with self._lock:
                opened.users -= 1
                if not opened.users and not opened.is_current:
                    opened.catalog.close()

    def close(self) -> None:
        """Close the catalogue."""
        with self._lock:
            self._retire()

    def _take(self) -> Opened:
        with self._lock:
            key = self._key()
            if self._opened is None or key != self._opened.key:
                self._retire()
                self._opened = self._open(key)
            self._opened.users += 1
            return self._opened

    def _retire(self) -> None:
        """Close the catalogue as soon as no request uses it."""
        opened, self._opened = self._opened, None
        if opened:
            opened.is_current = False
            if not opened.users:
                opened.catalog.close()

    def _open(self, key: str) -> Opened:
        try:
            catalog = Catalog(
                self.path,
                self._memory_mb,
                self._answer_mb,
                AT_ONCE,
                niceness=self._niceness,
                threads=self._threads,
                retained_mb=self._retained_mb,
            )
        except QueryError as error:
            raise NoCatalogue(str(error)) from None
        opened = Opened(catalog, key)
        try:
            if missing := [name for name in NEEDED if name not in opened.relations]:
                raise OldCatalogue(f"{self.path}: it lacks {', '.join(missing)}, as an older version built it")
            if not opened.saes:
                raise NoCatalogue(f"{self.path}: it has no evaluated SAE; build it again with `dvc repro catalog`")
        except BaseException:
            opened.catalog.close()
            raise
        return opened

    def _key(self) -> str:
        try:
            found = self.path.stat()
        except OSError:
            return "missing"  # opening it then says why
        return f"{found.st_dev:x}-{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"
