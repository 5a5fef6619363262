"""What a process may take of the machine: a worker's memory and sockets, a server's free memory.

Apart from `jobs`, because here the kernel is told by number what the library has no words for.

The network is closed by a filter of system calls, not by a namespace of its own: no privilege is
needed, so it holds in a container as well, files keep their owners, and the process gets no rights
in a new user namespace. The filter also refuses what would undo it, taking an open socket from
another process, and leaving the process group that is killed with the worker. The size of single
files is not limited: many files fill a disk as well, which is for the quota to prevent.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# From linux/prctl.h, linux/seccomp.h, linux/bpf_common.h and linux/audit.h.
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
_SECCOMP_MODE_FILTER = 2
# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # where they stand in what the filter reads
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_X32 = 0x40000000  # from here on, other numbers for the same calls
# By machine: its number, what gives a socket, what leads into another process or out of the group.
_CALLS = {
    "x86_64": (0xC000003E, {"socket": 41, "io_uring_setup": 425}, {
        "setpgid": 109, "setsid": 112, "ptrace": 101, "process_vm_readv": 310,
        "process_vm_writev": 311, "pidfd_getfd": 438,
    }),
    "aarch64": (0xC00000B7, {"socket": 198, "io_uring_setup": 425}, {
        "setpgid": 154, "setsid": 157, "ptrace": 117, "process_vm_readv": 270,
        "process_vm_writev": 271, "pidfd_getfd": 438,
    }),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Confinement:
    """What holds for a process.

    Attributes:
        memory_bytes: that it may take for itself; None for no limit.
        network: whether it can open a connection.
    """

    memory_bytes: int | None
    network: bool


def confine(*, memory_bytes: int | None = None, network: bool = True) -> Confinement:
    """Takes rights from this process for good, and from all it starts; says what was achieved.

    To be called before there is a second thread. In any case no program gives it more rights than
    it has, and nothing of its memory is written to disk when it crashes. Away from Linux nothing
    is taken.

    Args:
        memory_bytes: the most it may take for itself: heap and stacks, not files it maps. What
            asks for more is told that there is none (`MemoryError` in Python).
        network: False refuses it sockets.
    """
    if sys.platform != "linux":
        return Confinement(memory_bytes=None, network=True)
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    kernel = ctypes.CDLL(None, use_errno=True)
    # A filter may only be set by who cannot get more rights.
    kept = kernel.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    filtered = kept and _filter(kernel, network)
    return Confinement(memory_bytes=memory_bytes, network=network or not filtered)


def _filter(kernel: ctypes.CDLL, network: bool) -> bool:
    """Whether a filter of system calls stands from now on."""
    name = os.uname().machine
    if name not in _CALLS or sys.maxsize < 2**32:
        return False
    machine, sockets, others = _CALLS[name]
    refused = [*others.values(), *(() if network else sockets.values())]
    # Each step: what to do, where to go on if so and if not (steps to skip), its number.
    end = len(refused) + 4  # the last step but one allows, the last refuses
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 0, end - 1, machine),
        (_LOAD, 0, 0, _NUMBER),
        (_IF_AT_LEAST, end - 3, 0, _X32),
        *((_IF_EQUAL, end - at, 0, call) for at, call in enumerate(refused, 4)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    return bool(kernel.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0) == 0)


def give_memory_back() -> None:
    """Has the C library return to the system what was freed, where it is glibc.

    For a server of many threads that live shortly: by default each has a heap of its own, of which
    the others cannot use what is free, and large blocks are kept among small ones.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 256 << 10)
        mallopt(_M_TRIM_THRESHOLD, 1 << 20)


def die_with_parent() -> None:
    """Has Linux kill this process when the thread that started it ends, and kill it before that
    one when memory runs out; what its children leave behind becomes its own."""
    if sys.platform != "linux":
        return
    kernel = ctypes.CDLL(None)
    kernel.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    kernel.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")


def end_children() -> None:
    """Kills all that this process has started and that still runs."""
    if sys.platform != "linux":
        return
    with suppress(ChildProcessError):  # the usual case: there are none
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        for process_id in _descendants(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue


def resident_bytes(process_id: int) -> int:
    """The memory that a process and all it has started hold, without files they map; 0 where the
    system does not say."""
    return sum(map(_own_bytes, (process_id, *_descendants(process_id))))


def _own_bytes(process_id: int) -> int:
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    sizes = (line.split() for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    return sum(int(kilobytes) << 10 for _, kilobytes, _ in sizes)


def _descendants(process_id: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process_id}/task"):
            with suppress(OSError):
                listed = Path(f"/proc/{process_id}/task/{thread}/children").read_text()
                found += map(int, listed.split())
    return found + [each for child in found for each in _descendants(child)]
