"""How Numba compiles the loops of this folder: without the GIL, cached on disk where a cache can be written.

Numba's cache on disk watches the file of the function that it compiled, and no file that this one imports: after a
change to one of these, touch `rows.py` and `int8.py`, or set `NUMBA_CACHE_DIR` to an empty folder. It keeps
the code of different CPUs and features apart, and so of the instruction sets that `W8A8_CPU` names.
"""

import importlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
from numba.core.registry import cpu_target
from numba.extending import intrinsic as _untyped

from w8a8.errors import UsageError
from w8a8.kernels.cpu.instructions import VARIABLE, instruction_set, restrained


def _start_without_scipy() -> None:
    """Keep Numba from loading scipy.linalg when it runs its first function: that takes a quarter of a second.

    It asks, once, whether there is BLAS for an inner product that no loop here has. Whoever uses `numpy.dot` in a
    function of their own gets BLAS as ever.
    """
    with suppress(ImportError, AttributeError):  # another Numba, which may start in another way
        linalg: Any = importlib.import_module("numba.np.linalg")
        found = linalg.ensure_blas

        def none() -> None:
            raise ImportError

        linalg.ensure_blas = none
        try:
            importlib.import_module("numba.np.arraymath")
        finally:
            linalg.ensure_blas = found


_start_without_scipy()


def _compile_for(cpu: str, features: str) -> None:
    """Have Numba compile for LLVM's `cpu` with `features` alone. Raises UsageError where it compiles already."""
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = cpu, features
    if cpu_target.target_context.codegen().magic_tuple()[2] != features:
        raise UsageError(f"{VARIABLE} comes too late: this program used Numba before w8a8. Import w8a8.runtime first")


if restrained():
    _compile_for(*instruction_set().target)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

intrinsic: Decorator = _untyped
"""Numba's decorator of functions that generate LLVM IR, which Numba leaves untyped."""


_keeps = True


def compile_anew() -> None:
    """Keep no code on disk that is compiled from now on, and look for none: this process compiles it in its own way."""
    global _keeps
    _keeps = False


def jit(**options: Any) -> Decorator:
    """Compile a function with Numba's `options`."""
    return lambda function: _cached(numba.njit, function, nogil=True, **options)


def c_function(signature: Any, function: Callable[..., Any]) -> Any:
    """Compile `function` to a C function of Numba's `signature`; other code calls it at its `address`."""
    return _cached(numba.cfunc, function, signature)


def _cached(compiler: Callable[..., Any], function: Callable[..., Any], *signature: Any, **options: Any) -> Any:
    try:
        return compiler(*signature, cache=_keeps, error_model="numpy", **options)(function)
    except RuntimeError:  # "cannot cache function: no locator available": read-only install, no home
        return compiler(*signature, error_model="numpy", **options)(function)
