"""The inside of the sandbox: drops all rights that it can, then becomes the program. Needs only the standard library.

Arguments: level, file descriptor of the program's text, seconds, bytes of memory, bytes of a file, threads.
"""

import ctypes
import errno
import os
import resource
import struct
import sys
from collections.abc import Iterator

_SCRATCH = ("/run", "/var/tmp", "/dev/shm", "/tmp")  # the last is where the program works
_SCRATCH_OPTIONS = b"size=64m,nr_inodes=4096,mode=1777"

# Numbers of the kernel's interface (linux/mount.h, linux/prctl.h; a system call has this one on every architecture).
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_ATTR_RDONLY_NOSUID = 0x1 | 0x2
_MS_NOSUID_NODEV = 2 | 4
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_LAST_CAPABILITY = 63

# What the filter refuses, by architecture: other processes (fork, vfork), signals to them (kill, tkill, tgkill,
# pidfd_send_signal), reaching into them (ptrace, process_vm_writev), sockets, io_uring (which opens its own).
_ARCHITECTURES = {
    "x86_64": (0xC000003E, 56, (57, 58, 62, 200, 234, 424, 101, 311, 41, 425)),
    "aarch64": (0xC00000B7, 220, (129, 130, 131, 424, 117, 271, 198, 425)),
}
_CLONE3 = 435  # its flags are out of a filter's sight: without it, the C library calls clone
_CLONE_THREAD = 0x10000
_OTHER_ABI = 0x40000000  # numbers from here on are those of x32


def main(level: str, source: int, seconds: int, memory: int, file_bytes: int, threads: int) -> None:
    with open(source, "rb", closefd=True) as file:
        program = file.read()
    if level == "namespaces":
        _confine()
        os.chdir(_SCRATCH[-1])
        resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
    with open("program.py", "wb") as file:
        file.write(program)
    _filter_system_calls()
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(kind, (limit, limit))
    os.execv(sys.executable, [sys.executable, "-I", "program.py"])


def _confine() -> None:
    """Read-only file systems except empty scratch folders; no capabilities, for this process and what it becomes."""
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = struct.pack("4Q", _ATTR_RDONLY_NOSUID, 0, 0, 0)
    _check(
        libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))
    )
    for folder in _SCRATCH:
        if os.path.isdir(folder) and not os.path.islink(folder):
            options = ctypes.c_char_p(_SCRATCH_OPTIONS)
            _check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(_MS_NOSUID_NODEV), options))
    for capability in range(_LAST_CAPABILITY + 1):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # beyond the kernel's last one it refuses


def _filter_system_calls() -> None:
    """Threads yes; other processes, signals to them and sockets no. For good, and for whatever this process becomes."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in _instructions(os.uname().machine))
    kept = ctypes.create_string_buffer(program)
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(kept))
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(head), 0, 0))


def _instructions(machine: str) -> Iterator[tuple[int, int, int, int]]:
    """Of the classic packet filter over `struct seccomp_data`: (operation, jump if true, jump if false, operand)."""
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    architecture, clone, refused = _ARCHITECTURES[machine]
    yield load, 0, 0, 4  # the architecture
    yield equal, 1, 0, architecture
    yield answer, 0, 0, refuse
    yield load, 0, 0, 0  # the number of the call
    yield at_least, 0, 1, _OTHER_ABI
    yield answer, 0, 0, refuse
    for number, reply in ((_CLONE3, unknown), *((number, refuse) for number in refused)):
        yield equal, 0, 1, number
        yield answer, 0, 0, reply
    yield equal, 0, 3, clone
    yield load, 0, 0, 16  # the lower half of its first argument, the flags
    yield any_bit, 1, 0, _CLONE_THREAD
    yield answer, 0, 0, refuse
    yield answer, 0, 0, allow


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
