"""A Ray cluster of several nodes on this machine, and what happens to nodes and workers."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

NODES = ("head", "one", "two")
STORE_BYTES = 80 << 20


class Machines:
    """Nodes with a CPU each."""

    def __init__(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        head = {"node_name": "head", "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args={**head, **self._sizes})
        self.nodes = {name: self.add(name) for name in NODES[1:]}
        self.address = str(self._cluster.address)

    _sizes: dict[str, Any] = {"num_cpus": 1, "object_store_memory": STORE_BYTES}  # noqa: RUF012

    def add(self, name: str) -> Any:
        """Start another node."""
        return self._cluster.add_node(node_name=name, **self._sizes)

    def remove(self, node: Any) -> None:
        """End a node at once, as a machine that loses its power does."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """Stop all nodes."""
        ray.shutdown()
        self._cluster.shutdown()


def raylet_of(node: Any) -> int:
    """The process that workers of a node are children of."""
    return int(node.all_processes["raylet"][0].process.pid)


def writers(folder: Path) -> Iterator[tuple[int, int]]:
    """Processes that have a file of `folder` open, and their parents."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):
                held = [link.readlink() for link in (process / "fd").iterdir()]
                if any(path.parent == folder for path in held):
                    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                    yield int(process.name), int(parent)


def stop_a_writer(folder: Path, wanted: Callable[[int], bool] = lambda _parent: True) -> int:
    """Stop a process in the middle of writing a file of `folder`, whose parent is `wanted`; return its number."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for process, parent in writers(folder):
            if wanted(parent):
                os.kill(process, signal.SIGSTOP)
                if process in dict(writers(folder)):
                    return process
                os.kill(process, signal.SIGCONT)
        time.sleep(0.005)
    raise TimeoutError(f"nobody writes into {folder}")
