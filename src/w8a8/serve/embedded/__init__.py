"""The embedded engine: transformers' OpenAI-compatible server running this project's INT8 layer."""
