"""How the loops start: quickly."""

import subprocess
import sys

CODE = """
import sys
import numpy as np
from w8a8.kernels.cpu.rows import row_amax
row_amax(np.zeros((4, 64), np.uint16))
assert "scipy.linalg" not in sys.modules, "takes a quarter of a second"
import numba
dot = numba.njit(lambda a, b: np.dot(a, b))
assert (dot(np.eye(2), np.ones((2, 2))) == 1).all()
assert "scipy.linalg" in sys.modules
"""


def test_no_scipy_is_loaded_that_nobody_needs_and_others_have_their_blas() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
