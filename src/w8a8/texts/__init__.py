"""Text that models read: files, JSONL, data sets, and the samples that calibration takes from them."""
