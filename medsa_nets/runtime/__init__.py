"""What a process runs in: memory, other processes, tensors."""

from medsa_nets.runtime.memory import keep_freed_memory, release_freed_memory
from medsa_nets.runtime.processes import for_this_process, join_processes, unwrap, writes_files
from medsa_nets.runtime.tensors import plain

__all__ = [
    "for_this_process",
    "join_processes",
    "keep_freed_memory",
    "plain",
    "release_freed_memory",
    "unwrap",
    "writes_files",
]
