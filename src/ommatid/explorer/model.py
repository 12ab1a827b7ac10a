"""Answers that need the model: what pages show while it is loaded, when it cannot be, and when it has answered."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi import Query as Parameters
from fastapi.responses import Response

from ommatid.errors import InputError, OmmatidError
from ommatid.explorer.model_client import Starting
from ommatid.explorer.web import BadRequest, Json, Query, TheExplorer

router = APIRouter()


@dataclass(frozen=True)
class Model:
    """An answer that needs the model, or why there is none yet."""

    answer: Any = None
    """The answer; None if there is none."""
    starting: Starting | None = None
    """How long the model has been loading, and how long that takes; None if it is not loading."""
    problem: str | None = None
    """Why there is no answer; None if there is one, or the model is loading."""


def about_model(ask: Callable[[], Any]) -> Model:
    """Ask something that needs the model.

    Raises:
        BadRequest: What was asked about cannot be used, such as a damaged image.
    """
    try:
        return Model(ask())
    except Starting as starting:
        return Model(starting=starting, problem=None)
    except InputError as error:
        raise BadRequest(str(error)) from None
    except OmmatidError as error:
        return Model(problem=str(error))


@router.get("/api/model", tags=["search"])
def model_json(request: Request, explorer: TheExplorer, query: Annotated[Query, Parameters()]) -> Response:
    """Whether the model is loaded; asking begins to load it."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
    found = about_model(lambda: explorer.model.prepare(sae))
    if found.starting:
        return Json({"state": "loading", "elapsed": found.starting.elapsed, "expected": found.starting.expected})
    return Json({"state": "failed", "problem": found.problem} if found.problem else {"state": "ready"})
