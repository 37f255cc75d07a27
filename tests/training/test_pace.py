"""The lines that say how far a training is."""

from __future__ import annotations

from training.pace import Pace


def test_a_line_every_ten_seconds_says_rate_and_what_is_left():
    said, logged, now = [], [], [0.0]

    def log(figures, step):
        logged.append((figures, step))

    pace = Pace("vql", 900, 500.0, "cpu", said.append, log, lambda: now[0])
    for step in range(101, 351):  # a training that goes on; its first step takes long, the others .125 s
        now[0] += 60.0 if step == 101 else 0.125
        pace.at(step)
    assert said == [
        f"vql step {step} of 900  8 steps/s  4,000 targets/s  at most {left} s left"
        for step, left in ((181, 90), (261, 80), (341, 70))
    ]
    assert logged == [({"vql/steps_per_s": 8.0, "vql/targets_per_s": 4000.0}, step) for step in (181, 261, 341)]
