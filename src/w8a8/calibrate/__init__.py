"""Calibration in bounded memory: a model's decoder layers, one at a time, on the activations of a sample text.

`run` is the job. `setup` checks its inputs, `costs` measures what errors cost, `layers` is a pass over the layers,
`journal` and `activations` are its files, `outcome` says what it achieved. `w8a8.recipes` chooses scales and codes.
"""
