"""INT8 W8A8 (PTPC) checkpoints: per-channel weights, per-token dynamic activations.

>>> import w8a8
>>> result = w8a8.quantize("google/gemma-3-270m", "gemma-3-270m-W8A8")
>>> w8a8.verify("gemma-3-270m-W8A8", source=result.source).ok
True

The verbs live in the modules of the same name and are imported on first use, so that importing `w8a8` costs
milliseconds: neither torch nor Numba is touched before a weight is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from w8a8.version import __version__

if TYPE_CHECKING:
    from w8a8.checkpoint import Checkpoint
    from w8a8.conversion import ConvertResult, convert
    from w8a8.errors import W8A8Error
    from w8a8.inspection import Inspection, inspect
    from w8a8.memory import Fit, fit
    from w8a8.plan import Plan
    from w8a8.quantization import Options, QuantizeResult, dry_run, quantize
    from w8a8.verification.result import VerifyResult
    from w8a8.verification.run import verify

_HOME = {
    "Checkpoint": "w8a8.checkpoint",
    "ConvertResult": "w8a8.conversion",
    "Fit": "w8a8.memory",
    "Inspection": "w8a8.inspection",
    "Options": "w8a8.quantization",
    "Plan": "w8a8.plan",
    "QuantizeResult": "w8a8.quantization",
    "VerifyResult": "w8a8.verification.result",
    "W8A8Error": "w8a8.errors",
    "convert": "w8a8.conversion",
    "dry_run": "w8a8.quantization",
    "fit": "w8a8.memory",
    "inspect": "w8a8.inspection",
    "quantize": "w8a8.quantization",
    "verify": "w8a8.verification.run",
}

__all__ = [
    "Checkpoint",
    "ConvertResult",
    "Fit",
    "Inspection",
    "Options",
    "Plan",
    "QuantizeResult",
    "VerifyResult",
    "W8A8Error",
    "__version__",
    "convert",
    "dry_run",
    "fit",
    "inspect",
    "quantize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'w8a8' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
