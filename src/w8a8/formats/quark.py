"""AMD Quark's spelling: `X.weight` INT8 [out, in], `X.weight_scale` [out], `quant_method: quark`.

Engines match `exclude` by exact module name, so it lists every linear layer left alone; and, as `re:` entries, modules
left alone as a whole, where engines may have other names for the layers in them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from w8a8.checkpoint import Shaped
from w8a8.formats.base import Selection

VERSION_011 = "0.11.2"
VERSION_013 = "0.13"


def quantization_config(selection: Selection) -> dict[str, Any]:
    """Write the `quantization_config` of config.json."""
    return _config([*selection.patterns, *selection.left_alone], VERSION_013, pack_method="order")


def compat_config(selection: Selection, version: str) -> dict[str, Any]:
    """Write what Quark `version` writes: `exclude` lists the layers that it takes for linear ones by their names."""
    exclude = {t.name.removesuffix(".weight") for t in selection.copied if _quark_takes_for_linear(t, version)}
    return _config(sorted(exclude), version, pack_method="reorder")


def _quark_takes_for_linear(tensor: Shaped, version: str) -> bool:
    module, _, parameter = tensor.name.rpartition(".")
    named_so = module and parameter == "weight" and not module.endswith("norm") and "embed" not in module
    return bool(named_so) and (version == VERSION_011 or len(tensor.shape) >= 2)


def _config(exclude: Sequence[str], version: str, pack_method: str) -> dict[str, Any]:
    """Key and order the config as Quark `version` does."""
    return {
        "global_quant_config": {
            "input_tensors": _tensor_spec(version, is_dynamic=True, ch_axis=1),
            "output_tensors": None,
            "weight": _tensor_spec(version, is_dynamic=False, ch_axis=0),
            "bias": None,
            "target_device": None,
        },
        "exclude": list(exclude),
        "algo_config": None,
        "softmax_quant_spec": None,
        "quant_method": "quark",
        "layer_type_quant_config": {},
        "layer_quant_config": {},
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "quant_mode": "eager_mode",
        "version": version,
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": pack_method,
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
    }


def _tensor_spec(version: str, *, is_dynamic: bool, ch_axis: int) -> Mapping[str, Any]:
    newer = version == VERSION_013
    return {
        "dtype": "int8",
        "is_dynamic": is_dynamic,
        "qscheme": "per_channel",
        "ch_axis": ch_axis,
        "group_size": None,
        **({"block_size": None} if newer else {}),
        "symmetric": True,
        "round_method": "half_even",
        "scale_type": "float",
        **({"zero_point_type": "int32"} if newer else {}),
        "scale_format": None,
        "scale_calculation_mode": None,
        "mx_element_dtype": None,
        "observer_cls": "PerChannelMinMaxObserver",
        "is_scale_quant": False,
        **({"enable_buffer_reuse": False, "max_input_numel": 4194304} if newer else {}),
    }
