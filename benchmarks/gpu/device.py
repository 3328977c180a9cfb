"""What measuring asks of a device: a clock, graphs, whether it still answers.  A rehearsal has a stand-in."""

from __future__ import annotations

import torch

from benchmarks.common.measure import Clock, wall_clock
from benchmarks.gpu.cases import Call

GRAPH_CALLS_S = 200e-6  # calls shorter than this are captured several times into one graph, so that replays overlap


def event_clock(call: Call, repeats: int) -> float:
    """Seconds per call on the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def captured(call: Call) -> tuple[Call, int]:
    """A replay of `n` calls in one CUDA graph, and n."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    count = max(1, min(10, int(GRAPH_CALLS_S / max(event_clock(call, 3), 1e-7))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return graph.replay, count


class Gpu:
    """The CUDA device."""

    name = "cuda"
    clock: Clock = staticmethod(event_clock)

    def label(self) -> str:
        return torch.cuda.get_device_name()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def broken(self) -> bool:
        """Whether an error stays: whatever is asked of the device in this process raises from now on."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def graph(self, call: Call) -> tuple[Call, int, str]:
        """The call as a graph replay where it can be captured, how many calls that is, and a note."""
        try:
            return *captured(call), "graph"
        except RuntimeError as error:
            torch.cuda.synchronize()  # raises again where the error stays
            return call, 1, f"no CUDA graph: {str(error).splitlines()[0][:100]}"

    def forget(self) -> None:
        """Hand memory back between cases."""
        torch.cuda.empty_cache()


class Cpu:
    """The CPU, for dry runs."""

    name = "cpu"
    clock: Clock = staticmethod(wall_clock)

    def label(self) -> str:
        return "cpu (dry run)"

    def synchronize(self) -> None:
        pass

    def broken(self) -> bool:
        return False

    def graph(self, call: Call) -> tuple[Call, int, str]:
        return call, 1, "no CUDA graph: not on a GPU"

    def forget(self) -> None:
        pass
