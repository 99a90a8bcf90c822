"""How far one model's predictions lie from another's: KL divergence per token."""
