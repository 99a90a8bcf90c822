"""Damage files, read them as the commands do, and say what went wrong: `python -m tests.fuzzing.run INPUTS [SEED]`.

An input is right if it is read, or refused by an error of the family in a message of a line; within 5 seconds of
processor time, and with at most 500 MB more memory than the process had.
"""

import json
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from tests.fuzzing.mutations import mutated, no_file
from tests.fuzzing.targets import Target, targets
from w8a8.errors import W8A8Error
from w8a8.evals import paired

SECONDS, MEGABYTES, LONGEST = 5, 500, 2000


class Hang(BaseException):
    """An input took too long."""


def fuzz(inputs: int, seed: int) -> dict[str, Any]:
    """Read `inputs` damaged files; return what was found, as plain JSON values."""
    signal.signal(signal.SIGALRM, _too_long)
    paired.RESAMPLES = 10  # no matter here, and most of the time
    with TemporaryDirectory(prefix="w8a8-fuzz-") as folder:
        all_ = list(targets(Path(folder)))
        for target in all_:
            target.read(target.folder)
        started, before = time.monotonic(), _megabytes()
        outcomes: Counter[str] = Counter()
        found = [_one(all_, f"{seed}:{number}", outcomes) for number in range(inputs)]
        seconds = round(time.monotonic() - started, 1)
    return {
        "inputs": inputs,
        "seconds": seconds,
        "megabytes": _megabytes() - before,
        "outcomes": dict(outcomes.most_common()),
        "failures": [failure for failure in found if failure],
    }


def _one(all_: Sequence[Target], seed: str, outcomes: Counter[str]) -> dict[str, Any] | None:
    """Read one damaged file, and mend it again."""
    rng = random.Random(seed)
    target = rng.choices(all_, [each.share for each in all_])[0]
    path = target.folder / rng.choice(target.files)
    healthy, memory, started = path.read_bytes(), _megabytes(), time.thread_time()
    path.unlink()
    if rng.random() < 0.01:
        no_file(path, rng)
    else:
        path.write_bytes(mutated(healthy, rng))
    problem = ""
    signal.alarm(60 * SECONDS)  # by the clock, and a machine may be busy: only what waits for ever
    try:
        target.read(target.folder)
        outcomes[f"{target.name}: read"] += 1
    except W8A8Error as error:
        outcomes[f"{target.name}: {type(error).__name__}"] += 1
        if len(str(error)) > LONGEST or "\n" in str(error):
            problem = f"a message of {len(str(error))} characters: {str(error)[:300]}"
    except BaseException:  # noqa: BLE001 - whatever it is, it is reported
        problem = traceback.format_exc()[-3000:]
    finally:
        signal.alarm(0)
    seconds, grown = time.thread_time() - started, _megabytes() - memory
    if seconds > SECONDS or grown > MEGABYTES:
        problem += f"\ntook {seconds:.1f} s and {grown} MB"
    _remove(path)
    path.write_bytes(healthy)
    return {"seed": seed, "target": target.name, "file": path.name, "problem": problem} if problem else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _megabytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000


def _too_long(number: int, frame: FrameType | None) -> None:
    raise Hang


if __name__ == "__main__":
    json.dump(fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0), sys.stdout)
