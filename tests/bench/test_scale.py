"""`w8a8 bench scale`: the model of what bounds a run, and the measured runs that it is compared with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w8a8.bench import quantize, scale
from w8a8.bench.bounds import FOLDER, HUB, NODES, SIZES, Speeds, Work, bounds, forecast, forecasts

SPEEDS = Speeds(
    read=8e9,
    sha256=1e9,
    bf16=4e9,
    fp8=1e9,
    write=4e9,
    arrive=0.5e9,
    disk_read=2e9,
    disk_write=1e9,
    network=1e9,
    start=1,
)
WORK = Work(200e9, 100e9, 40)


def test_each_part_takes_its_time() -> None:
    found = bounds(WORK, SPEEDS, nodes=2, cores=10, workers=8)
    making = 1 / 4 + (1 / 1 + 1 / 4) / 2  # seconds per GB of the source
    assert found["cores"] == pytest.approx(200 * (making + 1 / 8) / 20)
    assert found["shards"] == pytest.approx(3 * 5 * making)  # 40 shards of 5 GB, 16 at a time
    assert found["disk"] == pytest.approx((200 / 2 + 100 / 1) / 2)
    assert "network" not in found
    assert bounds(replace(WORK, cached=True), SPEEDS, nodes=1, cores=10, workers=8)["disk"] == pytest.approx(100)


def test_from_hub_to_hub_bytes_come_and_go() -> None:
    work = Work(100e9, 100e9, 20, fp8=True, way=HUB)
    found = bounds(work, SPEEDS, nodes=1, cores=10, workers=10)
    assert found["network"] == pytest.approx(100)
    assert found["disk"] == pytest.approx(200)
    assert found["cores"] == pytest.approx(100 * (1 / 1 + 1 / 1 + 1 / 4 + 1 / 8 + 1 / 0.5 + 1 / 8) / 10)
    assert bounds(work, SPEEDS, nodes=64, cores=10, workers=10)["network"] == pytest.approx(100)  # through one machine
    assert bounds(work, SPEEDS, nodes=64, cores=10, workers=10)["cores"] == pytest.approx(100 * (1 / 0.5 + 1 / 8) / 10)


@pytest.mark.parametrize(
    ("slow", "bound"),
    [({"sha256": 1e7}, "cores"), ({"disk_write": 1e7}, "disk"), ({"network": 1e7}, "network")],
)
def test_the_slowest_part_bounds_the_run(slow: dict[str, float], bound: str) -> None:
    seconds, found = forecast(replace(WORK, way=HUB), replace(SPEEDS, **slow), cores=4, workers=4)
    assert found == bound
    assert seconds > 1000


def test_one_shard_is_one_worker_s() -> None:
    assert forecast(replace(WORK, shards=1), SPEEDS, nodes=64, cores=64, workers=8)[1] == "shards"


@given(st.sampled_from([FOLDER, HUB]), st.integers(1, 500), st.integers(1, 64), st.integers(1, 32))
def test_more_of_anything_never_takes_longer(way: str, shards: int, nodes: int, cores: int) -> None:
    work = replace(WORK, way=way, shards=shards)
    least, _ = forecast(work, SPEEDS, nodes=nodes, cores=cores, workers=cores)
    assert forecast(work, SPEEDS, nodes=2 * nodes, cores=cores, workers=cores)[0] <= least
    assert forecast(work, SPEEDS, nodes=nodes, cores=2 * cores, workers=2 * cores)[0] <= least
    assert (
        forecast(work, replace(SPEEDS, network=9e9, disk_write=9e9), nodes=nodes, cores=cores, workers=cores)[0]
        <= least
    )


def test_every_size_is_forecast_for_every_number_of_nodes() -> None:
    found = list(forecasts(SPEEDS, 8, 8))
    assert len(found) == len({(f.size, f.source, f.way, f.nodes) for f in found}) == len(SIZES) * 2 * 2 * len(NODES)
    (whole,) = [f for f in found if (f.size, f.source, f.way, f.nodes) == ("671B", "FP8", HUB, 1)]
    assert whole.seconds == pytest.approx(1 + 2 * 671)
    assert whole.bound == "disk"


@pytest.mark.slow
def test_runs_are_measured_and_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "LAYER", {"mlp.down_proj": (2048, 4096)})
    monkeypatch.setattr(quantize, "LAYER_BYTES", 2 * 2048 * 4096)
    monkeypatch.setattr(scale, "TURNS", 1)
    said: list[object] = []
    found = scale.bench(0.1, shards=2, megabytes=1000, runs=1, folder=tmp_path)
    scale.show(found, said.append)
    written = json.loads(json.dumps(found.to_dict()))
    assert written["bytes"] > 90e6
    assert written["shards"] == 2
    assert [point["workers"] for point in written["points"]][:1] == [1]
    assert all(point["predicted"] > written["speeds"]["start"] > 0 for point in written["points"])
    assert all(value > 0 for value in written["speeds"].values())
    assert sum("seconds" in forecast for forecast in written["forecasts"]) == len(found.forecasts)
    assert "the model" in str(said)
    assert [entry.name for entry in tmp_path.iterdir()] == ["gemma-4-31b-layers-0.1GiB-in-2"]
