"""The machine that was given the command: connects to Ray, hands tasks out, and hears what becomes of them."""

import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from w8a8.checkpoint.stream import Stopped
from w8a8.cluster.worker import BOARD_SECONDS, FLEETING, Answer, Board, Said, Site, look, perform
from w8a8.errors import ClusterError, MissingExtraError, TargetBusyError, UsageError, W8A8Error, first_line
from w8a8.version import __version__

T = TypeVar("T")

RETRIES = 4
"""How often a task is begun again whose node, worker or storage failed."""
MOST_TASKS = 256
"""The most tasks that are handed to Ray at a time: two per CPU, so that none waits for the next, but no more."""
POLL_SECONDS = 0.25
DEAD_SECONDS = 5.0
"""How long Ray may take to begin a task again whose node is dead, before we do: where a machine was cut off and nothing
closed its connections, that would be minutes. Two attempts do no harm."""
REACH_SECONDS = 10.0
"""How long the cluster's head, or the name of a run that was killed, is waited for."""
LOOK_SECONDS = 120.0
"""How long a node may take to answer; the first time it loads this package."""
NAMESPACE = "w8a8"


@dataclass(frozen=True, slots=True)
class NodeWork:
    """What a node has done: tasks, bytes of their sources, and seconds from the first's begin to the last's end."""

    node: str
    tasks: int
    bytes: int
    seconds: float

    @property
    def gb_per_second(self) -> float:
        """Gigabytes (10^9 bytes) of source per second."""
        return self.bytes / 1e9 / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        speed = {"seconds": round(self.seconds, 3), "gb_per_second": round(self.gb_per_second, 3)}
        return {"node": self.node, "tasks": self.tasks, "bytes": self.bytes, **speed}


