"""The spellings of a quantized tensor and its config.

A `Format` is a value: the dtype and shape of the stored scale, the arithmetic that makes scales and codes, and the
`quantization_config`. `get_format` picks one by the names the command line uses.
"""

from w8a8.formats.base import Arithmetic, Format, Selection
from w8a8.formats.detect import Scheme, detect, section, without_empty
from w8a8.formats.registry import COMPATS, FORMATS, get_format

__all__ = [
    "COMPATS",
    "FORMATS",
    "Arithmetic",
    "Format",
    "Scheme",
    "Selection",
    "detect",
    "get_format",
    "section",
    "without_empty",
]
