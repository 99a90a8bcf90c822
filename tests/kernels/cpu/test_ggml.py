"""ggml's blocks are decoded as the package gguf decodes them, bit for bit."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from w8a8.checkpoint.gguf import GGML_TYPES
from w8a8.kernels.cpu.ggml import DECODED, decode_blocks

SIZES = {known.name: (known.elements, known.nbytes) for known in GGML_TYPES.values()}


@pytest.mark.parametrize("name", sorted(DECODED))
def test_every_bit_is_the_packages(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(7).integers(0, 256, (1500, nbytes), np.uint8)  # any bytes are a block
    with np.errstate(all="ignore"):  # F16 infinities and NaN among them
        expected = dequantize(blocks, kind)
    exact = np.empty((len(blocks), elements), np.uint32)
    decode_blocks(name, blocks, exact)
    finite = np.isfinite(expected)
    assert finite.mean() > 0.5
    np.testing.assert_array_equal(exact[finite], expected.view(np.uint32)[finite])
    assert not np.isfinite(exact.view(np.float32)[~finite]).any()
    bf16 = np.empty((len(blocks), elements), np.uint16)
    decode_blocks(name, blocks, bf16)
    words = expected.view(np.uint32).astype(np.uint64)
    np.testing.assert_array_equal(bf16[finite], ((words + 0x7FFF + (words >> 16 & 1)) >> 16)[finite])


def test_sizes_are_the_packages() -> None:
    theirs = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {number: tuple(known) for number, known in GGML_TYPES.items() if number in theirs}.items() <= theirs.items()
    assert len(GGML_TYPES.keys() & theirs) >= 30
