"""Ray: a connection to a cluster, and tasks whose progress, throughput and errors come together in one place.

Knows nothing of what a task does. `driver` is the machine that was given the command, `worker` any that carries a task
out. Ray places tasks, and repeats what was lost; nothing here schedules.
"""

from w8a8.cluster.driver import Cluster, Crew, NodeWork, connected

__all__ = ["Cluster", "Crew", "NodeWork", "connected"]
