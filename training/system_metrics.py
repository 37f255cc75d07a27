"""What a training takes of the machine of its first worker, over time, for MLflow's page of system metrics."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil

from training.tracking import MetricsBuffer, set_tracking

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

LEAVE_WITHIN_SECONDS = 5.0  # a server that is away is not waited for any longer


@contextmanager
def system_metrics(buffer: MetricsBuffer) -> Iterator[None]:
    """Sample processor, memory, disk, network and NVIDIA GPUs of this machine while the body runs; never fails it.

    MLflow's own collectors and names (`system/...`), every ten seconds (MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL) and at
    the end. Its own thread of them would end with the first request that fails; here samples wait in the buffer's file
    until the server is back, and a run that goes on in another process goes on counting its samples.

    Args:
        buffer: of these metrics alone, which another thread uses.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_sample, args=(buffer, ended), name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LEAVE_WITHIN_SECONDS)


def _sample(buffer: MetricsBuffer, ended: threading.Event) -> None:
    try:
        machine = _collectors(buffer)
        psutil.cpu_percent()  # a thread's first call knows nothing yet, later ones say what was since the one before
        last = False
        while not last:
            last = ended.wait(machine.sampling_interval)
            machine.collect_metrics()
            machine.publish_metrics(machine.aggregate_metrics())
            buffer.flush()  # asks a server again that was away
    except Exception as error:
        buffer.say(f"warning: no system metrics from here on: {type(error).__name__}: {error}")


def _collectors(buffer: MetricsBuffer) -> SystemMetricsMonitor:
    """Return MLflow's collectors, which number their samples on from the run's last one, and log to the buffer."""
    from mlflow.system_metrics import system_metrics_monitor

    logging.getLogger(system_metrics_monitor.__name__).setLevel(logging.WARNING)  # a machine without a GPU is no news
    set_tracking()
    machine = system_metrics_monitor.SystemMetricsMonitor(buffer.run_id, resume_logging=buffer.run_id is not None)
    machine.mlflow_logger = SimpleNamespace(record_metrics=buffer.log)  # type: ignore[assignment]
    return machine
