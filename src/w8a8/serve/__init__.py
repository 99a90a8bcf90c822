"""Starting an engine with the right settings for this machine, and talking to it."""
