"""Import of other libraries' SAEs, and export to files that those libraries' own loaders can open."""

import warnings

from ommatid.sae.interop.convert import FORMATS, export_sae, find_format, import_sae, is_native, load_native, with_measured_k, write_native
from ommatid.sae.interop.overrides import Overrides

__all__ = ["FORMATS", "Overrides", "export_sae", "find_format", "import_sae", "is_native", "load_native", "with_measured_k", "write_native"]


def __getattr__(name: str) -> object:
    """Return `Overrides` under its old name, which works for one more release."""
    if name == "Told":
        warnings.warn("ommatid.sae.interop.Told is now called Overrides; use that name", DeprecationWarning, stacklevel=2)
        return Overrides
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
