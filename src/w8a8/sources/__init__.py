"""How a source spells its tensors: stored bytes in, rows of BF16, F16 or F32 numbers out."""
