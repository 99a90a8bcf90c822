"""lm-evaluation-harness and its tasks, on a server or on a checkpoint that is served meanwhile."""
