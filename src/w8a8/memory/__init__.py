"""Will it fit: count what an engine needs on a machine's GPUs, from a checkpoint's headers and config.

`model` reads the decoder's layers and what each keeps per token, `weights` splits tensors under tensor parallelism,
`kv` sizes the cache, `working` estimates the rest, `fit` adds it up and advises, `drawing` shows it, and `ram` makes
the same count for the embedded engine on a CPU. Nothing here reads a weight or asks a GPU.
"""

from w8a8.memory.fit import KV_DTYPES, Fit, fit
from w8a8.memory.ram import ram_besides_cache, ram_needed

__all__ = ["KV_DTYPES", "Fit", "fit", "ram_besides_cache", "ram_needed"]
