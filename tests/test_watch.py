"""What is taken for a hang, who is said to be late, and how the process ends; no test waits."""

import socket
from types import SimpleNamespace

import pytest

from moepp_jax import heartbeat, late, watch
from moepp_jax.heartbeat import Beat, Heartbeats
from moepp_jax.watch import STATUS, Watch
from tests import tiny

TOKEN = b"0123456789abcdef"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Loss:
    """Of a step, as the devices have it: not there yet, there, or failed."""

    def __init__(self):
        self.ready, self.error = False, None

    def is_ready(self) -> bool:
        return self.ready

    def block_until_ready(self) -> None:
        assert self.ready, "the thread would wait for a device"
        if self.error:
            raise self.error


class Run:
    """A watch over a loop of which nothing runs but what a test says."""

    def __init__(self, of=1, **changes):
        self.clock, self.said, self.ended = Clock(), [], []
        limits = {"train.hang_seconds": 20.0, "train.hang_factor": 5.0}
        train = tiny.config(**limits | changes).train
        peers = [(f"host-{number}", "", 0) for number in range(of)]
        self.beats = Heartbeats(0, peers, TOKEN, None, self.clock)
        self.watch = Watch(
            train,
            self.beats,
            step=0,
            say=self.said.append,
            end=lambda message, status: self.ended.append((message, status)),
        )

    def passes(self, seconds: int) -> None:
        """Time, with a look every second."""
        for _ in range(seconds):
            self.clock.now += 1.0
            self.watch.look()

    def step(self, number: int, seconds: int) -> None:
        loss = Loss()
        self.watch.began(number, loss)
        self.passes(seconds - 1)
        loss.ready = True
        self.passes(1)

    def steps(self, count: int, seconds: int = 2) -> None:
        for number in range(1, count + 1):
            self.step(number, seconds)

    def hears(self, number: int, **beat) -> None:
        fields = {"moves": 0, "step": 0, "phase": "step", "since": 0.0, "own": 0.0}
        peer = self.beats.peers[number]
        known = Beat(**fields | beat)
        self.beats.peers[number] = peer._replace(heard=self.clock.now, beat=known)


def test_a_step_that_does_not_end_is_told_once_and_ends_the_process_after_as_long_again():
    run = Run()
    run.steps(5)
    run.watch.began(6, Loss())
    run.passes(19)
    assert run.said == [] and run.ended == []
    run.passes(20)
    (said,) = run.said
    assert said == (
        "this process: no step has ended for 20 s (usually 2 s); it is at step 6, in the step. "
        "The process ends in 20 s more, with status 75"
    )
    assert run.ended == []
    run.passes(1)
    ((message, status),) = run.ended
    assert status == STATUS == 75
    assert message.startswith("error: this process: no step has ended for 40 s")
    assert message.endswith("; all have to be started again\n")


def test_a_step_that_ends_late_is_no_hang_any_more():
    run = Run()
    run.steps(5)
    run.step(6, 30)
    assert len(run.said) == 2 and run.said[1] == "this process: goes on, after 29 s"
    run.steps(3)
    assert len(run.said) == 2 and run.ended == []


def test_long_steps_have_a_multiple_of_their_median():
    run = Run()
    run.steps(6, seconds=10)
    run.watch.began(7, Loss())
    run.passes(49)
    assert run.said == []
    run.passes(1)
    assert "no step has ended for 50 s (usually 10 s)" in run.said[0]
    run.passes(49)
    assert run.ended == []
    run.passes(1)
    assert len(run.ended) == 1


def test_what_is_awaited_is_the_devices_not_the_loop():
    """Many steps may be under way: as long as one ends after the other, nothing hangs."""
    run, losses = Run(), [Loss() for _ in range(40)]
    for number, loss in enumerate(losses, start=1):
        run.watch.began(number, loss)
    for loss in losses:
        run.passes(2)
        loss.ready = True
    run.passes(1)
    assert run.said == []
    assert run.watch._usual["step"].median() == 2.0


def test_what_compiles_has_ten_times_as_long_and_is_not_the_usual():
    run = Run()
    run.step(1, 150)
    assert run.said == []
    run.step(2, 2)
    assert run.watch._usual["step"].median() == 2.0
    with run.watch.phase("evaluation"):
        for _ in run.watch.waited_for(range(1)):
            run.passes(150)
    assert run.said == []
    first = Run()
    first.watch.began(1, Loss())
    first.passes(200)
    assert "no step has ended for 200 s; it is" in first.said[0]
    first.passes(200)
    assert first.ended


