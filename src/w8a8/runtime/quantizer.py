"""The transformers hook: `from_pretrained` builds `W8A8Linear` layers for a W8A8 checkpoint.

transformers picks a quantizer by the `quant_method` of config.json, and its own for "quark" and "compressed-tensors"
insist on those packages. `register` puts a choice in their place: a config that declares INT8 W8A8 is loaded here, any
other one by transformers as before.

The shards' headers tell which layers are quantized, not the config's exclude list (`w8a8.runtime.fitting`).
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from w8a8.checkpoint.header import read_header
from w8a8.errors import UnsupportedSchemeError
from w8a8.formats import detect
from w8a8.runtime.fitting import fit_to, settle

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
    """Replace the layers and experts that are stored as INT8 by those of this tool, before their weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        tensors = [t for file in checkpoint_files or () for t in read_header(Path(file)).tensors]
        self._more = fit_to(model, tensors).more

    def update_weight_conversions(self, weight_conversions: Sequence[Any], model: PreTrainedModel) -> list[Any]:  # noqa: ARG002
        """Add where the tensors of INT8 layers go."""
        return [*weight_conversions, *self._more]

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Leave Llama 4's experts to `fit_to`: transformers would give them modules that run all experts."""

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        settle(model)

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
