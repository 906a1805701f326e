"""Which device trains."""

import torch

from training.errors import BadInput


def choose_device(wanted: str) -> torch.device:
    """The device `wanted`, or with "auto" the accelerator that is there, else the CPU. Raises BadInput."""
    if wanted == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = torch.device(wanted)
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= count:
        raise BadInput(f"--device {wanted}", expected=f"one that is here: {count} of type {device.type} found",
                       mend="Use --device auto or cpu.")
    return device
