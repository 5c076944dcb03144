"""Native kernels (`csrc/`, C++ through nanobind), each with a twin in plain torch that does the same arithmetic.

They are optional: without a compiler the package installs without them, and `KVSHARE_KERNELS=0` leaves them out.
`KVSHARE_ISA` (amx, avx512, avx2 or plain) takes another instruction set than the best that the processor has. `KVSHARE_EMULATED=amx` is for
emulators of AMX's instructions: neither the processor nor the system is asked whether there are any.
"""

from kvshare.kernels.native import available, isa, reason_unavailable, use_isa

__all__ = ["available", "isa", "reason_unavailable", "use_isa"]
