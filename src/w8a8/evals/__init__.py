"""How good a checkpoint is: tasks over the API, KL divergence from its original, two results compared."""
