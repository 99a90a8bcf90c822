"""Triton's kernels without a GPU, by its interpreter; with `W8A8_GPU=1`, on the GPU of this machine.

The interpreter runs in a process of its own: it is chosen before Triton is imported, and excludes compiling.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest

ON_GPU = os.environ.get("W8A8_GPU") == "1"
"""Whether kernels run on the GPU of this machine."""

Interpreted = Callable[..., Any]
"""Called with a module, a function's name and its arguments: the function's result there, or its exception."""


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreted]:
    """Calls functions where Triton's kernels are interpreted, on the CPU; with `W8A8_GPU=1`, on the GPU."""
    if ON_GPU:
        yield _on_gpu
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin) as process:
        yield lambda module, name, *args, **kwargs: process.submit(_call, module, name, args, kwargs).result()


def _call(module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with np.errstate(all="ignore"):
        return getattr(import_module(module), name)(*args, **kwargs)


def _on_gpu(module: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a function with tensors on the GPU, laid out as they are here, and bring its result back."""
    import torch
    from torch.utils._pytree import tree_map

    def there(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage().cuda()
        moved = torch.empty(0, dtype=value.dtype, device="cuda")
        return moved.set_(storage, value.storage_offset(), value.size(), value.stride())

    def here(value: Any) -> Any:
        return value.cpu() if isinstance(value, torch.Tensor) else value

    args, kwargs = tree_map(there, (args, kwargs))
    return tree_map(here, getattr(import_module(module), name)(*args, **kwargs))


def _begin() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    convert = interpreter._convert_float

    def as_gpus_do(data: Any, source: Any, target: Any, mode: Any) -> Any:
        """Round to BF16 as GPUs do: the interpreter truncates, and gets BF16's subnormals wrong."""
        if (source.name, target.name) == ("fp32", "bf16"):
            return torch.from_numpy(data.view(np.float32)).bfloat16().view(torch.uint16).numpy()
        if (source.name, target.name) == ("bf16", "fp32"):
            return data.view(np.uint16).astype(np.uint32) << 16
        return convert(data, source, target, mode)

    interpreter._convert_float = as_gpus_do
