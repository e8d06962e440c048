"""PTX run on a CPU: what a kernel for TMA and tensor cores does, where there is no such GPU.

Small kernels only: registers are arrays of 32 lanes, and instructions are interpreted one by one. What hardware does
beside the threads (copies of TMA, products of wgmma and tcgen05, stores) happens here at random later times, as late as
the kernel's own waits allow, and registers and memory that are not there yet are poison. So a missing wait is a wrong
result, a missing arrival a deadlock, and a store of a proxy without its fence an error.
Source: PTX ISA 8.8 (NVIDIA, 2025). Swizzles, descriptors and fragments are its tables, read by us.
"""

from .machine import LATE, Deadlock, Machine, Violation
from .memory import TensorMap
from .text import Program, parse

__all__ = ["LATE", "Deadlock", "Machine", "Program", "TensorMap", "Violation", "parse"]
