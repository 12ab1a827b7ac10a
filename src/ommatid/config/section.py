"""What every section of params.yaml is."""

import itertools
from collections.abc import Collection, Iterator
from typing import Any, ClassVar, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

from ommatid.errors import without_credentials

_SECRET = (
    "carries a user name, a password or a query in its URL, which would be written wherever params are; take it out, and leave "
    "credentials to the environment: OPENAI_API_KEY for a labeller, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3"
)


class Section(BaseModel):
    """A frozen part of params.yaml that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    how: ClassVar[frozenset[str]] = frozenset()
    """Fields that say how to compute and not what: the artefact is the same whatever they are."""

    @model_validator(mode="before")
    @classmethod
    def _holds_no_credentials(cls, values: Any) -> Any:
        # values go into dvc.lock, manifests, the catalogue, reports, MLflow and Prefect: a secret must not be one
        for key, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(key)
            holds_values = field is not None and get_origin(field.annotation) is dict  # other mappings are sections: they look themselves
            if any(without_credentials(text) != text for text in _texts(value, holds_values)):
                raise ValueError(f"{key} {_SECRET}")
        return values

    def identity(self) -> dict[str, Any]:
        """The values that an artefact is made of, as JSON has them: what its manifest keeps and its draft is known by."""
        return self.model_dump(mode="json", exclude=set(self.how))


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
