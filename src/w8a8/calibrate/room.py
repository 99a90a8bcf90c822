"""What a calibration needs on the disk, and whether it is there."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from w8a8.calibrate.costs import probed
from w8a8.calibrate.setup import Setup
from w8a8.errors import DiskFullError
from w8a8.execute.run import SLACK_BYTES
from w8a8.plan import Plan


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes on the disk: the most that there is at once, some slack included, and what of it stays as the result."""

    needed: int
    result: int


def room_for(plan: Plan, setup: Setup, passes: int) -> Room:
    """Count what `passes` passes over the layers write, and then the result."""
    samples = len(setup.samples)
    codes = sum(decision.tensor.numel for decision in plan.decisions if decision.quantize)
    sample = next(setup.embedded([0])).hidden.nbytes
    passing = passes * codes + (passes + 1) * samples * sample + plan.bytes_out
    probing = len(probed(samples, setup.tokens)) * sample * (setup.model.count + 1)
    return Room(max(passing, probing) + SLACK_BYTES, plan.bytes_out)


def check_room(plan: Plan, setup: Setup, home: Path, passes: int) -> None:
    """Raise DiskFullError unless the disk has room for calibration's files, and then the result.

    Files of an interrupted run count as room.
    """
    needed = room_for(plan, setup, passes).needed
    there = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
    free = shutil.disk_usage(home).free
    if needed > free + there:
        if not there:
            home.rmdir()
        raise DiskFullError(
            f"{home.parent}: calibrating needs {(needed - there) / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some space or choose another disk"
        )
