"""Will it fit: a checkpoint's headers and config, a machine's GPUs, and what an engine would need on them.

`model` reads what a model keeps per token, `weights` shares the tensors out under tensor parallelism, `kv` sizes the
cache, `working` what is needed besides, `fit` puts them together and says what to change, `drawing` shows it, and `ram`
does the same sum for the embedded engine on a CPU. Nothing here reads a weight or asks a GPU.
"""

from w8a8.memory.fit import KV_DTYPES, Fit, fit
from w8a8.memory.ram import ram_needed

__all__ = ["KV_DTYPES", "Fit", "fit", "ram_needed"]
