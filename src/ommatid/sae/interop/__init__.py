"""SAEs of other libraries: read into Ommatid's form, and written so that the library's own loader opens them."""

from ommatid.sae.interop.convert import FORMATS, export_sae, find_format, import_sae, is_own, load_own, with_measured_k, write_own
from ommatid.sae.interop.overrides import Told

__all__ = ["FORMATS", "Told", "export_sae", "find_format", "import_sae", "is_own", "load_own", "with_measured_k", "write_own"]
