"""The most memory that a run has used, over its ranks."""

import resource
import sys

import torch
import torch.distributed as dist

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes: getrusage(2) counts kilobytes, on macOS bytes


def peak_memory(device: torch.device) -> int:
    """Bytes of the rank that has used most so far: allocated on its GPU, or resident of its process. A collective of the world."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    most = torch.tensor(used, dtype=torch.int64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most.item())
