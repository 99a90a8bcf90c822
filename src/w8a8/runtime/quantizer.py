"""The transformers hook: `from_pretrained` builds `W8A8Linear` layers for a W8A8 checkpoint.

transformers picks a quantizer by the `quant_method` of config.json, and its own for "quark" and "compressed-tensors"
insist on those packages. `register` puts a choice in their place: a config that declares INT8 W8A8 is loaded here, any
other one by transformers as before.

The shards' headers tell which layers are quantized, not the config's exclude list: a module whose weight is stored as
I8 is one. Tensor names become module names by transformers' own renamings.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from w8a8.checkpoint import TensorSpec
from w8a8.checkpoint.header import read_header
from w8a8.errors import MissingTensorError, UnsupportedSchemeError
from w8a8.formats import detect
from w8a8.runtime.linear import W8A8Linear

PACKAGES = {"quark": ("quark", "amd-quark"), "compressed-tensors": ("compressed_tensors", "compressed-tensors")}
"""Format -> the module and the distribution that transformers' own quantizer needs."""


class W8A8Config(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a W8A8 checkpoint, kept as declared."""

    def __init__(self, **declared: Any) -> None:
        self.declared = declared
        self.quant_method = declared["quant_method"]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of config.json."""
        return dict(self.declared)


class W8A8Quantizer(HfQuantizer):  # type: ignore[misc]
    """Replace the linear layers that are stored as INT8 by `W8A8Linear`, before their weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        fit_to(model, [t for file in checkpoint_files or () for t in read_header(Path(file)).tensors])

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for layer in model.modules():
            if isinstance(layer, W8A8Linear):
                layer.weight_scale = _parameter(layer.weight_scale.reshape(-1))

    def is_serializable(self) -> bool:
        """Return False: checkpoints are written by `w8a8.quantize`."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradient."""
        return False


def register() -> None:
    """Make transformers load W8A8 checkpoints of both formats with `W8A8Linear`. A second call changes nothing."""
    for method in PACKAGES:
        config_class, quantizer_class = (
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method],
            auto.AUTO_QUANTIZER_MAPPING[method],
        )
        if not issubclass(config_class, _Chosen):
            chosen = type(f"W8A8Or{config_class.__name__}", (_Chosen, config_class), {"otherwise": config_class})
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = chosen
            auto.AUTO_QUANTIZER_MAPPING[method] = _choose_quantizer(quantizer_class)


class _Chosen:
    """A choice in place of a config class: W8A8 becomes a `W8A8Config`, anything else the class that stood there."""

    otherwise: type[Any]

    @classmethod
    def from_dict(cls, declared: Mapping[str, Any], **kwargs: Any) -> Any:
        scheme = detect({"quantization_config": declared})
        if scheme.w8a8:
            return W8A8Config(**declared)
        module, package = PACKAGES[scheme.method]
        if find_spec(module) is None:
            raise UnsupportedSchemeError(
                f"the checkpoint is quantized as {scheme.summary}; w8a8 runs INT8 W8A8 only. transformers loads it "
                f"with the package {package} (pip install {package}), vLLM without it"
            )
        return cls.otherwise.from_dict(declared, **kwargs)


def _choose_quantizer(otherwise: type[HfQuantizer]) -> Any:
    def choose(config: QuantizationConfigMixin, **kwargs: Any) -> HfQuantizer:
        return (W8A8Quantizer if isinstance(config, W8A8Config) else otherwise)(config, **kwargs)

    return choose


def fit_to(model: PreTrainedModel, tensors: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    """Replace the linear layers of `model` that `tensors` hold as INT8 by a `W8A8Linear` without weights.

    Returns the tensors by the names they have in the model. Raises `UnsupportedSchemeError` or `MissingTensorError`
    where one does not fit.
    """
    named = _named_as_in(model, tensors)
    for name, weight in named.items():
        if weight.dtype == "I8" and name.endswith(".weight"):
            _replace(model, name.removesuffix(".weight"), weight, named.get(f"{name}_scale"))
    return named


def _named_as_in(model: PreTrainedModel, tensors: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    """Map the files' tensors to their names in the model, as transformers' loader renames them."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()

    def rename(name: str) -> str:
        # A scale goes where its weight goes.
        module, _, parameter = name.rpartition(".")
        if parameter != "weight_scale":
            return str(rename_source_key(name, renamings, converters, model.base_model_prefix, known)[0])
        return rename(f"{module}.weight").removesuffix("weight") + parameter

    return {rename(t.name): t for t in tensors}


def _replace(model: PreTrainedModel, name: str, weight: TensorSpec, scale: TensorSpec | None) -> None:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if type(layer) is not nn.Linear:
        found = "no layer" if layer is None else f"a {type(layer).__name__}"
        raise UnsupportedSchemeError(
            f"{weight.shard}: {weight.name} is INT8, but {type(model).__name__} has {found} in its place; only plain "
            "linear layers can run in INT8 here. vLLM may load it"
        )
    if scale is None:
        raise MissingTensorError(
            f"{weight.shard}: {weight.name} is INT8 and has no weight_scale; the checkpoint is broken"
        )
    rows, columns = layer.out_features, layer.in_features
    if weight.shape != (rows, columns) or scale.shape not in ((rows,), (rows, 1)):
        raise UnsupportedSchemeError(
            f"{weight.shard}: {weight.name} has shape {list(weight.shape)} and scales {list(scale.shape)}; a linear "
            f"layer of {rows} x {columns} with one scale per output channel was expected"
        )
    with torch.device("meta"):
        quantized = W8A8Linear(columns, rows, bias=layer.bias is not None, dtype=layer.weight.dtype)
        quantized.weight_scale = _parameter(torch.empty(scale.shape, dtype=torch.float32))
    model.set_submodule(name, quantized)


def _parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
