"""Runs a Spark job of etl.jobs as its command line does and prints what only the inside knows: the session's time,
shuffle bytes.

python -m benchmarks.etl_job FIGURES.json events|sequences <arguments of the job>
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import tree
from etl.stage.commands import run_stage


def stages(spark) -> dict[str, int]:
    """Return sums over the stages of a session, from its status store: it is kept with the UI switched off, too."""
    context = spark.sparkContext._jsc.sc()
    context.listenerBus().waitUntilEmpty()  # figures arrive in the background
    gateway = spark.sparkContext._gateway
    nothing = gateway.jvm.java.util.ArrayList()
    found = context.statusStore().stageList(nothing, False, False, gateway.new_array(gateway.jvm.double, 0), nothing)
    sums = dict.fromkeys(("stages", "tasks", "shuffle_write_bytes", "shuffle_read_bytes"), 0)
    for place in range(found.size()):
        stage = found.apply(place)
        sums["stages"] += 1
        sums["tasks"] += stage.numCompleteTasks()
        sums["shuffle_write_bytes"] += stage.shuffleWriteBytes()
        sums["shuffle_read_bytes"] += stage.shuffleReadBytes()
    return sums


def main() -> None:
    figures_path, job, *arguments = sys.argv[1:]
    command: Any = importlib.import_module(f"etl.jobs.{job}")
    module: Any = importlib.import_module(
        {"events": "etl.ingest.build_events", "sequences": "etl.sequences.build_sequences"}[job]
    )
    start_session, figures = module.spark_session, {"session_s": 0.0, "stop_s": 0.0, "work_cpu_s": 0.0}

    def timed_session(name: str):
        began, before = time.perf_counter(), time.process_time()
        spark = start_session(name)
        figures["session_s"] = time.perf_counter() - began
        used = tree(os.getpid())[1] - (before - start_cpu)
        stop = spark.stop

        def timed_stop() -> None:
            began = time.perf_counter()
            figures["work_cpu_s"] = tree(os.getpid())[1] - used
            figures.update(stages(spark))
            stop()
            figures["stop_s"] = time.perf_counter() - began

        spark.stop = timed_stop
        return spark

    module.spark_session = timed_session
    sys.argv = [f"etl.jobs.{job}", *arguments]
    began, start_cpu = time.perf_counter(), time.process_time()
    command.main()
    figures["work_s"] = time.perf_counter() - began - figures["session_s"] - figures["stop_s"]
    Path(figures_path).write_text(json.dumps(figures))


if __name__ == "__main__":
    run_stage(main)
