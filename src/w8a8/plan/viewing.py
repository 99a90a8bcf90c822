"""`view_of`: a checkpoint as logical tensors, by what is known of its architecture; `format_for`: how to spell it."""

from w8a8.checkpoint import Checkpoint
from w8a8.formats import Format, get_format
from w8a8.plan.architectures import architecture_of
from w8a8.plan.rules import experts_of, module_name
from w8a8.sources.opening import view
from w8a8.sources.view import View


def view_of(checkpoint: Checkpoint, *, split: bool = True) -> View:
    """See `checkpoint` as its architecture stores it, and stacks of experts `split` into them.

    Raises what `w8a8.sources.opening.view` raises.
    """
    return view(checkpoint, architecture_of(checkpoint.config).stacks if split else ())


def format_for(view: View, name: str | None = None, compat: str | None = None) -> Format:
    """The format `name`, or the one of the tool `compat`; where neither is given, the one that engines load best.

    That is quark; compressed-tensors for mixtures of experts, and where engines load no other. Raises `UsageError`.
    """
    if name is None and compat is None:
        spellings = architecture_of(view.config).spellings
        mixture = any(experts_of(module_name(tensor)) for tensor in view.tensors)
        name = "compressed-tensors" if mixture and "compressed-tensors" in spellings else spellings[0]
    return get_format(name, compat, view.config)
