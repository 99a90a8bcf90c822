import math

from hypothesis import given
from hypothesis import strategies as st

from w8a8.checkpoint import DTYPE_BYTES, TensorSpec
from w8a8.plan.layout import ScaleSpec, ShardPlan, lay_out
from w8a8.sources.view import plain

QUANTIZABLE = ["BF16", "F16", "F32"]
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def shards(draw: st.DrawFn) -> tuple[tuple[TensorSpec, ...], dict[str, ScaleSpec], ShardPlan]:
    """A shard of any tensors, odd sizes and all, some of them to be quantized; and its layout."""
    tensors, scales, offset = [], {}, 100
    for i in range(draw(st.integers(0, 12))):
        quantize = draw(st.booleans())
        dtype = draw(st.sampled_from(QUANTIZABLE if quantize else sorted(DTYPE_BYTES)))
        shape = (draw(st.integers(1, 9)), draw(st.integers(1, 9))) if quantize else draw(SHAPES)
        tensors.append(TensorSpec(f"t{i}.weight", dtype, shape, "s", offset, math.prod(shape) * DTYPE_BYTES[dtype]))
        offset += tensors[-1].nbytes
        if quantize:
            scale_dtype = draw(st.sampled_from(QUANTIZABLE))
            scale_shape = draw(st.sampled_from([(shape[0],), (shape[0], 1)]))
            scales[f"t{i}.weight"] = ScaleSpec(f"t{i}.weight_scale", scale_dtype, scale_shape)
    return tuple(tensors), scales, lay_out("s", [*map(plain, tensors)], scales)


@given(shards())
def test_tensors_tile_the_shard_without_hole_or_overlap(
    sample: tuple[tuple[TensorSpec, ...], dict[str, ScaleSpec], ShardPlan],
) -> None:
    _, _, plan = sample
    position = 0
    for write in plan.writes:
        assert write.begin == position
        position = write.end
    assert plan.data_bytes == position


@given(shards())
def test_every_tensor_starts_at_a_multiple_of_its_element_size(
    sample: tuple[tuple[TensorSpec, ...], dict[str, ScaleSpec], ShardPlan],
) -> None:
    for write in sample[2].writes:
        assert write.begin % DTYPE_BYTES[write.dtype] == 0


@given(shards())
def test_every_tensor_has_the_bytes_of_its_dtype_and_shape(
    sample: tuple[tuple[TensorSpec, ...], dict[str, ScaleSpec], ShardPlan],
) -> None:
    for write in sample[2].writes:
        assert write.nbytes == math.prod(write.shape) * DTYPE_BYTES[write.dtype]


@given(shards())
def test_what_streams_keeps_the_sources_order(
    sample: tuple[tuple[TensorSpec, ...], dict[str, ScaleSpec], ShardPlan],
) -> None:
    tensors, _, plan = sample
    order = {tensor.name: i for i, tensor in enumerate(tensors)}
    places = [order[write.source] for write in plan.writes[: plan.streamed]]
    assert places == sorted(places)
    assert all(write.kind != "scale" for write in plan.writes[: plan.streamed])
    assert plan.writes[plan.streamed :] == plan.tail


@given(shards())
def test_each_source_tensor_is_written_once_and_each_quantized_one_has_a_scale(
    sample: tuple[tuple[TensorSpec, ...], dict[str, ScaleSpec], ShardPlan],
) -> None:
    tensors, scales, plan = sample
    written = {write.name: write for write in plan.writes}
    assert len(written) == len(plan.writes) == len(tensors) + len(scales)
    for tensor in tensors:
        write, spec = written[tensor.name], scales.get(tensor.name)
        assert write.shape == tensor.shape
        if spec is None:
            assert (write.kind, write.dtype, write.nbytes) == ("copy", tensor.dtype, tensor.nbytes)
        else:
            scale = written[spec.name]
            assert (write.kind, write.dtype) == ("codes", "I8")
            assert (scale.kind, scale.source, scale.dtype) == ("scale", tensor.name, spec.dtype)
            assert scale.shape == spec.shape


@given(shards())
def test_only_scales_and_tensors_of_odd_size_wait_for_the_end(
    sample: tuple[tuple[TensorSpec, ...], dict[str, ScaleSpec], ShardPlan],
) -> None:
    for write in sample[2].tail:
        assert write.kind == "scale" or write.nbytes % 8 != 0


def test_an_empty_shard_has_no_bytes() -> None:
    assert lay_out("s", [], {}).data_bytes == 0
