"""Model card, report and upload: what is published of a checkpoint, written from its files and its results."""
