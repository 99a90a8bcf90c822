"""The usage section of a card: commands that serve the checkpoint, and the hardware that holds it."""

import json
from dataclasses import replace

from w8a8 import machine
from w8a8.errors import DoesNotFitError
from w8a8.memory import Fit, fit
from w8a8.publish.made import Made
from w8a8.serve.launch import Launch
from w8a8.serve.launch import prepare as prepare_serve

ONE_GPU, REFERENCE_GPUS = "24GiB", "4x24GiB:gfx1100"
"""GPUs of the example: one card that people have, or the reference case's four."""

SETUPS = ("16GiB", "24GiB", "48GiB", "2x24GiB", "80GiB", "4x24GiB", "2x80GiB", "4x80GiB", "8x80GiB", "8x192GiB")
"""Setups that people have, by their memory, small to large."""

_SHOWN = 4
"""Setups in the table."""


def example(made: Made, describe: str | None, name: str) -> tuple[str, Launch]:
    """Return GPUs, and how `serve` starts vLLM on them for the checkpoint called `name`.

    The GPUs are those of `describe`, else the first of the usual setups that holds it. Raises `DoesNotFitError`.
    """
    choices = [describe] if describe else [ONE_GPU, REFERENCE_GPUS, *SETUPS]
    for i, choice in enumerate(choices, 1):
        try:
            launch = prepare_serve(str(made.path), gpus=machine.describe(choice), dry_run=True)
            return choice, _named(launch, name)
        except DoesNotFitError:
            if i == len(choices):
                raise
    raise AssertionError


def _named(launch: Launch, name: str) -> Launch:
    """`launch` with the name the model will have on the Hub, instead of the folder it lies in now."""
    program, verb, _, *flags = launch.argv
    return replace(launch, argv=(program, verb, name, *flags), call=replace(launch.call, model=name))


def python_example(made: Made, name: str) -> str:
    """Python that loads the checkpoint called `name` in transformers."""
    model, words = (
        ("AutoModelForImageTextToText", "AutoProcessor") if made.sees else ("AutoModelForCausalLM", "AutoTokenizer")
    )
    return (
        "import w8a8.runtime  # from here on transformers loads W8A8 checkpoints\n"
        f"from transformers import {model}, {words}\n\n"
        f'model = {model}.from_pretrained({json.dumps(name)}, dtype="auto", device_map="auto")\n'
        f"{words[4:].lower()} = {words}.from_pretrained({json.dumps(name)})"
    )


def hardware(made: Made) -> list[tuple[str, Fit]]:
    """Return the smallest usual setups that hold the model and whose GPUs it can all use."""
    found = [(setup, fit(made.checkpoint, machine.describe(setup))) for setup in SETUPS]
    usable = [(setup, f) for setup, f in found if f.fits and f.tensor_parallel == len(f.gpus)]
    return [(setup if "x" in setup else f"1x{setup}", f) for setup, f in usable][:_SHOWN]
