"""What a person sees on a terminal: text, tables, one live progress line."""
