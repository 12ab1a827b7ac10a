"""The Python API: a finished study opened for reading, new images encoded as the study's own were, and interventions on them.

`import ommatid` offers all of this and loads it on first use; torch is imported only when a model or an SAE is needed.
"""

from ommatid.api.contributions import Contributions
from ommatid.api.encoding import Encoding, ImageLike
from ommatid.api.interventions import Answers, Intervention
from ommatid.api.load import load_model, load_sae
from ommatid.api.run import Run, encode, intervene, open_run

__all__ = [
    "Answers",
    "Contributions",
    "Encoding",
    "ImageLike",
    "Intervention",
    "Run",
    "encode",
    "intervene",
    "load_model",
    "load_sae",
    "open_run",
]
