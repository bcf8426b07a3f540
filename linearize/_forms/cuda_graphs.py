"""Stretches of programs replayed from CUDA graphs.

A graph reads its residuals where they are and its inputs from buffers of its own: each run
copies the inputs in, replays, and copies the results out, on the stream of the caller. Runs
on different streams wait for each other there; the host waits for nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from .._execute.thresholds import GRAPH_FROM, GRAPH_WARM_UP
from .._execute.written import Function
from .segments import Stretch


class CudaGraph:
    """A captured function on CUDA: it runs again, from the same memory to the same."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self._graph = graph
        self.device = device
        self._done: torch.cuda.Event | None = None

    def replay(self) -> None:
        """Run again on the current stream, without waiting."""
        self._graph.replay()

    def begin(self) -> None:
        """Have the current stream wait for the run before."""
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)

    def end(self, used: Sequence[torch.Tensor]) -> None:
        """Mark the end of a run on the current stream, which used these buffers."""
        stream = torch.cuda.current_stream(self.device)
        for t in used:
            t.record_stream(stream)
        self._done = self._done or torch.cuda.Event()
        self._done.record(stream)


#: Runs a function once and returns how to replay that, and its results.
Capture: TypeAlias = Callable[[Callable[[], list[Any]]], tuple[CudaGraph, list[Any]]]


def capture_on_cuda(device: torch.device) -> Capture:
    """Return what captures functions on a device."""

    def capture(function: Callable[[], list[Any]]) -> tuple[CudaGraph, list[Any]]:
        with torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            mine = torch.cuda.Stream()
            mine.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(mine):
                for _ in range(GRAPH_WARM_UP):
                    function()
            torch.cuda.current_stream().wait_stream(mine)
            # Other threads may go on allocating while this one captures.
            with torch.cuda.graph(graph, stream=mine, capture_error_mode="thread_local"):
                results = function()
        return CudaGraph(graph, device), results

    return capture


class _Replayed:
    """One stretch at one point."""

    def __init__(
        self,
        capture: Capture,
        function: Function,
        residuals: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
    ) -> None:
        self._inputs = [t.clone(memory_format=torch.contiguous_format) for t in inputs]
        # The residuals stay where the graph reads them.
        self._residuals = list(residuals)
        self._captured, self._results = capture(lambda: function(self._residuals, self._inputs))
        self._lock = threading.Lock()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with self._lock:
            self._captured.begin()
            for mine, t in zip(self._inputs, inputs, strict=True):
                mine.copy_(t)
            self._captured.replay()
            results = [t.clone() for t in self._results]
            self._captured.end(self._inputs)
            return results


class Replays:
    """Runs the stretches of a program at one point from graphs, each captured at its first run.

    A stretch that is short, is not wholly on the device or cannot be captured runs as it is.
    """

    def __init__(self, capture: Capture, device: torch.device) -> None:
        self._capture = capture
        self._device = device
        self._known: dict[int, _Replayed | None] = {}
        self._lock = threading.Lock()

    def __call__(
        self,
        place: int,
        stretch: Stretch,
        residuals: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
    ) -> Sequence[torch.Tensor]:
        """Run a stretch."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return stretch.function(residuals, inputs)  # into a graph of the caller's
        with torch.inference_mode(False), torch.no_grad():
            with self._lock:
                if place not in self._known:
                    self._known[place] = self._made(stretch, residuals, inputs)
            known = self._known[place]
            return stretch.function(residuals, inputs) if known is None else known(inputs)

    def _made(
        self, stretch: Stretch, residuals: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> _Replayed | None:
        equations = stretch.program.equations
        values = [v for eq in equations for v in (*eq.inputs(), *eq.outputs) if v is not None]
        # What is computed elsewhere would be computed once, at the capture.
        if len(equations) < GRAPH_FROM or any(v.spec.device != self._device for v in values):
            return None
        try:
            return _Replayed(self._capture, stretch.function, residuals, inputs)
        except RuntimeError as error:  # an operation that must not be captured
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return None
