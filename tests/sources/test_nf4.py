"""bitsandbytes' NF4, against its layout spelled out in torch: see the definitions that `sources/nf4.py` names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sources.decoding import LAYER, Tensors, same, written
from w8a8.errors import SourceError
from w8a8.plan.viewing import view_of
from w8a8.sources.rows import RowReader

WEIGHT = f"{LAYER}.weight"
OUT, IN = 24, 96


def layer(dtype: str, nested: bool, **state: Any) -> tuple[Tensors, torch.Tensor]:
    """A layer's tensors, and the weights that they mean."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (OUT * IN,), generator=generator)
    table, count = torch.linspace(-1, 1, 16).sin(), OUT * IN // 64
    absmax = torch.rand(count, generator=generator)
    tensors = {
        "": (codes[::2] << 4 | codes[1::2]).byte()[:, None],
        ".absmax": absmax,
        ".quant_map": table,
    }
    described: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": [OUT, IN], **state}
    if nested:
        steps, outer = torch.linspace(-1, 1, 256), torch.rand(-(-count // 16), generator=generator) + 0.5
        index = torch.randint(0, 256, (count,), generator=generator).byte()
        tensors |= {".absmax": index, ".nested_absmax": outer, ".nested_quant_map": steps}
        described |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.4321}
        absmax = steps[index.long()] * outer.repeat_interleave(16)[:count] + torch.tensor(0.4321)
    text = json.dumps(described).encode()
    tensors[".quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    numbers = (table[codes] * absmax.repeat_interleave(64)).reshape(OUT, IN)
    return {WEIGHT + leaf: tensor for leaf, tensor in tensors.items()}, numbers.to(getattr(torch, dtype))


def read(folder: Path, tensors: Tensors) -> torch.Tensor:
    view = view_of(written(folder, tensors))
    assert view.quantized == "bitsandbytes NF4"
    tensor = view.tensors[WEIGHT]
    values = torch.from_numpy(RowReader(folder).values(tensor))
    return values.to({"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[tensor.dtype])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_nf4(tmp_path: Path, dtype: str, nested: bool) -> None:
    tensors, reference = layer(dtype, nested)
    assert same(read(tmp_path, tensors), reference)


BROKEN: dict[str, tuple[Tensors, str]] = {
    "blocks": ({".absmax": torch.ones(35)}, r"absmax has the shape \[35\], where .* needs \[36\]"),
    "table": ({".quant_map": torch.ones(15)}, r"quant_map has the shape \[15\]"),
    "size": ({"": torch.ones(1151, 1).byte()}, r"1,151 bytes, which are no \[24, 96\] weights of 4 bits"),
    "NaN": ({".absmax": torch.full((36,), torch.nan)}, "absmax holds 36 values that are NaN"),
    "JSON": ({".quant_state.bitsandbytes__nf4": torch.ones(9).byte()}, "holds no JSON that can be read"),
    "state": ({".quant_state.bitsandbytes__nf4": torch.tensor([123, 125]).byte()}, "states no shape, dtype and block"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_is_refused(tmp_path: Path, kind: str) -> None:
    change, said = BROKEN[kind]
    tensors = layer("bfloat16", nested=False)[0] | {WEIGHT + leaf: tensor for leaf, tensor in change.items()}
    with pytest.raises(SourceError, match=said):
        read(tmp_path, tensors)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    tensors = layer("bfloat16", nested=False)[0]
    del tensors[f"{WEIGHT}.quant_map"]
    with pytest.raises(SourceError, match=r"lacks .*up_proj\.weight\.quant_map"):
        read(tmp_path, tensors)
