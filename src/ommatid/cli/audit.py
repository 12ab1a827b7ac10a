"""The output of `ommatid audit`: features that go with a class for the wrong reason, a sentence for each number."""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ommatid.catalog.question import Question, choose_sae
from ommatid.catalog.reader import Catalog
from ommatid.errors import QueryError
from ommatid.show.audit import AUDITS, CLASSES, NO_PROOF, STATUSES, SUSPICIOUS, say_counts, say_reasons, say_test


def iter_lines(file: Path, name: str | None, sae: str | None, limit: int) -> Iterator[str]:
    """Iterate over the lines of the answer.

    Args:
        file: The catalogue's DuckDB file.
        name: Class whose features are listed; None for all.
        sae: Name of the SAE; None for the one with the highest mean MS above its floor.
        limit: Number of pairs that are described.

    Raises:
        QueryError: The catalogue was built without an audit, or has no such SAE or class.
    """
    with Catalog(file) as opened:
        if "audits" not in opened.relations():
            raise QueryError(
                f"{file}: it was built before there was an audit; run `dvc repro`, or `ommatid intervene` and `ommatid catalog`"
            )
        chosen = choose_sae(opened, sae)
        counts = Question(AUDITS, {"sae": chosen}).ask(opened).dicts()
        pairs = Question(SUSPICIOUS, {"sae": chosen}).ask(opened).dicts()
        classes = [label for (label,) in opened.rows(CLASSES)]
    if name is not None and name not in classes:
        near = difflib.get_close_matches(name, classes, n=1)
        raise QueryError(f"--class {name!r}: no evaluation image has it{f'; did you mean {near[0]!r}?' if near else ''}")
    for row in counts:
        yield from say_counts(row)
    if not counts:
        yield "Nothing was audited."
    if not counts or counts[0]["status"] != "ok":
        return
    mine = [row for row in pairs if name in (None, row["class"])]
    if not any(row["status"] == "suspect" for row in mine):
        yield f"No feature is a suspect{'' if name is None else f' of {name}'}. {NO_PROOF}"
    for row in mine[:limit]:
        yield ""
        yield from _describe(row)
    if len(mine) > limit:
        yield f"\n… {limit} of {len(mine)} shown; raise --limit"
    yield ""
    query = urlencode({"sae": chosen} if name is None else {"sae": chosen, "name": name})
    yield f"pictures  ommatid serve, then http://127.0.0.1:8321/audit?{query}"


def _describe(row: Mapping[str, Any]) -> Iterator[str]:
    label = f", {row['label']}" if row["label"] else ""
    yield f"{row['class']}: latent {row['latent']}{label} ({STATUSES[row['status']][0].lower()}, suspicion {row['suspicion']:.2f})"
    yield from (f"  {sentence}" for sentence in (*say_reasons(row), *say_test(row)))
