"""SAEs of other libraries: read into Ommatid's form, and written so that the library's own loader opens them."""

from ommatid.sae.interop.convert import FORMATS, export_sae, find_format, import_sae, is_native, load_native, with_measured_k, write_native
from ommatid.sae.interop.overrides import Overrides

__all__ = ["FORMATS", "Overrides", "export_sae", "find_format", "import_sae", "is_native", "load_native", "with_measured_k", "write_native"]
