"""The one place that builds a Spark session: local, on the cluster that SPARK_MASTER names, or under spark-submit."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def spark_session(app_name: str) -> SparkSession:
    """Return the session of a stage.

    Under spark-submit, all that it was given (options, --conf, spark-defaults.conf) stays as it is; only what it leaves
    open is set here. Elsewhere the environment decides: SPARK_MASTER (default local[*]) and LONGVIEW_SPARK_MEMORY
    (driver, and executors on a cluster; default 2g). On a cluster the executors get this process's copy of `etl/` with
    the job.
    """
    from pyspark import SparkConf, SparkContext
    from pyspark.sql import SparkSession

    # spark-submit starts the JVM first, then this process: what it was given is there before any of ours.
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ
    if submitted:
        SparkContext._ensure_initialized()
    given_conf = SparkConf(loadDefaults=submitted)
    master = given_conf.get("spark.master", None) or os.environ.get("SPARK_MASTER", "local[*]")
    local = master.startswith("local")
    settings = {
        "spark.master": master,
        "spark.app.name": app_name,
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.adaptive.enabled": "true",
        # A task of ours is a bucket or a file split: merging small ones would undo that.
        "spark.sql.adaptive.coalescePartitions.enabled": "false",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "65536",
        "spark.log.level": "ERROR",
    }
    if local:
        settings["spark.ui.enabled"] = "false"
        # Python workers otherwise take the first python on PATH, and find `etl` only when started in its folder.
        os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (REPOSITORY, os.environ.get("PYTHONPATH")) if p)
        os.environ.setdefault(
            "SPARK_LOCAL_IP", "127.0.0.1"
        )  # never on a cluster: its executors have to reach the driver
    else:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # on the executors too, unless it names another path
    if not submitted:
        memory = os.environ.get("LONGVIEW_SPARK_MEMORY", "2g")
        settings["spark.driver.memory"] = memory
        if local:
            settings["spark.driver.extraJavaOptions"] = "-XX:TieredStopAtLevel=1"  # start-up bound: 35 s -> 26 s
        else:
            settings["spark.executor.memory"] = memory
    builder = SparkSession.builder
    for name, value in settings.items():
        if not given_conf.contains(name):
            builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel(given_conf.get("spark.log.level", None) or settings["spark.log.level"])
    if not local:
        _ship_code(session)
    logging.getLogger("py4j").setLevel(logging.ERROR)  # it logs every closed connection, also at interpreter exit
    return session


def _ship_code(session: SparkSession) -> None:
    """Send `etl/` to the executors, so that they run what the driver runs, whatever their image holds.

    Modules are imported from a zip there: code that runs in tasks opens no file beside its module.
    """
    package = Path(__file__).resolve().parents[1]
    folder = tempfile.mkdtemp(prefix="longview-code-")  # served from here until the session stops
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    archive = os.path.join(folder, "longview_etl.zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for path in sorted(package.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                target.write(path, path.relative_to(package.parent))
    session.sparkContext.addPyFile(archive)
