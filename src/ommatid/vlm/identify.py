"""What a short name of a model means as params: `lite0`, a folder, a name on the hub, or `module:my_model:make`."""

from pathlib import Path

from pydantic import ValidationError

from ommatid.config import ClipModel, DinoModel, LiteModel, LlavaModel, Model, ModuleModel, QwenModel, SiglipModel, VitModel
from ommatid.errors import ModelError

KEY = "extract.model.path"
ALLOWED = "lite0, lite2, a folder, OWNER/NAME of the model hub, or module:PACKAGE.MODULE:FUNCTION"


def identify(spec: str) -> Model:
    """The params of a model, all others at their defaults; of a folder or hub name, by `model_type` in its config.json.

    Raises:
        ModelError: not a model of a family that is known; says which are.
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
    from ommatid.vlm import dino, hub, llava, qwen, vit  # the families load late: none is needed to identify the others

    model_type = hub.load_config(hub.locate(path, KEY, hub.CONFIG), path, KEY).model_type
    match model_type:
        case "clip":
            return ClipModel(kind="clip", path=path)
        case "siglip":
            return SiglipModel(kind="siglip", path=path)
        case _ if model_type in dino.CLASSES:
            return DinoModel(kind="dino", path=path)
        case _ if model_type in vit.CLASSES:
            return VitModel(kind="vit", path=path)
        case _ if model_type in llava.PROJECTORS:
            return LlavaModel(kind="llava", path=path)
        case _ if model_type in qwen.TOWERS:
            return QwenModel(kind="qwen", path=path)
        case _:
            known = ("clip", "siglip", *dino.CLASSES, *vit.CLASSES, *llava.PROJECTORS, *qwen.TOWERS)
            raise ModelError(
                f"MODEL: {path}: is a {model_type} model; known are {', '.join(known)}; any other goes as {{kind: module}}, by a function "
                "that returns it"
            )
