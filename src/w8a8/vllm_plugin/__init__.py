"""The vLLM plugin: this project's INT8 kernel in stock vLLM, wherever this package is installed beside it.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes: front end, engine
core, every worker. It says one line to vLLM's log. Whatever is not as expected, above all an unknown version of vLLM,
makes it step aside with a warning: then vLLM runs as if it were not there. `W8A8_VLLM_PLUGIN=0` switches it off.

`rule` says which kernel runs where, `registering` whether ours can, `placing` puts it there, `kernel` is the class that
vLLM chooses and `operators` what it computes with. They need torch, Triton and vLLM, all of which vLLM brings, and
import nothing else of this package than the Triton kernels.
"""

import logging
import os

from w8a8.vllm_plugin.rule import SWITCH, StepAside

log = logging.getLogger("vllm.w8a8")
"""A child of vLLM's logger, so that it is shown the same way."""


def register() -> None:
    """Offer the kernel to the vLLM of this process. Never raises: a plugin that fails would take the server with it."""
    if os.environ.get(SWITCH) == "0":
        log.info("w8a8 plugin: switched off by %s=0", SWITCH)
        return
    try:
        from w8a8.vllm_plugin.registering import add_kernel

        log.info("w8a8 plugin: %s", add_kernel())
    except StepAside as reason:
        log.warning("w8a8 plugin: not active, vLLM's own INT8 kernels run: %s", reason)
    except Exception:
        log.warning("w8a8 plugin: not active, vLLM's own INT8 kernels run", exc_info=True)
