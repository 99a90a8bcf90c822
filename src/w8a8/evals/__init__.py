"""How good a checkpoint is: GSM8K over the API, KL divergence from its original, two results compared."""
