"""What every section of params.yaml is."""

import itertools
from collections.abc import Collection
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of params.yaml that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    how: ClassVar[frozenset[str]] = frozenset()
    """Fields that say how to compute and not what: the artefact is the same whatever they are."""

    def identity(self) -> dict[str, Any]:
        """The values that an artefact is made of, as JSON has them: what its manifest keeps and its draft is known by."""
        return self.model_dump(mode="json", exclude=set(self.how))


def unlike(name: str, others: Collection[str]) -> str:
    """The name, with a number where it is taken."""
    return name if name not in others else next(new for i in itertools.count(2) if (new := f"{name}-{i}") not in others)
