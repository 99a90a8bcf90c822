"""Recognizes weights that another tool has quantized, or that are no whole weights, by tensors' names and dtypes.

Configs often do not say it: AutoAWQ and AutoGPTQ kept their settings in files of their own, and adapters have none.
"""

import re
from collections.abc import Iterable

from w8a8.checkpoint import Shaped

_BY_NAME = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r".*\.g_idx", "GPTQ: packed integers in qweight"),
        (r".*\.qweight", "AWQ or GPTQ: packed integers in qweight"),
        (r".*\.weight_packed", "compressed-tensors: packed INT4 or FP4 weights"),
        (r".*\.weight\.(absmax|quant_map|quant_state\..+)", "bitsandbytes: 4-bit weights"),
        (r".*\.SCB", "bitsandbytes: 8-bit weights"),
        (r".*\.(trellis|suh|svh)", "EXL3"),
        (r".*\.(q_weight|q_invperm|q_scale_max)", "EXL2"),
        (r".*\.W_q", "HQQ"),
        (r".*\.codebooks|.*\.centroids\.weight", "AQLM or VPTQ: codebooks"),
        (r".*\.weight\._(data|scale)", "quanto"),
        (r".*\.weight_scale_inv", "FP8 in blocks"),
        (r".*\.weight_scale_2", "NVFP4 or FP8 by modelopt"),
    )
)
_ADAPTER = re.compile(r".*\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\..+)?|base_model\.model\..+")
_PACKED = {"U32": "MLX or another tool: packed integers", "I32": "packed integers"}


def quantized_as(tensors: Iterable[Shaped]) -> str | None:
    """Say as what the `tensors` are quantized, and name one that shows it; None where nothing shows it."""
    specs = list(tensors)
    for pattern, what in _BY_NAME:
        if found := next((t.name for t in specs if pattern.fullmatch(t.name)), None):
            return f"{what}; it holds {found}"
    return next((f"{kind}; {t.name} is {t.dtype}" for t in specs if (kind := _by_dtype(t))), None)


def is_adapter(tensors: Iterable[Shaped]) -> bool:
    """Whether the tensors are those of a LoRA adapter, without the model that it changes."""
    names = [tensor.name for tensor in tensors]
    return bool(names) and all(_ADAPTER.fullmatch(name) for name in names)


def _by_dtype(tensor: Shaped) -> str | None:
    if re.match("F[46](_|$)" if len(tensor.shape) < 2 else "F[468](_|$)", tensor.dtype):
        return "FP4, FP6 or FP8"
    if len(tensor.shape) < 2:
        return None
    if tensor.name.endswith("_blocks") and tensor.dtype == "U8":
        return "MXFP4"
    if not tensor.name.endswith(".weight"):
        return None
    return "8-bit integers" if tensor.dtype in {"I8", "U8"} else _PACKED.get(tensor.dtype)
