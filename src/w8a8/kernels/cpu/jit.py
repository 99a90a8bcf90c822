"""How Numba compiles the loops of this folder: without the GIL, cached on disk where a cache can be written.

Numba's cache on disk watches the file of the function that it compiled, and no file that this one imports: after a
change to `ir.py`, touch `rows.py` and `int8.py`, or set `NUMBA_CACHE_DIR` to an empty folder.
"""

from collections.abc import Callable
from typing import Any

import numba
from numba.extending import intrinsic as _untyped

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

intrinsic: Decorator = _untyped
"""Numba's decorator of functions that generate LLVM IR, which Numba leaves untyped."""


def jit(**options: Any) -> Decorator:
    """Compile a function with Numba's `options`."""
    return lambda function: _cached(numba.njit, function, nogil=True, **options)


def c_function(signature: Any, function: Callable[..., Any]) -> Any:
    """Compile `function` to a C function of Numba's `signature`; other code calls it at its `address`."""
    return _cached(numba.cfunc, function, signature)


def _cached(compiler: Callable[..., Any], function: Callable[..., Any], *signature: Any, **options: Any) -> Any:
    try:
        return compiler(*signature, cache=True, error_model="numpy", **options)(function)
    except RuntimeError:  # "cannot cache function: no locator available": read-only install, no home
        return compiler(*signature, error_model="numpy", **options)(function)
