"""`quantize --ray` on a cluster of several nodes, where workers, nodes, storage and the driver fail."""

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from huggingface_hub import constants

from tests.calibrate.checkpoints import make, write_text
from tests.checkpoint.hub import local_hub
from tests.checkpoints import folder_bytes, llama_tensors, write_checkpoint
from tests.cluster.machines import NODES, Machines, raylet_of, stop_a_writer
from tests.evals.kld.llamas import LETTERS, make_llama
from tests.execute.runs import finish, finished_shards, large_checkpoint, names, staging_of, start, wait_for
from w8a8 import quantize as quantize_here
from w8a8 import verify
from w8a8.cluster import connected, driver, worker
from w8a8.errors import ClusterError, MissingExtraError, NonFiniteWeightError, TargetBusyError, UsageError, W8A8Error
from w8a8.evals.kld import run as kld
from w8a8.execute import ShardRecord, execute
from w8a8.execute.shard import ShardJob
from w8a8.execute.spread import quantize_group, take
from w8a8.quantization import Options, QuantizeResult, prepare
from w8a8.version import __version__

pytestmark = pytest.mark.slow

SHARDS = 7
SHARD_MB = 24

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    machines = Machines()
    try:
        ray.init(address=machines.address, log_to_driver=False, logging_level="ERROR")
        yield machines
    finally:
        machines.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_checkpoint(tmp_path_factory.mktemp("spread") / "source", shards=SHARDS, shard_mb=SHARD_MB)


@pytest.fixture(scope="module")
def whole(source: Path) -> Files:
    """What one machine makes of it."""
    quantize_here(source, source.with_name("whole"))
    return folder_bytes(source.with_name("whole"))


@pytest.fixture
def out(source: Path) -> Iterator[Path]:
    out = source.with_name("out")
    yield out
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(staging_of(out), ignore_errors=True)


def attempts(out: Path) -> Path:
    return staging_of(out) / "attempts"


def disturbed(
    machines: Machines, source: Path, out: Path, disturb: Callable[[], object]
) -> tuple[QuantizeResult, list[str]]:
    """Quantize on the cluster, while `disturb` does its worst; the result, and what the user was told."""
    told: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        disturbing = pool.submit(disturb)
        result = quantize_here(source, out, ray=machines.address, notice=told.append)
        disturbing.result()
    return result, told


# --- what a run gives --------------------------------------------------------------------------------------------


def test_nodes_make_the_bytes_that_one_machine_makes(machines: Machines, source: Path, whole: Files, out: Path) -> None:
    done: list[int] = []
    result = quantize_here(source, out, ray=machines.address, advance=done.append)
    assert folder_bytes(out) == whole
    assert sum(done) == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert {work.node for work in result.nodes} <= set(NODES)
    assert len(result.nodes) > 1
    assert sum(work.bytes for work in result.nodes) == sum(done)
    assert sum(work.tasks for work in result.nodes) == SHARDS
    assert all(work.gb_per_second > 0 for work in result.nodes)
    assert not staging_of(out).exists()


