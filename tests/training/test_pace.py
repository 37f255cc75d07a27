"""The lines that say how far a training is, and their figures against what its steps came to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch

from tests.training.test_loop import planted, small_config
from training.data import make_batch
from training.device_time import DeviceTime
from training.loop import EpochResult, Taken, Training, Worker, train_model
from training.pace import SECONDS_BETWEEN_LINES, Pace


def test_a_line_every_ten_seconds_says_losses_rates_and_what_is_left():
    said, logged, now = [], [], [0.0]

    def log(figures: Mapping[str, float], step: int) -> None:
        logged.append((figures, step))

    pace = Pace("vql", 900, "cpu", said.append, log, lambda: now[0])
    for step in range(101, 351):  # a training that goes on; its first step takes long, the others .125 s
        now[0] += 60.0 if step == 101 else 0.125
        gone = step - 100
        pace.at(step, lambda gone=gone: Taken(*(gone * each for each in (250.0, 5000.0, 500.0, 20_000.0, 100.0, 25.0))))
    assert said == [
        f"vql step {step} of 900  loss 0.5000  8 steps/s  4,000 targets/s  160,000 events/s  at most {left} s left"
        "  device idle 20.0%"
        for step, left in ((181, 90), (261, 80), (341, 70))
    ]
    figures = {
        "vql/loss": 0.5,
        "vql/codebook_loss": 0.25,
        "vql/steps_per_s": 8.0,
        "vql/targets_per_s": 4_000.0,
        "vql/events_per_s": 160_000.0,
        "vql/device_idle_share": 0.2,
    }
    assert logged == [(figures, step) for step in (181, 261, 341)]


@pytest.mark.parametrize("name", ["vql", "mean_pooling"])
def test_the_losses_of_the_lines_come_to_those_of_the_epochs_and_change_no_weight(name):
    data = planted(users=30, length=40, topics=4, seed=2)
    config = small_config(epochs=2, min_epoch_steps=12, warmup_steps=4, revive_every_steps=4)
    models = {key: dataclasses.replace(model, dropout=0.2) for key, model in config.models.items()}
    config = dataclasses.replace(config, models=models)
    lines: list[tuple[Mapping[str, float], int]] = []
    epochs: list[EpochResult] = []
    clock = [0.0]
    pace = Pace(name, 99, "cpu", lambda line: None, lambda *line: lines.append(line), lambda: clock[0])
    counts: list[tuple[int, int]] = []

    def on_step(now: Training) -> None:
        clock[0] += 2 * SECONDS_BETWEEN_LINES
        pace.at(now.step, now.taken)
        batch = make_batch(data.joined, *now.order(now.epoch).visited(now.position - 1))
        counts.append((len(batch.target_label), len(batch.event_item)))

    watched, _ = train_model(name, data, config, Worker(), epochs.append, on_step)
    plain, _ = train_model(name, data, config, Worker(), lambda result: None)
    for one, other in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    steps = len(counts) // 2
    assert [step for _, step in lines] == list(range(2, 2 * steps + 1))
    for (figures, _), (targets, events) in zip(lines, counts[1:], strict=True):
        assert figures[f"{name}/targets_per_s"] == pytest.approx(targets / (2 * SECONDS_BETWEEN_LINES))
        assert figures[f"{name}/events_per_s"] == pytest.approx(events / (2 * SECONDS_BETWEEN_LINES))
    # A metric has steps or epochs on its axis, not both.
    assert not {key.removeprefix(f"{name}/") for figures, _ in lines for key in figures} & epochs[0].metrics.keys()
    # The second epoch has a line a step: of the first, the first step is not on a line.
    second = list(zip(lines[steps - 1 :], counts[steps:], strict=True))
    losses = {"loss": ("train_loss", 0), "codebook_loss": ("train_codebook_loss", 1)}
    for key, (metric, weight) in losses.items() if name == "vql" else [("loss", losses["loss"])]:
        weights = [count[weight] for _, count in second]
        mean = sum(figures[f"{name}/{key}"] * w for ((figures, _), _), w in zip(second, weights, strict=True))
        assert mean / sum(weights) == pytest.approx(epochs[1].metrics[metric], rel=1e-9)
        assert epochs[1].metrics[metric] > 0
    assert (
        (f"{name}/codebook_loss" in second[0][0][0]) == ("train_codebook_loss" in epochs[1].metrics) == (name == "vql")
    )


class Stream:
    """The clock of a device that works through what it was sent, and moments in it."""

    def __init__(self) -> None:
        self.host_ms, self.free_ms = 0.0, 0.0  # now; when the device has done all that it was sent

    def work(self, ms: float) -> None:
        self.free_ms = max(self.free_ms, self.host_ms) + ms

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at_ms = stream, 0.0

    def record(self) -> None:
        self.at_ms = max(self.stream.free_ms, self.stream.host_ms)

    def query(self) -> bool:
        return self.stream.host_ms >= self.at_ms

    def elapsed_time(self, end_event: Event) -> float:
        assert self.query() and end_event.query()
        return end_event.at_ms - self.at_ms


def test_a_device_waits_from_the_end_of_a_step_to_the_begin_of_the_next():
    stream = Stream()
    spent = DeviceTime(stream.event)

    def steps(count: int, host_ms: float, device_ms: float) -> None:
        for _ in range(count):
            stream.host_ms += host_ms
            spent.begin()
            stream.work(device_ms)
            spent.end()

    steps(10, host_ms=3, device_ms=5)  # the host is ahead
    stream.host_ms = stream.free_ms
    assert spent.spent_ms() == (50, 0)
    spent.pause()
    stream.host_ms += 1_000  # validation
    steps(10, host_ms=8, device_ms=5)
    stream.host_ms = stream.free_ms
    assert spent.spent_ms() == (100, 9 * 3)
