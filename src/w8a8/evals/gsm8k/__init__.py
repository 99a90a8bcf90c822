"""GSM8K over an OpenAI-compatible API: ask, score, compare."""
