"""Plan a run: the fate of every tensor, and the place of every output byte. Pure: no weight is read.

`architectures` reads what is known of each architecture (`architectures.toml`), `rules` judge tensors by it, `layout`
places the output, `plan` puts both into a value that can be printed, saved as JSON and compared.
"""

from w8a8.plan.architectures import architecture_of, architectures
from w8a8.plan.decisions import Decision
from w8a8.plan.layout import ShardPlan, Write
from w8a8.plan.plan import Plan, make_plan
from w8a8.plan.rules import QUANTIZABLE, Rules, is_linear, module_name, scale_name

__all__ = [
    "QUANTIZABLE",
    "Decision",
    "Plan",
    "Rules",
    "ShardPlan",
    "Write",
    "architecture_of",
    "architectures",
    "is_linear",
    "make_plan",
    "module_name",
    "scale_name",
]
