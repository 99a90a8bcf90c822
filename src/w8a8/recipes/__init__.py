"""How scales, foldings and codes are chosen: one decoder layer at a time, in memory, on its calibration inputs."""

from typing import Literal, get_args

RecipeName = Literal["rtn", "smooth", "smooth+gptq", "rotate+smooth+gptq", "auto"]
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)
"""`rtn` rounds to nearest and needs no calibration; the others calibrate."""

ROTATES = "rotate+"
"""How the names of recipes begin that see the model in rotated coordinates (`w8a8.plan.rotation`)."""
