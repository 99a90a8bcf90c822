"""The job of a calibration: measure what errors cost, then carry a recipe from layer to layer.

Everything that is finished lies in a folder beside OUT, with a journal: an interrupted run goes on with the layer it
was at. Where some layers may stay in BF16, a first pass over the layers tells what quantizing each group of them costs,
and a second one calibrates the rest around those that stay.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from w8a8.calibrate import costs
from w8a8.calibrate.layers import calibrate_layers
from w8a8.calibrate.outcome import choose_kept, finished_tensors, record, say_gains
from w8a8.calibrate.request import Progress, Request
from w8a8.calibrate.room import check_room
from w8a8.calibrate.setup import Setup
from w8a8.cluster import Cluster
from w8a8.execute.run import check_apart
from w8a8.execute.shard import Finished
from w8a8.execute.staging import Staging
from w8a8.plan import Plan
from w8a8.reading import real
from w8a8.runtime.nodes import on_nodes
from w8a8.sources.view import View
from w8a8.storage.folders import lock_folder


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The result of a calibration: the plan that includes it, and its tensors by their names in the result."""

    plan: Plan
    finished: Mapping[str, Finished]


@contextmanager
def calibrated(
    name: str,
    view: View,
    request: Request,
    make: Callable[..., Plan],
    out: Path,
    *,
    overwrite: bool,
    appears: bool = True,
    cluster: Cluster | None = None,
    progress: Progress,
    notice: Callable[[str], None],
) -> Iterator[Calibrated]:
    """Calibrate the model of `view` for the folder `out`; use the result before the context ends.

    `make` makes the plan, given what calibration adds to it. `progress(layers)` shows how many layers are done: first
    those that costs are measured in, forwards and backwards, then those that are calibrated. `appears` says that `out`
    itself will be made. The files are removed when the context ends without an error; else the same job goes on from
    them.
    Raises the errors of `Staging.claim` and of `Setup.of`, DiskFullError, UnwritableError, NonFiniteWeightError.
    """
    # 1) Fail now for whatever would fail after hours: the target, the text, the model, the disk
    out = real(out)
    if appears:
        check_apart(view, out)
    with Staging.claim(out, overwrite=overwrite, appears=appears):
        pass
    plan, kept = make(), dict[str, str]()
    setup = Setup.of(name, view, plan, request, notice)
    home = out.parent / f".{out.name}.w8a8-calibration"
    gpu = setup.model.device.type == "cuda"
    with lock_folder(home, out), on_nodes(cluster, gpu=gpu, notice=notice) as hands:
        passes = 2 if request.keep_bf16 else 1
        check_room(plan, setup, home, passes)
        inputs = setup.inputs.stored(setup.model, setup.samples, home / "inputs")
        setup = replace(setup, hands=hands, inputs=inputs)
        # 2) Measure what errors cost
        measured = costs.measured_costs(home, plan, setup, progress)
        with progress(setup.model.count * passes) as done:
            # 3) Calibrate all layers
            journal = calibrate_layers(home / "first", plan, setup, measured, done)
            # 4) Leave the most damaged groups in BF16, and calibrate the rest around them
            if request.keep_bf16:
                kept = choose_kept(plan, journal.gains, setup)
                plan = make(kept=kept)
                journal = calibrate_layers(home / "second", plan, setup, measured, done)
        # 5) Say what it gained, and hand the tensors over
        say_gains(journal.gains, notice)
        finished = finished_tensors(journal.layers())
        yield Calibrated(make(kept=kept, calibration=record(finished, setup, plan, kept)), finished)
        # 6) Nothing is left to go on with
        shutil.rmtree(home, ignore_errors=True)