@dataclass(frozen=True)
class Cluster:
    """A connection to a Ray cluster: the tasks that it does, and that it is handed, at a time; nodes' names by id.

    Each node has `node_cpus` CPUs, or more. `board` is where tasks say how far they are.
    """

    slots: int
    handed: int
    node_cpus: int
    names: Mapping[str, str]
    board: Any
    _done: list[tuple[int, Answer[Any]]] = field(default_factory=list)

    def nodes(self) -> tuple[NodeWork, ...]:
        """What each node has done so far, the most first."""
        found = []
        for node in {answer.node for _, answer in self._done}:
            own = [(weight, answer) for weight, answer in self._done if answer.node == node]
            seconds = max(answer.ended for _, answer in own) - min(answer.began for _, answer in own)
            found.append(NodeWork(node, len(own), sum(weight for weight, _ in own), seconds))
        return tuple(sorted(found, key=lambda work: (-work.bytes, work.node)))

    @contextmanager
    def crew(
        self,
        files: Mapping[Path, int],
        folder: Path | None = None,
        *,
        advance: Callable[[int], None],
        notice: Callable[[str], None],
    ) -> Iterator["Crew"]:
        """Begin a job of many tasks: every node sees `files` by their sizes, and writes into `folder`.

        `advance` is told of bytes as tasks do them, `notice` of tasks that are begun again. Raises `ClusterError` that
        names the node which lacks something.
        """
        import ray

        site = Site(__version__, files, folder)
        self._look(site, notice)
        crew = Crew(self, site, ray.remote(perform), advance, notice)
        ended = threading.Event()
        listener = threading.Thread(target=crew.listen, args=(ended.wait,), name="board", daemon=True)
        listener.start()
        try:
            yield crew
        finally:
            ended.set()
            listener.join()

    def _look(self, site: Site, notice: Callable[[str], None]) -> None:
        """Raise `ClusterError` unless every node that is there has what it has to have."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task, answers = ray.remote(look), {}
        for node in self.names:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            answers[node] = task.options(num_cpus=0, max_retries=1, scheduling_strategy=there).remote(site)
        for node, answer in answers.items():
            try:
                problem = ray.get(answer, timeout=LOOK_SECONDS)
            except GetTimeoutError:
                problem = f"does not answer in {LOOK_SECONDS:.0f} s"
            except RayTaskError as error:  # what was sent does not load there
                problem = f"cannot run w8a8 {__version__} ({str(error).strip().splitlines()[-1]}); install it there"
            except RayError as error:
                notice(f"node {self.names[node]} is gone: {first_line(error)}")
                continue
            if problem:
                raise ClusterError(f"node {self.names[node]} {problem}")


@dataclass
class Crew:
    """A job under way on a cluster: `call` hands a task out and waits for it, from any thread."""

    cluster: Cluster
    site: Site
    task: Any
    advance: Callable[[int], None]
    notice: Callable[[str], None]
    _told: dict[str, int] = field(default_factory=dict)
    _said: dict[str, Said] = field(default_factory=dict)
    _dead: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def call(
        self,
        label: str,
        weight: int,
        work: Callable[..., T],
        *args: Any,
        stopped: Callable[[], bool],
        node: bool = False,
        gpu: bool = False,
    ) -> T:
        """Do `work(*args, advance=)` on a node that Ray chooses, and again where it is lost; return what it gives.

        `label` tells the task from others of the job; its source has `weight` bytes. It takes a CPU, or all CPUs of a
        `node`, and a `gpu`. Raises the `W8A8Error` that the
        work raised, with label and node before its text; `ClusterError` where Ray gives up; `Stopped`.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        task = self.task.options(
            name=label,
            num_cpus=self.cluster.node_cpus if node else 1,
            num_gpus=int(gpu),
            max_retries=RETRIES,
            retry_exceptions=[*FLEETING],
            scheduling_strategy="SPREAD",
        )
        begin = partial(task.remote, label, self.cluster.names, self.site, self.cluster.board, work, *args)
        answer, given_up = begin(), set[str]()
        while not ray.wait([answer], timeout=POLL_SECONDS)[0]:
            if stopped():
                ray.cancel(answer)
                raise Stopped
            at = self._said[label].node if label in self._said else ""
            if at not in given_up and time.monotonic() - self._dead.get(at, math.inf) > DEAD_SECONDS:
                given_up.add(at)
                answer = begin()
        try:
            found: Answer[T] = ray.get(answer)
        except RayTaskError as error:
            if isinstance(error.cause, W8A8Error):
                raise error.cause from None
            raise
        except TaskCancelledError as error:
            raise Stopped from error
        except RayError as error:
            at = self._said[label].name if label in self._said else "?"
            raise ClusterError(
                f"{label}: lost {RETRIES + 1} times, at last on node {at} ({first_line(error)}); "
                "give the same command again to go on from here"
            ) from error
        with self._lock:
            self.cluster._done.append((weight, found))
        with suppress(RayError):
            self._hear(label, ray.get(self.cluster.board.end.remote(label), timeout=BOARD_SECONDS))
        self._tell(label, weight)
        return found.value

    def listen(self, wait: Callable[[float], bool]) -> None:
        """Pass on what the board says, until `wait(seconds)` is true, and once more then; see which nodes are dead."""
        import ray

        ended = False
        while not ended:
            ended = wait(POLL_SECONDS)
            with suppress(ray.exceptions.RayError):
                for label, said in ray.get(self.cluster.board.read.remote(), timeout=BOARD_SECONDS).items():
                    self._hear(label, said)
                for node in ray.nodes():
                    if not node["Alive"]:
                        self._dead.setdefault(node["NodeID"], time.monotonic())

    def _hear(self, label: str, said: Said | None) -> None:
        """Take in what the board says of a task, and pass it on."""
        if said is None:
            return
        with self._lock:
            heard = self._said[label].times if label in self._said else 1
            self._said[label] = said
        if said.times > heard:
            self.notice(f"{label}: failed or was lost on node {said.before}; begun again on node {said.name}")
        self._tell(label, said.done)

    def _tell(self, label: str, done: int) -> None:
        """Tell of bytes that were not told of: a task that begins again has done some already."""
        with self._lock:
            more = done - self._told.get(label, 0)
            if more > 0:
                self._told[label] = done
                self.advance(more)


