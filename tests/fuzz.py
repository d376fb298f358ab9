"""Gives readers of files from elsewhere made-up bytes for hours, new ones each time:

    python -m tests.fuzz --minutes 60 [--only parquet] [--seed 1]

The readers of `tests.test_fuzz_readers` by turns. What one does wrong is made as small as it gets,
told, and stored in tests/data/fuzz/, where `make test` tries it again until it is mended.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests import hurry

os.environ.setdefault("XLA_FLAGS", hurry.XLA_FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.test_fuzz_readers import attempt, every, kept

# Seconds of a reader's turn, about, and of one input: more is a finding. Where it hangs in code
# that is not Python's the process ends, and the next one finds the input in LAST.
TURN, PATIENCE = 10, 30
LAST = Path(tempfile.gettempdir()) / "moepp-fuzz-last"

# Bytes that one input may take; the longest document takes as many (docs/DATA.md).
MOST = 1.2e9


class Reader:
    """What was tried of one reader."""

    def __init__(self, name: str, folder: Path):
        self.name, self._folder = name, folder
        self.tried, self.seconds, self.findings = 0, 0.0, 0
        self._count = 20  # inputs of a turn

    def turn(self, seed: int) -> None:
        start, tried = time.monotonic(), self.tried
        raw = b""

        def attempted(tried: bytes) -> None:
            nonlocal raw
            raw = tried
            self.tried += 1
            LAST.write_bytes(self.name.encode() + b"\n" + raw)
            with_limits(lambda: attempt(self._folder, self.name, raw))

        chosen = settings(
            max_examples=self._count,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        try:
            hypothesis.seed(seed)(chosen(given(every()[self.name].inputs)(attempted)))()
        except Exception as error:  # the last input that was tried is the smallest one
            self.findings += 1
            where = keep(self.name, raw)
            said = str(error).strip().split("\n")[0]
            print(f"{self.name}: {type(error).__name__}: {said:.300}\n  {where}", flush=True)
        took = time.monotonic() - start
        self.seconds += took
        rate = (self.tried - tried) / max(took, 1e-3)
        self._count = max(10, min(int(rate * TURN), 10 * self._count))


def with_limits(run) -> None:
    """
    Raises:
      AssertionError: it takes too long, or too much memory.
    """
    before = reset_peak()
    signal.alarm(PATIENCE)
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
    try:
        run()
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    assert peak() - before < MOST, "takes too much memory"


def peak() -> int:
    """Bytes of memory that this process had at most since `reset_peak`, on Linux; elsewhere 0."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def reset_peak() -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return sys.maxsize  # nothing is told then
    return peak()


def too_long(*_) -> None:
    raise AssertionError(f"takes more than {PATIENCE} s")


def keep(name: str, raw: bytes) -> Path:
    file = kept(name) / hashlib.sha256(raw).hexdigest()[:12]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(raw)
    return file


def main(arguments: list[str] | None = None) -> int:
    """The status: 1 if anything was found."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, required=True, help="begins no turn after them")
    parser.add_argument("--only", action="append", help="readers with this, or that, in their name")
    parser.add_argument("--seed", type=int, help="of all inputs; by default another one each time")
    given = parser.parse_args(arguments)
    names = [n for n in every() if any(part in n for part in given.only or [""])]
    if not names:
        parser.error(f"--only={' '.join(given.only)} is in the name of none of {list(every())}")
    if LAST.exists():
        name, _, raw = LAST.read_bytes().partition(b"\n")
        print(f"the process before this one ended in: {keep(name.decode(), raw)}", flush=True)
    seed = random.randrange(2**32) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    signal.signal(signal.SIGALRM, too_long)
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder:
        readers = [Reader(name, Path(folder)) for name in names]
        try:
            while time.monotonic() < end:
                for reader in readers:
                    if time.monotonic() < end:
                        reader.turn(seed := seed + 1)
                print(f"{sum(reader.tried for reader in readers):,} inputs so far", flush=True)
        except KeyboardInterrupt:
            pass
        LAST.unlink(missing_ok=True)
    width = max(map(len, names))
    for reader in readers:
        print(
            f"{reader.name:{width}} {reader.tried:>9,} inputs {reader.seconds:>7.0f} s "
            f"{reader.findings:>3} findings"
        )
    tried, seconds = sum(r.tried for r in readers), sum(r.seconds for r in readers)
    print(f"{'all':{width}} {tried:>9,} inputs {seconds:>7.0f} s")
    return int(any(reader.findings for reader in readers))


if __name__ == "__main__":
    sys.exit(main())
