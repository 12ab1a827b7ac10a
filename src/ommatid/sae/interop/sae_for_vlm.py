"""SAEs trained with the code of arXiv 2504.02821 (ExplainableML/sae-for-vlm): ae.pt and config.json.

That code contains a copy of dictionary_learning, which spells Matryoshka differently.
"""

from collections.abc import Mapping
from pathlib import Path

from ommatid.sae.interop import dictionary_learning
from ommatid.sae.interop.files import child, text
from ommatid.sae.interop.overrides import Overrides
from ommatid.sae.model import SAE

FILES: str = "ae.pt and config.json with MatroyshkaBatchTopKSAE"
TAKES: Mapping[str, str] = dictionary_learning.TAKES

SPELLINGS = {"MatroyshkaBatchTopKSAE": "MatryoshkaBatchTopKSAE"}


def detect(path: Path) -> bool:
    """Return whether the path holds files of dictionary_learning whose config.json has the different spelling."""
    is_weights = (path / dictionary_learning.WEIGHTS).is_file() if path.is_dir() else path.suffix == ".pt"
    return is_weights and text(child(dictionary_learning.find_config(path), "trainer", path), "dict_class", path) in SPELLINGS


def read(path: Path, overrides: Overrides) -> SAE:
    """Read an SAE in the same way as from dictionary_learning.

    Returns:
        The SAE.

    Raises:
        ModelError: As for `Format.read`.
    """
    return dictionary_learning.read_as(path, overrides, dictionary_learning.find_config(path), SPELLINGS)


def write(sae: SAE, folder: Path) -> None:
    """Write the files of dictionary_learning with the different spelling.

    Raises:
        ModelError: The SAE is a transcoder.
    """
    dictionary_learning.write_as(sae, folder, {right: wrong for wrong, right in SPELLINGS.items()})