@contextmanager
def connected(address: str, job: str, workers: int | None = None, *, here: int = 1) -> Iterator[Cluster]:
    """Connect to Ray at `address`: `local` starts it on this machine with `here` CPUs, `auto` joins the cluster that
    this machine belongs to, `host:port` the one whose head that is.

    `job` is a name that no other run on the cluster may have at the same time. `workers` is the number of tasks at a
    time; default: one per CPU of the cluster.
    Where this process is connected already, that connection is used, and stays.
    Raises `MissingExtraError`, `UsageError`, `ClusterError`, `TargetBusyError`.
    """
    try:
        import ray
    except ModuleNotFoundError as missing:
        raise MissingExtraError(
            f"the package {missing.name} is not installed; --ray needs it: pip install 'w8a8[ray]'"
        ) from missing
    ours = not ray.is_initialized()
    if ours:
        _connect(address, workers or here)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        if not nodes:
            raise ClusterError(f"{address}: no node of the Ray cluster has a CPU for tasks")
        cpus = [int(node["Resources"]["CPU"]) for node in nodes]
        slots = sum(cpus)
        board = _board(job)
        try:
            yield Cluster(workers or slots, workers or min(2 * slots, MOST_TASKS), min(cpus), _named(nodes), board)
        finally:
            ray.kill(board)
    finally:
        if ours:
            ray.shutdown()


def _connect(address: str, cpus: int) -> None:
    import ray

    # 1) What Ray says goes to standard output, where results belong; what matters of it, we say
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    options: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False}
    # 2) An address that nobody is at is known soon
    if address not in {"local", "auto"}:
        _reach(address)
    # 3) It takes SIGTERM over, which is the command's
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(options if address == "local" else {}),
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        none = address == "auto" and isinstance(error, ConnectionError)
        found = "this machine belongs to no Ray cluster" if none else first_line(error)
        start = "`ray start` on this machine makes it one of a cluster's; --ray local starts one here"
        raise ClusterError(f"--ray {address}: {found}; {start}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _reach(address: str) -> None:
    """Raise unless a Ray cluster's head answers at `address`: Ray itself would go on asking for minutes."""
    import ray

    match = re.fullmatch(r"(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})", address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise UsageError(f"--ray: {address!r} is no address; give local, auto or host:port")
    try:
        socket.create_connection((match["host"].strip("[]"), int(match["port"])), REACH_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"--ray {address}: nobody answers there ({error.strerror or error})") from error
    try:
        ray._raylet.GcsClient(address=address)
    except ray.exceptions.RayError as error:
        what = "who answers there is not the head of a Ray cluster, whose port is 6379 by default"
        raise ClusterError(f"--ray {address}: {what}") from error


def _board(name: str) -> Any:
    """Make the board of a job. Raises `TargetBusyError` where another run has one of this name."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(Board).options(
        name=name, namespace=NAMESPACE, num_cpus=0, max_restarts=-1, scheduling_strategy=here
    )
    for left in range(int(REACH_SECONDS / POLL_SECONDS), -1, -1):
        try:
            return board.remote()
        except ValueError as error:  # that of a run which was killed goes soon
            if not left:
                raise TargetBusyError(
                    f"{name}: another run on this cluster is at it; wait for it, or stop it"
                ) from error
            time.sleep(POLL_SECONDS)
    raise AssertionError


def _named(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """Names of nodes by their ids: that given to `ray start`, or the host's; and some of the id where two are alike."""
    names = {}
    for node in nodes:
        given = node.get("NodeName") or ""
        names[node["NodeID"]] = given if given not in ("", node["NodeManagerAddress"]) else node["NodeManagerHostname"]
    several = {name for name in names.values() if [*names.values()].count(name) > 1}
    return {node: f"{name}/{node[:6]}" if name in several else name for node, name in names.items()}
