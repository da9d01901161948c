"""Devices and number types: which there are, and what each is good at."""

import functools
import platform
import re
import warnings
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device_name(device):
    """Raises ValueError unless device is None or a name that any machine could have."""
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?|mps", device):
        raise ValueError(f"device must be cpu, cuda, cuda:<number> or mps, not {device!r}")


def check_device(device):
    """Raises ValueError unless device is None or one of this machine. Sets up PyTorch for it."""
    check_device_name(device)
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("device mps was requested, but PyTorch finds no Apple GPU here")
        warnings.warn("device mps is untested: results are not reproducible bit for bit there, and peak memory is not recorded", stacklevel=3)
    if (device or "").startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"device {device} was requested, but PyTorch finds no CUDA device here")
        if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {device} was requested, but PyTorch finds {torch.cuda.device_count()} CUDA devices here")
    if (device or default_device()).startswith("cuda"):
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans its attention anew for each number of tokens, and merging has one in every block


@functools.cache
def is_intel():
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return "Intel" in platform.processor()


def has_fast_bfloat16(device):
    """Whether matrix products in bf16 are faster there than in fp32. Unknown on Apple's GPUs, where float32 is the default."""
    if device == "mps":
        return False
    if device.startswith("cuda"):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    # with AVX512-BF16 alone AMD's cores do twice as many products in bf16 as in fp32, Intel's half as many: those need AMX
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() and not is_intel()


def autocast(device, dtype):
    """The context in which a model computes: bf16 products where dtype is torch.bfloat16, as it is elsewhere."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16)
