"""Carries a plan out: one pass over each shard, several shards at a time, invisible until whole.

`shard` turns one source shard into one output shard; `workers` are the threads that do, `spread` the nodes of
a cluster; `staging` keeps the unfinished result, the lock and the journal; `run` puts them together.
"""

from w8a8.execute.run import execute
from w8a8.execute.shard import ShardRecord
from w8a8.execute.workers import worker_count

__all__ = ["ShardRecord", "execute", "worker_count"]
