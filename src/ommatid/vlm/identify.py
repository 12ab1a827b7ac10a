"""Translation of a short name into the parameters of a model: `lite0`, a folder, a hub name, or `module:my_model:make`."""

from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from ommatid.config.models import LiteModel, Model, ModuleModel
from ommatid.errors import ModelError

KEY = "extract.model.path"
ALLOWED = "lite0, lite2, a folder, OWNER/NAME of the model hub, or module:PACKAGE.MODULE:FUNCTION"


def identify(spec: str) -> Model:
    """Return the parameters of the model that a short name denotes. All but the name have their default values.

    The kind of a folder or of a hub name follows from `model_type` in config.json.

    Args:
        spec: `lite0`, `lite2`, a folder, a hub name, or `module:PACKAGE.MODULE:FUNCTION`.

    Returns:
        The parameters.

    Raises:
        ModelError: The model does not belong to a known family. The message lists the known model types.
    """
    if spec in ("lite0", "lite2"):
        return LiteModel(kind="lite", variant=spec)
    if spec.startswith("module:"):
        return _module(spec)
    if not Path(spec).expanduser().is_dir() and "/" not in spec:
        raise ModelError(f"MODEL: {spec}: no such folder; name {ALLOWED}")
    return _transformers(spec)


def _module(spec: str) -> ModuleModel:
    try:
        return ModuleModel(kind="module", factory=spec.removeprefix("module:"))
    except ValidationError:
        raise ModelError(f"MODEL: {spec}: expected module:PACKAGE.MODULE:FUNCTION, such as module:my_model:make") from None


def _transformers(path: str) -> Model:
    from ommatid.vlm import hub

    model_type = hub.load_config(hub.locate(path, KEY, hub.CONFIG), path, KEY).model_type
    known: dict[str, tuple[Any, str]] = {}
    for section in get_args(get_args(Model)[0]):
        if "path" in section.model_fields:
            (kind,) = get_args(section.model_fields["kind"].annotation)
            family = import_module(f"ommatid.vlm.{kind}")
            known |= dict.fromkeys(family.MODEL_TYPES, (section, kind))
    if model_type not in known:
        raise ModelError(
            f"MODEL: {path}: is a {model_type} model; supported types are {', '.join(known)}; load any other with {{kind: module}} "
            "and a function that returns it"
        )
    section, kind = known[model_type]
    return section(kind=kind, path=path)
