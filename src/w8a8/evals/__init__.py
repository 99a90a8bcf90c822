"""How good a checkpoint is: GSM8K and other tasks over the API, KL divergence from its original, two results compared."""
