"""Measures the seconds of each phase of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def is_timing(metric: str) -> bool:
    """Whether a metric of a step is about time, so that it differs between two runs that are otherwise the same."""
    return metric.startswith("seconds/") or metric in ("clips_per_second", "data_share", "flop_utilisation")


class PhaseClock:
    """Seconds per named phase. On a GPU they are measured with events, so that phases do not synchronise.

    Phases on different streams may overlap. Their seconds then add up to more than the step's.
    """

    def __init__(self, device: torch.device) -> None:
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._on_gpu = device.type == "cuda"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``; on a GPU, on the stream that is current on entry."""
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            stream = torch.cuda.current_stream()
            begin.record(stream)
            yield
            end.record(stream)
            self._events.append((name, begin, end))
        else:
            started = time.perf_counter()
            yield
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that the caller measured."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Seconds per phase. Waits until the GPU has finished the measured work."""
        for name, begin, end in self._events:
            end.synchronize()
            self.add(name, begin.elapsed_time(end) / 1000)
        self._events.clear()
        return dict(self._seconds)
