"""Which process holds the others up, as far as their heartbeats tell."""

from __future__ import annotations

import statistics

from moepp_jax.heartbeat import PHASES, Heartbeats

# Beats that a process misses before it is called silent.
MISSED = 5

# Processes that are named.
_MOST = 3


def silence(beats: Heartbeats, number: int) -> float:
    """Seconds since a process was last heard; 0 if it is not silent, as this one never is."""
    seconds = beats.clock() - beats.peers[number].heard
    return seconds if number != beats.process and seconds >= MISSED * beats.every else 0.0


def found(beats: Heartbeats) -> list[int]:
    """The processes that are silent; if none is, those that are behind others. None: all alike."""
    everyone = range(len(beats.peers))
    if silent := [number for number in everyone if silence(beats, number)]:
        return silent
    moves = [peer.beat.moves if peer.beat else 0 for peer in beats.peers]
    return [number for number in everyone if moves[number] == min(moves) < max(moves)]


def said(beats: Heartbeats) -> str:
    """A clause about who is late, which ends in "; "; of a process alone there is none."""
    if len(beats.peers) == 1:
        return ""
    heard = [peer.beat for number, peer in enumerate(beats.peers) if number != beats.process]
    if not any(heard):
        return "no other process was ever heard (are datagrams between the hosts blocked?); "
    late = found(beats)
    if not late:
        return "all processes are equally far: it is their devices, or what connects them; "
    more = f"; and {len(late) - _MOST} more" if len(late) > _MOST else ""
    return f"late: {'; '.join(describe(beats, number) for number in late[:_MOST])}{more}; "


def describe(beats: Heartbeats, number: int) -> str:
    """Where a process runs, how far it is, and since when it is so or is silent."""
    peer = beats.peers[number]
    named = f"process {number} on {peer.host}"
    if peer.beat is None:
        return f"{named}, never heard"
    at = f"at step {peer.beat.step}, {PHASES[peer.beat.phase]}"
    if silent := silence(beats, number):
        return f"{named}, silent for {silent:.0f} s, last heard {at}"
    since = peer.beat.since + beats.clock() - peer.heard
    return f"{named}, {at} for {since:.0f} s"


class Hosts:
    """Own seconds a step of each process's host: see `heartbeat.Beat.own`.

    Nothing on a host tells devices apart: a step that is computed together ends for all at once,
    and a slow one is in nobody's own seconds.
    """

    def __init__(self, beats: Heartbeats):
        self._beats = beats
        self._before = [peer.beat for peer in beats.peers]  # at the last row
        self._seconds: dict[int, float] = {}

    def row(self) -> dict[str, float]:
        """What a row of metrics says of them (see `metrics`); of a process alone, nothing.

        Of each it is the mean over the steps since the row before, as far as its beats tell.
        """
        for number, peer in enumerate(self._beats.peers):
            before, beat = self._before[number], peer.beat
            if before and beat and beat.step > before.step:
                self._seconds[number] = (beat.own - before.own) / (beat.step - before.step)
            if beat and (before is None or beat.step > before.step):
                self._before[number] = beat
        if len(self._seconds) < 2:
            return {}
        seconds = self._seconds.values()
        return {
            "host_seconds_smallest": min(seconds),
            "host_seconds_median": statistics.median(seconds),
            "host_seconds_largest": max(seconds),
            "slowest_process": max(self._seconds, key=self._seconds.__getitem__),
        }
