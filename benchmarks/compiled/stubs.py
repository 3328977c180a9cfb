"""A GPU that does nothing: Triton's JIT, this package and torch are real, on CPU tensors; kernels are never compiled.

What would reach the hardware is handed to a function: the arguments of Triton's launcher, or of an entry of the CUDA
extension.  Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

FAMILY, CAPABILITY, MULTIPROCESSORS = "sm_90", 90, 132


class Driver:
    """What Triton asks of its driver, and this package of torch: the current device and stream."""

    def __init__(self) -> None:
        self.device, self.stream = 0, 7

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)


def silent_triton(started: Callable[..., Any]) -> Driver:
    """From here on Triton launches nothing: `started(binary, stream, arguments)` is called in place of its launcher."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels are interpreted in a process with TRITON_INTERPRET=1")
    import triton.compiler
    from triton.runtime import driver

    class Binary(triton.compiler.CompiledKernel):
        """What the JIT keeps of a compilation: here, a number."""

        def __init__(self, src: Any, **_: Any) -> None:
            self.src, self.name, self.hash, self.metadata = src, src.fn.__name__, "", None
            self.module, self.function, self.packed_metadata = 1, id(self), (4, 1, 0)
            self._run = self.launcher

        def launcher(
            self, gridX: int, gridY: int, gridZ: int, stream: int, function: int, kernel_metadata: Any,
            launch_metadata: Any, launch_enter_hook: Any, launch_exit_hook: Any, *args: Any,
        ) -> None:  # fmt: skip
            started(self, stream, args)

    triton.compiler.compile = Binary
    stub = Driver()
    driver.set_active(stub)
    _pretend(stub)
    return stub


def _pretend(stub: Driver) -> None:
    """The package believes that CPU tensors are on the device of the driver."""
    from setformer_kernels.backends.triton import face
    from setformer_kernels.backends.triton.host import launch

    face.INTERPRETED = True  # the face alone: it then takes CPU tensors
    launch._assumed = launch.Device(FAMILY, MULTIPROCESSORS, "tf32x3")
    direct = getattr(launch, "direct", None)  # a checkout of before has none
    if direct is not None:
        direct.current_device, direct.current_stream = stub.get_current_device, stub.get_current_stream


def silent_cuda(started: Callable[..., Any]) -> None:
    """From here on the CUDA backend takes CPU tensors and calls `started` in place of its extension."""
    from setformer_kernels.backends import cuda

    cuda._DEVICE, cuda.ABSENT = "cpu", ""
    cuda._C = SimpleNamespace(
        cuda_attention=started,
        cuda_attention_backward=started,
        cuda_gradient_parts=lambda *_: 1,
        cuda_attention_refusal=lambda *_: "",
        cuda_attention_leaves_idle=lambda *_: False,
        cuda_sinkhorn=started,
        cuda_sinkhorn_refusal=lambda *_: "",
    )
