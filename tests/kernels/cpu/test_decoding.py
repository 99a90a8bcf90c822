"""The loops behind decoders that no spelling's own test covers in every shape."""

import numpy as np
import pytest

from w8a8.kernels.cpu.decoding import turned


@pytest.mark.parametrize("kind", ["u2", "f4"])
@pytest.mark.parametrize("shape", [(32, 48), (20, 4), (4, 20), (33, 70), (1, 5)])
def test_a_turned_matrix_is_its_transpose(shape: tuple[int, int], kind: str) -> None:
    matrix = np.random.default_rng(0).integers(0, 65536, shape).astype(kind)
    assert np.array_equal(turned(matrix), matrix.T)
