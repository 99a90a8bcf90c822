"""The terminal: text, tables, one live progress line."""
