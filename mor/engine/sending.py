"""What the host tells the device, without waiting for what the device is at."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. To a GPU it goes by pinned memory, in its turn on the current stream: from
    other memory the host would wait until all that was queued before is done."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
