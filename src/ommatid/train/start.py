"""The SAE that training begins with, if `train.init` names one."""

from collections.abc import Mapping
from pathlib import Path

from ommatid.config import Imported, TrainParams
from ommatid.config.train import CHAMPION
from ommatid.errors import ConfigError
from ommatid.sae.model import CONFIG, SAE, WEIGHTS, load_config
from ommatid.store import Artefact


def find_start(params: TrainParams, inputs: Mapping[str, Artefact]) -> SAE | str | None:
    """Find the SAE that training begins with.

    Args:
        params: Params of one SAE.
        inputs: `extract`, and `target` for a transcoder.

    Returns:
        The SAE; a reason why training begins anew although `init` is given; or None if it is not.

    Raises:
        ConfigError: `init` names a folder that holds no SAE.
        ModelError: Its cfg.json is of another version.
    """
    if params.init is None:
        return None
    if params.init == CHAMPION:
        return "train.init is champion, and there is no champion yet"
    assert not isinstance(params.variant, Imported), params
    folder = Path(params.init).expanduser()
    if missing := [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]:
        raise ConfigError(
            f"train.init: {params.init}: holds no {' and no '.join(missing)}; name the folder of an SAE, such as data/sae/NAME, or write "
            "champion, or set it to null"
        )
    if not params.variant.can_continue:
        return f"an SAE of kind {params.variant.kind} cannot be continued"
    config, activations = load_config(folder), inputs["extract"].summary
    wanted = {
        "model": activations["model"],
        "hookpoint": activations["hookpoint"],
        "target": inputs["target"].summary["hookpoint"] if "target" in inputs else None,
        "variant": params.variant.kind,
        "d_sae": params.d_sae,
    }
    differing = [f"{key} {getattr(config, key)}, not {value}" for key, value in wanted.items() if getattr(config, key) != value]
    return f"the SAE in {params.init} has {', '.join(differing)}" if differing else SAE.load(folder)
