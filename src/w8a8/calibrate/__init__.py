"""Calibration in bounded memory: a model's decoder layers, one at a time, on the activations of a sample text.

`text` chooses and cuts the text, `model` gives weights to one layer at a time, `activations` keeps what flows between
layers, `run` drives a recipe from layer to layer and can be interrupted. How scales are chosen is `w8a8.recipes`' part.
"""
