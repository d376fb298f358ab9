"""How far each process of a run is: told to all the others in datagrams, without any device.

Why datagrams. JAX's coordination service has a store of keys, but no public way to it, and it is
gone, or silent, with process 0. A file in a bucket is a sign of life every so many seconds at best,
costs a request each, and the bucket may be what hangs. A datagram needs no connection: sending one
never waits, whatever has become of who it is for, so that one process which is stopped, dead or cut
off is silent and holds nobody up. One that is lost is followed by the next.

Every process tells every other, so that none is needed to learn of the rest; the more there are,
the more rarely each tells, and each hears of `_A_SECOND` a second at most. Datagrams have the run's
token, which the processes agree on at its start: those of an earlier start, or of anybody else, are
not heard.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from moepp_jax import processes

# What a process's main thread may be at, in words of a report.
PHASES = {
    "step": "in the step",
    "data": "waiting for its next batch",
    "log": "writing metrics",
    "evaluation": "evaluating",
    "save": "saving",
}

# Beats that a process hears at most: so many fit into a socket that is emptied every second.
_A_SECOND = 200

_NAMES = tuple(PHASES)
_WIRE = struct.Struct("!16sIQQBdd")


class Beat(NamedTuple):
    """What a process tells of itself.

    Attributes:
      moves: how often its main thread went on to another phase since the run began; processes that
        are equally far have the same number.
      step: the last one that it began.
      phase: that it is in, of `PHASES`.
      since: seconds that it has been in it.
      own: seconds of all steps so far in which its host worked, or waited for data, and for nobody.
    """

    moves: int
    step: int
    phase: str
    since: float
    own: float


class Peer(NamedTuple):
    """A process of the run; of one that was never heard `beat` is None.

    Attributes:
      heard: when that was, in this process's clock; the beginning if it never was.
    """

    host: str
    heard: float
    beat: Beat | None = None


class Heartbeats:
    """The signs of life that the processes of a run give each other.

    Args:
      process: the number of this one.
      peers: of each process its host's name, its address and its port.
      token: 16 bytes that this start of the run alone has.
      opened: the socket of this one's port; None for a process alone.
      clock: that tells seconds.

    Attributes:
      peers: what is known of each process, this one included.
      every: seconds between two beats of a process, at least.
    """

    def __init__(
        self,
        process: int,
        peers: Sequence[tuple[str, str, int]],
        token: bytes,
        opened: socket.socket | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.process = process
        self.clock = clock
        self.every = max(1.0, len(peers) / _A_SECOND)
        self.peers = [Peer(host, clock()) for host, *_ in peers]
        self._addresses = [(address, port) for _, address, port in peers]
        self._token = token
        self._socket = opened
        self._sent = -self.every

    def tell(self, beat: Beat) -> None:
        """Notes this process's beat, and sends it to the others if it is time to."""
        now = self.clock()
        self.peers[self.process] = self.peers[self.process]._replace(heard=now, beat=beat)
        if self._socket is None or now - self._sent < self.every:
            return
        self._sent = now
        phase = _NAMES.index(beat.phase)
        packed = _WIRE.pack(
            self._token, self.process, beat.moves, beat.step, phase, beat.since, beat.own
        )
        for number, address in enumerate(self._addresses):
            if number != self.process:
                with contextlib.suppress(OSError):  # it will be missed, and by all others too
                    self._socket.sendto(packed, address)

    def hear(self) -> None:
        """Takes in what has come since the last call; waits for nothing."""
        while self._socket is not None:
            try:
                packed, address = self._socket.recvfrom(2 * _WIRE.size)
            except OSError:  # there is no more
                return
            if len(packed) != _WIRE.size:
                continue
            token, number, moves, step, phase, since, own = _WIRE.unpack(packed)
            if token != self._token or number >= len(self.peers) or phase >= len(_NAMES):
                continue
            self._addresses[number] = address  # of several that a host has, the one that works
            beat = Beat(moves, step, _NAMES[phase], since, own)
            self.peers[number] = self.peers[number]._replace(heard=self.clock(), beat=beat)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def alone() -> Heartbeats:
    """Of a process that has no others, or tells them nothing."""
    return Heartbeats(0, [(socket.gethostname(), "", 0)], b"")


def meet() -> Heartbeats:
    """Of this process and the others of its run, each of which calls this: they meet once."""
    if jax.process_count() == 1:
        return alone()
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind(("", 0))
    opened.setblocking(False)
    mine = [socket.gethostname(), _address(), opened.getsockname()[1], os.urandom(8).hex()]
    told = [json.loads(text) for text in processes.of_each(lambda: json.dumps(mine))]
    peers = [(host, address, port) for host, address, port, _ in told]
    return Heartbeats(jax.process_index(), peers, told[0][-1].encode(), opened)


def _address() -> str:
    """Of this host, as others reach it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # of no host (RFC 5737): it says which way packets leave
        return probe.getsockname()[0]
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return "127.0.0.1"
