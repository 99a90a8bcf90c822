"""Run a W8A8 checkpoint: importing this module teaches transformers to load one.

>>> import w8a8.runtime
>>> model = AutoModelForCausalLM.from_pretrained("gemma-3-270m-W8A8")

Both formats load, whichever tool wrote them, without amd-quark or compressed-tensors; weights stay INT8 in memory,
experts too, of which only the chosen ones run.
Code that comes with a checkpoint runs only by `trust_remote_code=True`: nobody is asked.
"""

from w8a8.errors import MissingExtraError

try:
    from transformers import dynamic_module_utils

    from w8a8.runtime.linear import W8A8Linear
    from w8a8.runtime.quantizer import W8A8Config, W8A8Quantizer, register
except ModuleNotFoundError as missing:
    raise MissingExtraError(
        f"the package {missing.name} is not installed; running a model needs it: pip install 'w8a8[serve]'"
    ) from missing

register()

# transformers would ask on the terminal whether to run code that comes with a checkpoint, and take any `y` on standard
# input for a yes. It does so wherever `trust_remote_code` does not reach; with no seconds to answer in, it raises.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

__all__ = ["W8A8Config", "W8A8Linear", "W8A8Quantizer", "register"]
