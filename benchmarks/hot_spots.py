"""Where the time of a call goes, by torch's profiler."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import markdown, percent

SHOWN = 8
NAME_LENGTH = 60


def own_times(call: Callable[[], object], device: torch.device) -> str:
    """A Markdown table of the operators, on CUDA of the kernels, that take longest, each without what it calls. Compiled loops
    that have no name of their own are in that of the region."""
    call()
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as found:
        call()
    attribute = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = [event for event in found.key_averages() if not on_cuda or _is_kernel(event)]
    events.sort(key=lambda event: getattr(event, attribute), reverse=True)
    total = sum(getattr(event, attribute) for event in events)
    rows = [["kernel" if on_cuda else "operator", "calls", "ms", "of all"]]
    for event in events[:SHOWN]:
        taken, name = getattr(event, attribute), event.key.replace("|", "/")
        rows.append([name[:NAME_LENGTH], str(event.count), f"{taken / 1e3:.1f}", percent(taken / total)])
    return markdown(rows)


def _is_kernel(event) -> bool:
    """An operator's device time is that of its kernels, which are events too, and so are the ranges that somebody named."""
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