def test_batches_of_an_evaluation_are_watched_one_by_one():
    run = Run()
    run.steps(3)
    with run.watch.phase("evaluation"):
        for _ in run.watch.waited_for(range(60)):
            run.passes(1)
        assert run.said == []
        for _ in run.watch.waited_for(range(1)):
            run.passes(21)  # the first look sees that the batch is another one
            assert "no batch of the evaluation has ended for 20 s (usually 1 s)" in run.said[0]


def test_a_step_is_timed_without_the_evaluation_before_it():
    run = Run()
    run.step(1, 2)
    with run.watch.phase("evaluation"):
        run.passes(60)
    run.step(2, 2)
    assert run.watch._usual["step"].median() == 2.0


def test_a_save_has_ten_times_as_long():
    run = Run()
    run.steps(3)
    with run.watch.phase("save"):
        run.passes(200)
        assert run.said == []
        run.passes(1)
        assert "no save has ended for 200 s; it is at step 3, saving" in run.said[0]


def test_data_that_do_not_come_are_a_hang_and_its_place_is_told():
    run = Run()
    run.steps(3)

    def batches():
        run.passes(21)
        yield 1

    assert list(run.watch.waited_for(batches())) == [1]
    assert "it is at step 3, waiting for its next batch" in run.said[0]


def test_a_process_that_was_stopped_is_not_late_by_that():
    run = Run()
    run.steps(5)
    run.watch.began(6, Loss())
    run.clock.now += 10_000
    run.watch.look()
    run.passes(10)
    assert run.said == [] and run.ended == []


def test_zero_turns_it_off():
    run = Run(**{"train.hang_seconds": 0.0})
    with run.watch:
        assert run.watch._thread.ident is None
        run.watch.began(1, Loss())
    assert not run.watch._pending


@pytest.mark.parametrize("explains", [True, False])
def test_an_explained_run_is_not_watched(explains):
    with watch.over(tiny.config().train, 0, explains) as over:
        assert over._thread.is_alive() is not explains
    assert not over._thread.is_alive()


def test_what_breaks_while_it_hangs_is_the_hang():
    run = Run()
    run.steps(3)
    run.watch.began(4, Loss())
    with pytest.raises(RuntimeError), run.watch:
        raise RuntimeError("Gloo: connection closed by peer")
    assert run.ended == []  # it was no hang
    run.passes(25)
    run.watch.__exit__(RuntimeError, RuntimeError("Gloo: connection closed by peer"), None)
    assert [status for _, status in run.ended] == [STATUS]


def test_a_step_that_failed_is_none_that_ended():
    run = Run()
    run.steps(3)
    loss = Loss()
    run.watch.began(4, loss)
    run.passes(25)
    loss.ready, loss.error = True, RuntimeError("Gloo")
    run.passes(2)
    assert run.watch._told and len(run.said) == 1


def test_the_silent_process_is_late():
    run = Run(of=3)
    run.steps(3)
    run.watch.began(4, Loss())
    for _ in range(20):
        run.hears(1, step=4, phase="step")
        if run.clock.now < 108:
            run.hears(2, step=3, phase="save")
        run.passes(1)
    (said,) = [line for line in run.said if "has ended" in line]
    assert "; late: process 2 on host-2, silent for 19 s, last heard at step 3, saving; it" in said
    assert said.startswith("process 0 of 3: no step has ended for 20 s")


def test_silence_is_told_once_before_anything_hangs():
    run = Run(of=3)
    run.hears(1, step=4)
    for number in range(60):
        run.hears(2, step=4)
        run.step(number, 1)
    (said,) = run.said
    assert said == (
        "process 0 of 3: no sign of life of process 1 on host-1, silent for 10 s, last heard at "
        "step 4, in the step"
    )


def test_the_process_behind_is_late_if_none_is_silent():
    run = Run(of=3)
    run.watch._moves = 9
    run.watch.look()
    run.hears(1, moves=9, step=5)
    run.hears(2, moves=7, step=4, phase="data", since=31.0)
    assert late.found(run.beats) == [2]
    expected = "late: process 2 on host-2, at step 4, waiting for its next batch for 31 s; "
    assert late.said(run.beats) == expected
    run.clock.now += 2.0
    assert "for 33 s" in late.said(run.beats)


