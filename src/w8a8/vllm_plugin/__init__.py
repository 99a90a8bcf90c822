"""The vLLM plugin: this project's INT8 kernel in stock vLLM, wherever this package is installed beside it.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes: front end, engine
core, every worker. It writes one line to vLLM's log. If anything is unexpected, above all vLLM's version, it steps
aside with a warning, and vLLM runs as if the plugin were not there. `W8A8_VLLM_PLUGIN=0` switches it off.

`rule` decides which kernel runs where, `platform` says where this process runs, `registering` checks that our kernel
can run there, `placing` puts it among vLLM's, `kernel` is the class that vLLM chooses, and `operators` are its
computations. All but `rule` need torch, Triton and vLLM, which vLLM brings, and import little else of this package than
the Triton kernels.
"""

import logging
import os

from w8a8.vllm_plugin.rule import SWITCH, StepAside

log = logging.getLogger("vllm.w8a8")
"""A child of vLLM's logger, so that its lines look like vLLM's."""


def register() -> None:
    """Offer the kernel to the vLLM of this process. Never raises: a plugin's exception would end the server."""
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
