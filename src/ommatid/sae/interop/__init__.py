"""Import of other libraries' SAEs, and export to files that those libraries' own loaders open."""

from ommatid.sae.interop.convert import FORMATS, export_sae, find_format, import_sae, is_native, load_native, with_measured_k, write_native
from ommatid.sae.interop.overrides import Overrides

__all__ = ["FORMATS", "Overrides", "export_sae", "find_format", "import_sae", "is_native", "load_native", "with_measured_k", "write_native"]