def test_small_shards_share_a_task(machines: Machines, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", llama_tensors(layers=4), shards=36)
    result = quantize_here(source, tmp_path / "out", ray=machines.address)
    quantize_here(source, tmp_path / "whole")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert len(NODES) <= sum(work.tasks for work in result.nodes) < 36


def test_nodes_find_what_one_machine_finds(machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "source", llama_tensors(), shards=3)
    monkeypatch.chdir(tmp_path)  # nodes are in other folders
    quantize_here("source", "out", ray=machines.address)
    done: list[int] = []
    here, there = verify("out", "source"), verify("out", "source", ray=machines.address, advance=done.append)
    assert there.ok
    assert replace(there, nodes=()) == here
    assert sum(work.bytes for work in there.nodes) == sum(done)
    assert sum(done) == sum(path.stat().st_size for path in Path("source").glob("*.safetensors"))
    shard = next(Path("out").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-9000] ^= 1
    shard.write_bytes(content)
    here, there = verify("out", "source"), verify("out", "source", ray=machines.address)
    assert not there.ok
    assert replace(there, nodes=()) == here


@contextmanager
def one_thread() -> Iterator[None]:
    """As Ray gives one to a task with one CPU; with more, sums are made in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def test_samples_run_by_nodes_choose_the_codes_that_one_machine_chooses(machines: Machines, tmp_path: Path) -> None:
    source, text = make(tmp_path / "source", num_hidden_layers=2), write_text(tmp_path)
    options = Options(recipe="auto", calibration=str(text), samples=10, tokens=48)
    with one_thread():
        quantize_here(source, tmp_path / "here", options)
    result = quantize_here(source, tmp_path / "there", options, ray=machines.address)
    assert folder_bytes(tmp_path / "there") == folder_bytes(tmp_path / "here")
    assert result.plan.calibration is not None
    assert names(tmp_path) == ["here", "miller.txt", "source", "there"]


def test_layers_run_by_nodes_predict_what_they_predict_here(machines: Machines, tmp_path: Path) -> None:
    pair, text = (make_llama(tmp_path / "one", seed=1), make_llama(tmp_path / "two", seed=2)), LETTERS
    job = kld.prepare(*pair, text, tokens=200, context=16, stream=True)
    steps: list[int] = []
    with one_thread():
        here, there = kld.run(job), kld.run(job, ray=machines.address, advance=steps.append)
    assert replace(there, seconds=here.seconds) == here
    assert sum(steps) == job.steps
    with pytest.raises(UsageError, match="add --stream"):
        kld.run(replace(job, streamed=False), ray=machines.address)


def test_a_model_on_the_hub_arrives_in_the_shared_folder(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "source", llama_tensors(), shards=4)
    with local_hub({"org/llama": folder_bytes(source)}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        quantize_here("org/llama", tmp_path / "out", ray=machines.address, disk_budget=40_000)
        quantize_here("org/llama", tmp_path / "whole")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert not staging_of(tmp_path / "out").exists()


# --- what is lost is made again ----------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced(machines: Machines, source: Path, whole: Files, out: Path) -> None:
    result, told = disturbed(machines, source, out, lambda: os.kill(stop_a_writer(attempts(out)), signal.SIGKILL))
    assert folder_bytes(out) == whole
    assert [line for line in told if "begun again on node" in line] != []
    assert sum(work.tasks for work in result.nodes) == SHARDS


def test_a_lost_nodes_work_is_done_elsewhere(machines: Machines, source: Path, whole: Files, out: Path) -> None:
    lost = machines.add("lost")
    raylet = raylet_of(lost)

    def lose() -> None:
        stop_a_writer(attempts(out), lambda parent: parent == raylet)
        machines.remove(lost)

    result, told = disturbed(machines, source, out, lose)
    assert [line for line in told if "was lost on node lost; begun again" in line] != []
    assert sum(work.tasks for work in result.nodes) == SHARDS
    assert folder_bytes(out) == whole
    assert not staging_of(out).exists()


def test_a_node_that_was_given_up_and_still_writes_harms_nothing(source: Path, whole: Files, out: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    late: list[Path] = []

    def slow(job: ShardJob) -> None:
        def advance(_: int) -> None:
            begun.set()
            go_on.wait(60)

        [(file, _)] = quantize_group([job], attempts(out), None, advance=advance)
        late.append(file)

    def carry(jobs: Sequence[ShardJob], *_: object, record: Callable[[ShardRecord], None], **__: object) -> None:
        attempts(out).mkdir()
        given_up = threading.Thread(target=slow, args=jobs[:1])
        given_up.start()
        begun.wait(60)
        for job in jobs:
            [(file, shard)] = quantize_group([job], attempts(out), None, advance=lambda _: None)
            take(file, job, shard)
            record(shard)
        go_on.set()
        given_up.join()

    job = prepare(source)
    execute(job.plan, job.view, out, job.format.arithmetic, carry=carry)
    assert not late[0].exists()
    assert folder_bytes(out) == whole
    assert not staging_of(out).exists()


def test_storage_that_fails_for_a_while_is_tried_again(
    machines: Machines, source: Path, whole: Files, out: Path
) -> None:
    away, done = source.with_name("away"), list[int]()

    def fail() -> None:
        while not finished_shards(out):
            time.sleep(0.01)
        source.rename(away)
        time.sleep(worker.GRACE_SECONDS + 1.5)  # longer than a task waits for files before it fails
        done.append(finished_shards(out))
        away.rename(source)

    disturbed(machines, source, out, fail)
    assert done[0] < SHARDS  # nothing more could be read meanwhile
    assert folder_bytes(out) == whole


def test_a_killed_driver_goes_on_behind_what_its_nodes_had_finished(
    machines: Machines, source: Path, whole: Files, out: Path
) -> None:
    process = start(source, out, "--ray", machines.address)
    wait_for(lambda: finished_shards(out) > 1, process)
    process.kill()
    process.communicate()
    done = finished_shards(out)
    assert SHARDS > done > 1
    result = quantize_here(source, out, ray=machines.address)
    assert result.resumed == done
    assert sum(work.tasks for work in result.nodes) == SHARDS - done
    assert folder_bytes(out) == whole
    assert not staging_of(out).exists()


# --- what is refused, and what is interrupted -------------------------------------------------------------------


def test_an_interrupted_run_ends_and_goes_on(machines: Machines, source: Path, whole: Files, out: Path) -> None:
    process = start(source, out, "--ray", machines.address)
    wait_for(lambda: finished_shards(out) > 0, process)
    process.send_signal(signal.SIGINT)
    code, _, stderr = finish(process)
    assert code == 130
    assert "give the same command again to go on from here" in stderr
    assert "Traceback" not in stderr
    done = finished_shards(out)
    assert 0 < done < SHARDS
    assert quantize_here(source, out, ray=machines.address).resumed == done
    assert folder_bytes(out) == whole


def test_of_two_runs_one_makes_the_result(
    machines: Machines, source: Path, whole: Files, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "REACH_SECONDS", 0.5)
    process = start(source, out, "--ray", machines.address, "--log-json")
    wait_for(lambda: attempts(out).exists(), process)
    with pytest.raises(TargetBusyError, match="another run is writing it now"):
        quantize_here(source, out)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # as network file systems do on two machines
    with pytest.raises(TargetBusyError, match="another run on this cluster"):
        quantize_here(source, out, ray=machines.address)
    code, result, stderr = finish(process)
    assert code == 0, stderr
    assert sum(work["tasks"] for work in result["nodes"]) == SHARDS
    [end] = [event for event in map(json.loads, stderr.splitlines()) if event["event"] == "end"]
    assert end["nodes"] == result["nodes"]
    assert folder_bytes(out) == whole
    assert not staging_of(out).exists()


def test_an_error_on_a_node_comes_back_as_itself_with_node_and_shard(machines: Machines, tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][1][5, 3] = np.nan
    source = write_checkpoint(tmp_path / "source", tensors, shards=3)
    said = r"model-0000\d-of-00003.safetensors on node (head|one|two): .* has NaN in row 5"
    with pytest.raises(NonFiniteWeightError, match=said):
        quantize_here(source, tmp_path / "out", ray=machines.address)
    assert names(tmp_path) == ["source"]


def test_a_node_with_another_version_is_named(
    machines: Machines, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "__version__", "99.1")
    with pytest.raises(ClusterError, match=rf"node (head|one|two) has w8a8 {__version__}, and this run is of 99.1"):
        quantize_here(source, out, ray=machines.address)


def test_a_node_that_does_not_see_the_files_is_named(machines: Machines, tmp_path: Path) -> None:
    with (
        connected(machines.address, "looking") as cluster,
        pytest.raises(ClusterError, match=rf"node (head|one|two) does not see {tmp_path}/gone; every node"),
        cluster.crew({tmp_path / "gone": 3}, advance=lambda _: None, notice=lambda _: None),
    ):
        pass


def test_a_file_that_is_another_on_a_node_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GRACE_SECONDS", 0.2)
    (tmp_path / "there").write_bytes(b"123")
    assert worker.Site(__version__, {tmp_path / "there": 4}).problem().startswith(f"sees another {tmp_path}/there;")
    assert worker.Site(__version__, {tmp_path / "there": 3}, tmp_path).problem() == ""
    assert "cannot write into" in worker.Site(__version__, {}, tmp_path / "there").problem()


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        ("nonsense", UsageError, "give local, auto or host:port"),
        ("ray://head:10001", UsageError, "give local, auto or host:port"),
        ("localhost:1", ClusterError, "nobody answers there"),
    ],
)
def test_an_address_without_a_cluster_is_refused(
    source: Path, out: Path, address: str, error: type[W8A8Error], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(error, match=said):
        quantize_here(source, out, ray=address)
    assert not staging_of(out).exists()


def test_without_ray_the_extra_is_named(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'w8a8\[ray\]'"):
        quantize_here(source, out, ray="local")
