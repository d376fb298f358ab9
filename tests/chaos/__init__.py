"""Real runs of a tiny job, broken for real: what was tried, what survived and what was lost.

    python -m tests.chaos --kills 20 --json tests/chaos/results.json

A fault is a file here: how to break a run, and what must hold afterwards. `trial` says what a trial
is and counts them, `room` has the job and compares it with the run that nobody disturbed.
"""
