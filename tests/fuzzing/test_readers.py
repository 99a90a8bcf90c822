"""Whatever lies in a file, its readers end with a result or an error of the family, soon and in little memory.

`W8A8_FUZZ` says how many damaged files are read; `make fuzz` reads 300,000.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzzing.mutations import mutated
from tests.fuzzing.run import MEGABYTES

pytestmark = pytest.mark.slow

INPUTS = int(os.environ.get("W8A8_FUZZ", "2000"))
ROOT = Path(__file__).parents[2]


def test_damaged_files_are_read_or_refused_and_nothing_else() -> None:
    processes = 2 if INPUTS > 10_000 else 1
    share = INPUTS // processes
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.fuzzing.run", str(share), str(seed)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        for seed in range(processes)
    ]
    found = [json.loads(run.communicate()[0]) for run in runs]

    assert [failure for each in found for failure in each["failures"]] == []
    assert max(each["megabytes"] for each in found) < MEGABYTES
    for each in found:  # the files are damaged, and not beyond all reading
        read = sum(count for outcome, count in each["outcomes"].items() if outcome.endswith(": read"))
        assert share * 0.1 < read < share * 0.9


def test_a_damage_is_the_same_by_the_same_seed() -> None:
    content = b'{"a": [1, 2, {"b": null}]}'
    assert [mutated(content, random.Random(i)) for i in range(50)] == [
        mutated(content, random.Random(i)) for i in range(50)
    ]
