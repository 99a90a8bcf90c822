"""`view_of`: a checkpoint as logical tensors, by what is known of its architecture."""

from w8a8.checkpoint import Checkpoint
from w8a8.plan.architectures import architecture_of
from w8a8.sources.opening import view
from w8a8.sources.view import View


def view_of(checkpoint: Checkpoint) -> View:
    """See `checkpoint` as its architecture stores it. Raises what `w8a8.sources.opening.view` raises."""
    return view(checkpoint, architecture_of(checkpoint.config).stacks)
