"""How much memory is free, for planning before it is taken."""

from pathlib import Path

import torch

# What a process takes on a GPU before it holds one tensor: context, kernels, cuBLAS' workspace. Assumed, not measured.
CUDA_CONTEXT_BYTES = 600 << 20


def free_memory(device: torch.device) -> int:
    """Bytes of memory that this process may still take on a device.

    On a GPU these are the free bytes and those that torch's allocator holds unused; on a CPU the system's MemAvailable.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
