"""The model card, written from the files and the results."""
