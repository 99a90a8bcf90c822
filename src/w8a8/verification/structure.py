"""Checks by headers, config and index alone: every source tensor accounted for, and nothing else there."""

from collections.abc import Iterator

from w8a8.checkpoint import Checkpoint, Shaped, TensorSpec
from w8a8.checkpoint.reader import INDEX, read_index
from w8a8.checkpoint.stream import file_sha256
from w8a8.formats import without_empty
from w8a8.plan import QUANTIZABLE, is_linear, module_name, scale_name
from w8a8.reading import show
from w8a8.verification.job import Job


def scale_of(tensor: Shaped, out: Checkpoint) -> TensorSpec | None:
    """Find the scale of a quantized `tensor` in `out`."""
    return out.tensors.get(scale_name(tensor.name))


def is_quantized(tensor: Shaped, job: Job) -> bool:
    """Whether the source's `tensor` is INT8 in the result."""
    made = job.out.tensors.get(tensor.name)
    return made is not None and made.dtype == "I8" and tensor.dtype in QUANTIZABLE


def structure_problems(job: Job) -> Iterator[str]:
    """Check that every source tensor is there, with its shape and a fitting scale, and nothing else."""
    if not job.scheme.w8a8:
        yield f"config.json: does not declare INT8 W8A8 per channel and per token ({job.scheme.summary})"
    scales = set()
    for tensor in job.source.tensors.values():
        made = job.out.tensors.get(tensor.name)
        if made is None:
            yield f"{tensor.name}: in the source, missing from the result"
            continue
        if made.shape != tensor.shape:
            yield f"{tensor.name}: {list(tensor.shape)} in the source, {list(made.shape)} in the result"
        elif is_quantized(tensor, job):
            scale = scale_of(tensor, job.out)
            scales.add(scale_name(tensor.name))
            yield from scale_shape_problems(tensor, scale)
            if job.scheme.leaves_alone(module_name(tensor.name)):
                yield f"{tensor.name}: INT8, but config.json excludes it, so engines would take it for {tensor.dtype}"
        elif made.dtype != tensor.dtype:
            yield f"{tensor.name}: {tensor.dtype} in the source, {made.dtype} in the result"
    for pattern in job.scheme.unusable:
        yield f"config.json: {show(pattern)}, which it excludes, is no pattern that engines can use"
    for name in job.out.tensors.keys() - job.source.tensors.keys() - scales:
        yield f"{name}: in the result, but neither in the source nor the scale of a quantized tensor"


def scale_shape_problems(tensor: Shaped, scale: TensorSpec | None) -> Iterator[str]:
    """Say what is wrong with the scale of a quantized `tensor`."""
    rows = tensor.shape[0] if tensor.shape else 0
    if len(tensor.shape) != 2:
        yield f"{tensor.name}: INT8, but {list(tensor.shape)} is no matrix, so it has no channels to check"
    elif scale is None:
        yield f"{tensor.name}: INT8, but it has no weight_scale"
    elif scale.shape not in {(rows,), (rows, 1)} or scale.dtype not in QUANTIZABLE:
        yield f"{scale.name}: {scale.dtype} {list(scale.shape)} is no scale for {rows} rows"


def bookkeeping_problems(job: Job) -> Iterator[str]:
    """Check that config, index and sidecars are the source's, apart from what quantizing adds."""
    theirs, ours = without_empty(job.out.config), without_empty(job.source.config)
    theirs.pop("quantization_config", None)
    if theirs != ours:
        changed = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
        yield f"config.json: differs from the source's in {', '.join(changed)}"
    if job.out.indexed:
        total = read_index(job.out.path).total_size
        if total != job.out.nbytes:
            yield f"{INDEX}: total_size is {show(total)}, the tensors have {job.out.nbytes} bytes"
    for name in job.source.sidecars:
        if name != "config.json" and name not in job.out.sidecars:
            yield f"{name}: beside the source, missing beside the result"
        elif name != "config.json" and file_sha256(job.source.home / name) != file_sha256(job.out.path / name):
            yield f"{name}: is not the source's"


def exclude_warnings(job: Job) -> Iterator[str]:
    """Name linear layers that are unquantized but not excluded: engines would build them as INT8."""
    for tensor in job.source.tensors.values():
        if is_linear(tensor, job.rules.judge(tensor).component) and not is_quantized(tensor, job):
            module = module_name(tensor.name)
            if not job.scheme.leaves_alone(module):
                yield f"{module}: left in {tensor.dtype}, but config.json does not exclude it by name"
