"""Host to device without waiting.

A plain `.to("cuda")` of pageable memory stops the host until the device has finished everything queued before it.
"""

import torch


def to_device(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy on the device, queued from pinned memory; on the CPU, x itself."""
    device = torch.device(device)
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()  # torch's cache keeps the buffer until the copy has been done
    return x.to(device, non_blocking=True)
