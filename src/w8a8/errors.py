"""Every error of this tool, as one family.

Each error says what was found, where, and what to do, and carries the exit code the command line ends with. Codes are
part of the interface: scripts may rely on them, so a code is never reused for another meaning.
"""

from typing import ClassVar


class W8A8Error(Exception):
    """Base of every error a user can act on."""

    exit_code: ClassVar[int] = 1


def first_line(error: BaseException) -> str:
    """Give the first line of another library's error, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class UsageError(W8A8Error):
    """The request itself does not make sense (an unknown format, a glob that matches nothing)."""

    exit_code = 2


# --- the source checkpoint: 10-29 ---------------------------------------------------------------------------------


class SourceNotFoundError(W8A8Error):
    """Neither a local folder nor something the Hub could deliver."""

    exit_code = 10


class NoConfigError(W8A8Error):
    """There is no readable config.json."""

    exit_code = 11


class PickleOnlyError(W8A8Error):
    """Only pickled weights (.bin, .pt) are there; they are never opened."""

    exit_code = 12


class NoWeightsError(W8A8Error):
    """No safetensors weights were found."""

    exit_code = 13


class InvalidIndexError(W8A8Error):
    """model.safetensors.index.json is not a valid index."""

    exit_code = 14


class MissingShardError(W8A8Error):
    """The index names a shard that is not in the folder."""

    exit_code = 15


class MissingTensorError(W8A8Error):
    """The index names a tensor that its shard does not contain."""

    exit_code = 16


class DuplicateTensorError(W8A8Error):
    """A tensor name occurs twice."""

    exit_code = 17


class PathEscapeError(W8A8Error):
    """A path leads out of the checkpoint's folder."""

    exit_code = 18


class HeaderError(W8A8Error):
    """A safetensors header is not what the format allows."""

    exit_code = 19


class HeaderTooLargeError(HeaderError):
    """A safetensors header claims more bytes than its file has, or than any real header needs."""

    exit_code = 20


class TruncatedShardError(HeaderError):
    """A shard ends before its last tensor does."""

    exit_code = 21


class OffsetsError(HeaderError):
    """Tensor byte ranges overlap, leave holes, or run backwards."""

    exit_code = 22


class TensorSizeError(HeaderError):
    """A tensor's dtype and shape do not multiply to its byte range."""

    exit_code = 23


class NonFiniteWeightError(W8A8Error):
    """A weight that is to be quantized contains NaN or infinity."""

    exit_code = 24


class AlreadyQuantizedError(W8A8Error):
    """The source is itself a quantized checkpoint."""

    exit_code = 25


class UnreadableError(W8A8Error):
    """A file or folder of the source cannot be read."""

    exit_code = 26


class SourceChangedError(W8A8Error):
    """A source file changed while it was being read."""

    exit_code = 27


class HubError(W8A8Error):
    """The Hub refused, or could not be reached."""

    exit_code = 28


class SourceError(AlreadyQuantizedError):
    """The source's quantized weights cannot be decoded: a scale is missing, or has a wrong shape, dtype or value."""

    exit_code = 29


# --- the plan: 30-39 ----------------------------------------------------------------------------------------------


class FusedGroupError(W8A8Error):
    """Layers that engines fuse into one would be quantized only in part."""

    exit_code = 30


class NothingToQuantizeError(W8A8Error):
    """The rules select no tensor at all."""

    exit_code = 31


# --- the target: 40-49 --------------------------------------------------------------------------------------------


class TargetExistsError(W8A8Error):
    """OUT is already there."""

    exit_code = 40


class TargetBusyError(W8A8Error):
    """Another run is writing the same OUT."""

    exit_code = 41


class DiskFullError(W8A8Error):
    """There is not, or no longer, enough room for the result."""

    exit_code = 42


class UnwritableError(W8A8Error):
    """The target folder cannot be written."""

    exit_code = 43


class SelfCheckError(W8A8Error):
    """The finished output did not re-open as planned; it was not published."""

    exit_code = 44


class OutputError(W8A8Error):
    """Standard output cannot be written: its disk is full, or it is closed."""

    exit_code = 45


class OutputClosedError(OutputError):
    """What read standard output went away; the exit code is the shell's for SIGPIPE."""

    exit_code = 141


# --- running and serving: 50-59 -----------------------------------------------------------------------------------


class MissingExtraError(W8A8Error):
    """A package that this command needs is not installed."""

    exit_code = 50


class UnsupportedSchemeError(W8A8Error):
    """The checkpoint is quantized, but not as INT8 W8A8 with per-channel and per-token scales."""

    exit_code = 51


class DoesNotFitError(W8A8Error):
    """The model needs more memory than there is."""

    exit_code = 52


class PortInUseError(W8A8Error):
    """The address to listen on is taken, or cannot be bound."""

    exit_code = 53


class EngineError(W8A8Error):
    """The engine ended, or failed, before it could answer."""

    exit_code = 54


class NoDeviceError(W8A8Error):
    """No GPU was found, and none was described."""

    exit_code = 55


class ServerError(W8A8Error):
    """A server could not be reached, or refused the request."""

    exit_code = 56


class InvalidResultError(W8A8Error):
    """A file is not the result of an evaluation that it should be."""

    exit_code = 57


class UnsupportedModelError(W8A8Error):
    """No recipe knows the model's layers, they cannot run one at a time, or transformers cannot map its GGUF file."""

    exit_code = 61


class ClusterError(W8A8Error):
    """A Ray cluster could not be reached, a node of it lacks something, or a task was lost too often."""

    exit_code = 62


class StoreError(W8A8Error):
    """An object store refused, failed, or could not be reached."""

    exit_code = 63


class LimitError(W8A8Error):
    """A result does not keep the limit that was set for it (`--at-most`, `--at-most-worse`)."""

    exit_code = 64
