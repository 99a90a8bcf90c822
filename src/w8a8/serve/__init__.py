"""Start an engine with the right settings for this machine, and talk to it."""
