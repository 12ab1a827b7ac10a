"""The base class of every section of params.yaml."""

import itertools
import re
from collections.abc import Collection, Iterator
from typing import Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

from ommatid.errors import without_credentials

_SECRET = (
    "contains a URL with a user name, a password or a query, which would be written wherever params are; remove it, and leave "
    "credentials to the environment: OPENAI_API_KEY for a labeller, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3"
)


_NO_TEXT = "contains a character that is not allowed in text and file names: NUL, or half of a surrogate pair; remove it"


class Section(BaseModel):
    """A frozen section of params.yaml, which refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    runtime_keys: ClassVar[frozenset[str]] = frozenset()
    """Fields that affect how an artefact is computed, but not its content."""
    reads_artefacts: ClassVar[bool] = True
    """Whether the stage reads artefacts of earlier stages when its section is this one."""

    @model_validator(mode="before")
    @classmethod
    def _check_values(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(key)
            annotation = field.annotation if field else None
            if isinstance(value, bool) and _allows(annotation, int, float) and not _allows(annotation, bool):
                raise ValueError(
                    f"{key} is {str(value).lower()}, where a number is expected; write the number"
                )  # pydantic would read 0 or 1
            if value == "" and key == "path":  # an empty path would be the current folder
                raise ValueError("path is empty; set it to where the files are")
            # mappings that are not annotated as dict are sections, which check themselves
            texts = list(_texts(value, holds_values=get_origin(annotation) is dict))
            # values are written into dvc.lock, manifests, the catalogue, reports, MLflow and Prefect, so none may be a secret
            if any(without_credentials(text) != text for text in texts):
                raise ValueError(f"{key} {_SECRET}")
            if any(re.search("[\0\ud800-\udfff]", text) for text in texts):
                raise ValueError(f"{key} {_NO_TEXT}")
        return values

    def identity(self) -> dict[str, Any]:
        """Return the values that determine an artefact's content, as JSON values; they go into its manifest and the name of its draft."""
        return self.model_dump(mode="json", exclude=set(self.runtime_keys))

    def unlisted(self) -> dict[str, Any]:
        """Return the values on which the artefact depends and that DVC does not see, by dotted key, as JSON values; null is left out.

        DVC compares params.yaml, which may leave keys out; their values are defaults, which change with the code. Of a section with
        `runtime_keys`, dvc.yaml lists the other keys one by one, and cannot list those that params.yaml may leave out.
        """
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if name in self.runtime_keys:
                continue
            if name in self.model_fields_set and (field.is_required() or not self.runtime_keys):
                found |= {f"{name}{key}": value for key, value in _unlisted(getattr(self, name))}
            elif (value := self.model_dump(mode="json", include={name})[name]) is not None:
                found[name] = value
        return found


def _unlisted(value: Any) -> Iterator[tuple[str, Any]]:
    """Iterate over the values that params.yaml leaves out of sections in a value, each with the end of its dotted key."""
    if isinstance(value, Section):
        yield from ((f".{key}", inside) for key, inside in value.unlisted().items())
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            yield from ((f".{i}{key}", inside) for key, inside in _unlisted(one))


def _allows(annotation: Any, *kinds: type) -> bool:
    """Return whether an annotation is, or contains, one of the types."""
    return annotation in kinds or any(_allows(inside, *kinds) for inside in get_args(annotation))


def _texts(value: Any, holds_values: bool) -> Iterator[str]:
    """Iterate over the strings in a value and in the lists inside it, and also in the mappings inside it if `holds_values`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one, holds_values)
    elif isinstance(value, dict) and holds_values:
        for one in value.values():
            yield from _texts(one, holds_values)


def unique_name(name: str, taken: Collection[str]) -> str:
    """Return the name, with a number appended if it is taken."""
    return name if name not in taken else next(new for i in itertools.count(2) if (new := f"{name}-{i}") not in taken)
