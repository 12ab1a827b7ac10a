"""The Python API: a finished study opened for reading, and new images encoded as the study's own images were.

`import ommatid` offers all of this and loads it on first use; torch is imported only when a model or an SAE is needed.
"""

from ommatid.api.encoding import Encoding, ImageLike
from ommatid.api.load import load_model, load_sae
from ommatid.api.run import Run, encode, open_run

__all__ = ["Encoding", "ImageLike", "Run", "encode", "load_model", "load_sae", "open_run"]