def test_where_none_is_behind_or_none_is_heard_nobody_is_accused():
    run = Run(of=2)
    run.watch.look()
    assert "no other process was ever heard" in late.said(run.beats)
    run.hears(1)
    assert late.found(run.beats) == [] and "equally far" in late.said(run.beats)
    assert late.said(heartbeat.alone()) == ""


def test_phases_are_counted_alike_whatever_the_time_they_take():
    """So that who has counted less is behind."""
    runs = [Run(), Run()]
    for run, seconds in zip(runs, (1, 7), strict=True):
        for _ in run.watch.waited_for(range(3)):
            run.clock.now += seconds
            with run.watch.phase("log"):
                run.clock.now += seconds
    assert runs[0].watch._moves == runs[1].watch._moves > 0


def test_a_row_names_the_slowest_host():
    run = Run(of=3)

    def hear(step, *own):
        run.hears(0, step=step, own=own[0])
        run.hears(1, step=step, own=own[1])
        run.hears(2, step=step, own=own[2])

    hear(10, 1.0, 1.0, 5.0)
    assert run.watch.hosts.row() == {}  # there is nothing to compare with yet
    hear(20, 2.0, 6.0, 8.0)
    row = run.watch.hosts.row()
    assert row == {
        "host_seconds_smallest": pytest.approx(0.1),
        "host_seconds_median": pytest.approx(0.3),
        "host_seconds_largest": pytest.approx(0.5),
        "slowest_process": 1,
    }
    assert run.watch.hosts.row() == row  # nothing new was heard
    assert Run().watch.hosts.row() == {}


def test_own_time_is_of_data_and_rows_not_of_devices_or_evaluations():
    run = Run()
    clock = run.clock

    def slowly(seconds):
        for _ in range(2):
            clock.now += seconds
            yield 1

    for _ in run.watch.waited_for(slowly(3.0)):
        clock.now += 100.0  # in the step
        with run.watch.phase("log"):
            clock.now += 0.5
        with run.watch.phase("evaluation"):
            for _ in run.watch.waited_for(slowly(9.0)):
                clock.now += 50.0
    assert run.watch._own == pytest.approx(2 * 3.5)


def opened():
    port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    port.bind(("127.0.0.1", 0))
    port.setblocking(False)
    return port


@pytest.fixture
def pair():
    clock, ports = Clock(), [opened(), opened()]
    peers = [(f"host-{n}", *port.getsockname()) for n, port in enumerate(ports)]
    both = [Heartbeats(n, peers, TOKEN, port, clock) for n, port in enumerate(ports)]
    yield SimpleNamespace(clock=clock, a=both[0], b=both[1], peers=peers)
    for one in both:
        one.close()


def test_processes_hear_each_other(pair):
    beat = Beat(moves=7, step=3, phase="save", since=1.5, own=0.25)
    pair.a.tell(beat)
    pair.clock.now += 5.0
    pair.b.hear()
    assert pair.b.peers[0] == ("host-0", 105.0, beat)
    assert pair.a.peers[0].beat == beat and pair.a.peers[1].beat is None


def test_beats_are_not_told_more_often_than_they_should(pair):
    for step in range(10):
        pair.a.tell(Beat(0, step, "step", 0.0, 0.0))
        pair.clock.now += 0.25
    heard = []
    while True:
        pair.b.peers[0] = pair.b.peers[0]._replace(beat=None)
        try:
            heard.append(pair.b._socket.recv(100))
        except BlockingIOError:
            break
    assert len(heard) == 3
    many = Heartbeats(0, [("", "", 0)] * 1000, TOKEN, None)
    assert many.every == 5.0


def test_what_is_not_of_this_start_of_the_run_is_not_heard(pair):
    other = Heartbeats(0, pair.peers, b"another token 16", opened(), pair.clock)
    other.tell(Beat(0, 9, "step", 0.0, 0.0))
    other.close()
    with opened() as stranger:
        for text in (b"", b"hello", TOKEN + bytes(500), TOKEN + bytes([255]) * 37):
            stranger.sendto(text, pair.peers[1][1:])
    pair.b.hear()
    assert pair.b.peers[0].beat is None


def test_a_peer_that_is_gone_holds_nobody_up(pair):
    pair.b.close()
    for _ in range(3):
        pair.a.tell(Beat(0, 9, "step", 0.0, 0.0))
        pair.a.hear()
        pair.clock.now += 1.0
    assert late.silence(pair.a, 0) == 0.0
    pair.clock.now += 5.0
    assert late.silence(pair.a, 1) == 8.0
