"""Permissions that count for root too, so that tests of them need not know who runs them."""

import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Iterator

import pytest

_VERSION = 0x20080522  # of the kernel's capability sets, with 64 bits
_PASSES_PERMISSIONS = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """This thread, and those that it starts, may do only what files' permissions let them."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root's permissions can be put down on Linux only")
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION, 0))
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable: low, then high bits
    if libc.capget(header, sets):
        pytest.skip("this kernel has no capabilities")
    before = sets.raw[:24]
    effective, *others = struct.unpack("=6I", before)
    lowered = struct.pack("=6I", effective & ~_PASSES_PERMISSIONS, *others)
    assert not libc.capset(header, ctypes.create_string_buffer(lowered))
    try:
        yield
    finally:
        assert not libc.capset(header, ctypes.create_string_buffer(before))
