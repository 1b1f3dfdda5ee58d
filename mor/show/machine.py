"""What a result was measured on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers


def describe_machine(device: torch.device | None = None) -> dict[str, str]:
    """Processor, cores, threads and versions; the GPU instead of threads when `device` is one."""
    facts = {"processor": _processor(), "cores": str(available_cores())}
    if device is not None and device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
    else:
        facts["threads"] = str(torch.get_num_threads())
    return facts | {
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "Transformers": transformers.__version__,
    }


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
