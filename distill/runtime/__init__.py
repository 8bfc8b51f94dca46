"""What the machine gives a run: memory and its limits, time, files that stay whole, processes that belong together.

In: work to be done. Out: the same work in pieces that fit, its seconds and bytes. Nothing here knows of models.
"""

from distill.runtime.clock import PhaseClock, peak_memory_bytes, to_device, to_host
from distill.runtime.files import JsonLines, json_line, read_json_lines, write_whole
from distill.runtime.memory import MemoryLimitError, MemoryLimits, free_bytes, is_out_of_memory
from distill.runtime.micro_batches import host_integers
from distill.runtime.processes import Processes, RankError

__all__ = [
    "JsonLines",
    "MemoryLimitError",
    "MemoryLimits",
    "PhaseClock",
    "Processes",
    "RankError",
    "free_bytes",
    "host_integers",
    "is_out_of_memory",
    "json_line",
    "peak_memory_bytes",
    "read_json_lines",
    "to_device",
    "to_host",
    "write_whole",
]
