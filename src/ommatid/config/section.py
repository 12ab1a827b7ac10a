"""What every section of params.yaml is."""

import itertools
import re
from collections.abc import Collection, Iterator
from typing import Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

from ommatid.errors import without_credentials

_SECRET = (
    "carries a user name, a password or a query in its URL, which would be written wherever params are; take it out, and leave "
    "credentials to the environment: OPENAI_API_KEY for a labeller, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3"
)


_NO_TEXT = "holds a character that no text and no file name can: NUL, or half of a surrogate pair; take it out"


class Section(BaseModel):
    """A frozen part of params.yaml that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    how: ClassVar[frozenset[str]] = frozenset()
    """Fields that say how to compute and not what: the artefact is the same whatever they are."""

    @model_validator(mode="before")
    @classmethod
    def _can_be_meant(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(key)
            annotation = field.annotation if field else None
            if isinstance(value, bool) and _allows(annotation, int, float) and not _allows(annotation, bool):
                raise ValueError(f"{key} is {str(value).lower()}, where a number is expected; write the number")  # it would be 0 or 1
            if value == "" and key == "path":  # which would be the current folder
                raise ValueError("path is empty; write where the files are")
            # mappings of values; other mappings are sections, which look themselves
            texts = list(_texts(value, holds_values=get_origin(annotation) is dict))
            # values go into dvc.lock, manifests, the catalogue, reports, MLflow and Prefect: a secret must not be one
            if any(without_credentials(text) != text for text in texts):
                raise ValueError(f"{key} {_SECRET}")
            if any(re.search("[\0\ud800-\udfff]", text) for text in texts):
                raise ValueError(f"{key} {_NO_TEXT}")
        return values

    def identity(self) -> dict[str, Any]:
        """The values that an artefact is made of, as JSON has them: what its manifest keeps and its draft is known by."""
        return self.model_dump(mode="json", exclude=set(self.how))


def _allows(annotation: Any, *kinds: type) -> bool:
    """Whether one of the types is, or is part of, an annotation."""
    return annotation in kinds or any(_allows(inside, *kinds) for inside in get_args(annotation))


def _texts(value: Any, holds_values: bool) -> Iterator[str]:
    """The strings in a value, and in the lists and mappings of values that it holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one, holds_values)
    elif isinstance(value, dict) and holds_values:
        for one in value.values():
            yield from _texts(one, holds_values)


def unlike(name: str, others: Collection[str]) -> str:
    """The name, with a number where it is taken."""
    return name if name not in others else next(new for i in itertools.count(2) if (new := f"{name}-{i}") not in others)
