"""Carries a plan out: one pass over each shard, several shards at a time, invisible until whole.

`shard` turns one source shard into one output shard; `stream` and `writer` are its two ends; `staging` keeps the
unfinished result, the lock and the journal; `run` puts them together.
"""

from w8a8.execute.run import execute, worker_count
from w8a8.execute.shard import ShardRecord

__all__ = ["ShardRecord", "execute", "worker_count"]
