"""The one place of paths, ports, defaults, secrets and the environment of every process; imports nothing that takes
time.

Every value has a `LONGVIEW_*` variable, so that another topology changes the environment and not the code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import re
import secrets
import sys
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from etl.stage.errors import StageError
from etl.stage.uris import below, folder_problem, without_secrets

ROOT = Path(__file__).resolve().parents[1]

POOLS = {"spark": (1, "jobs that start a Spark session"), "training": (1, "jobs that train or score a model")}
SIMULATED_DT = "2022-04-21"  # partition of `make run` without RAW
AIRFLOW_USER = "admin"
POSTGRES_USER = "longview"
TRAININGS = (
    "?workflowType=machine_learning"  # MLflow 3.17 shows the pages of trainings to who asks, else those of GenAI
)
# What a stage gets of the environment of the services. Credentials of the stores that it reads and writes are among it.
DATABASE = "LONGVIEW_AIRFLOW_DB"  # may hold a password: Airflow's alone
EMBEDDED = "LONGVIEW_DB"  # which database a home has of its own: SQLite, POSTGRESQL
SQLITE, POSTGRESQL = "sqlite", "postgresql"
MODEL_ENVIRONMENT = "LONGVIEW_MODEL_ENVIRONMENT"  # where the mechanical gate runs a model: OWN, PIPELINE
OWN, PIPELINE = "own", "pipeline"
SOCKET_PATH_BYTES = 103  # of a Unix socket on every system (Linux 107), its end not counted
STAGE_NAMES = frozenset(
    """
    PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TMPDIR TEMP TMP PWD HOSTNAME TERM VIRTUAL_ENV LD_LIBRARY_PATH
    LD_PRELOAD
    DYLD_LIBRARY_PATH
    JAVA_HOME JAVA_TOOL_OPTIONS JDK_JAVA_OPTIONS http_proxy https_proxy no_proxy all_proxy HTTP_PROXY HTTPS_PROXY
    NO_PROXY ALL_PROXY
    SPT_NOENV SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE KUBECONFIG DO_NOT_TRACK SCARF_ANALYTICS
    PGPASSFILE
    PGSSLMODE PGSSLROOTCERT
""".split()
)
STAGE_PREFIXES = (
    "LONGVIEW_",
    "LC_",
    "XDG_",
    "PYTHON",
    "SPARK_",
    "PYSPARK_",
    "HADOOP_",
    "YARN_",
    "MLFLOW_",
    "GX_",
    "RAY_",
    "AWS_",
    "GOOGLE_",
    "AZURE_",
    "ARROW_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "GLOO_",
    "TORCH",
    "PYTORCH_",
    "TRITON_",
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "KMP_",
    "PIP_",
    "UV_",
)
RETRY_WAITS = "30 60 120 240 300"  # seconds before each retry of what may pass by itself: 12.5 minutes in all
START = "start"  # the first task of every run, which names its attempt
CONTINUE, APPROVE = "continue", "approve"  # what a run does before training when a gate warned


def dag_id(dataset: str) -> str:
    return f"vql_daily_{dataset}"


def home() -> Path:
    """Everything that the project writes: `var/`, or LONGVIEW_HOME."""
    return Path(os.environ.get("LONGVIEW_HOME") or ROOT / "var").absolute()


def warehouse() -> str:
    """Root of the tables: a path, or a URI that Arrow reads."""
    return _folder("LONGVIEW_WAREHOUSE", "warehouse")


def raw(dataset: str) -> str:
    """Raw logs of a data set where neither the run (the form, RAW) nor its definition (`run.raw`) says where they are.

    LONGVIEW_RAW is the folder or URI of all data sets' folders, by default `raw` in LONGVIEW_HOME.
    """
    given = _address("LONGVIEW_RAW")
    if given and (problem := folder_problem(given)):
        raise StageError(f"LONGVIEW_RAW: {problem}", "set it to an absolute path or a URI, or leave it unset")
    return below(given or str(home() / "raw"), dataset)


def raw_variable() -> str:
    """Return the variable that `raw` follows."""
    return "LONGVIEW_RAW" if os.environ.get("LONGVIEW_RAW") else "LONGVIEW_HOME"


def ray_address() -> str:
    """Return the address of the cluster that trains and scores (RAY_ADDRESS), "" where there is none."""
    return os.environ.get("RAY_ADDRESS", "")


def training_configs() -> list[str]:
    """Return the names of the training configurations."""
    return sorted(path.stem for path in (ROOT / "training" / "configs").glob("*.py") if path.stem != "__init__")


def schedules() -> bool:
    """Whether DAGs run by themselves.

    LONGVIEW_SCHEDULE=0, which `make run` sets for the Airflow that it starts, turns that off.
    """
    return os.environ.get("LONGVIEW_SCHEDULE") != "0"


def definitions() -> Path:
    """Definitions of own data sets: each has a DAG."""
    return Path(os.environ.get("LONGVIEW_DEFINITIONS") or home() / "definitions").absolute()


def runs() -> str:
    return _folder("LONGVIEW_RUNS", "runs")


def reports() -> Path:
    return Path(_folder("LONGVIEW_REPORTS", "reports"))


def comparison(dataset: str, dt: str) -> str:
    """Folder of what was trained to compare models on a partition."""
    return str(home() / "compare" / f"{dataset}-{dt}")


def airflow_home() -> Path:
    return home() / "airflow"


def tracking_uri() -> str:
    return _address("MLFLOW_TRACKING_URI") or (
        postgres_address("mlflow") if has_postgres() else f"sqlite:///{mlflow_sqlite()}"
    )


def airflow_database() -> str:
    """Address of Airflow's database; one that was given may hold a password."""
    return os.environ.get(DATABASE) or (
        postgres_address("airflow") if has_postgres() else f"sqlite:///{airflow_sqlite()}"
    )


def airflow_sqlite() -> Path:
    return airflow_home() / "airflow.db"


def mlflow_sqlite() -> Path:
    return home() / "mlflow.db"


def embedded() -> str:
    """Return what LONGVIEW_DB asks for: SQLITE, POSTGRESQL, or "" for what the home has."""
    text = os.environ.get(EMBEDDED) or ""
    if text not in ("", SQLITE, POSTGRESQL):
        raise SystemExit(
            f"error: {EMBEDDED}={text!r} is unknown\n  remedy: give {SQLITE} or {POSTGRESQL}, or nothing: `make up`"
            f" takes {POSTGRESQL}"
        )
    return text


def has_postgres() -> bool:
    """Whether this home's runs and models are in a PostgreSQL of its own: since the first `make up`, and for good.

    Raises:
        SystemExit: they are, and LONGVIEW_DB=sqlite would hide them.
    """
    found = (postgres_data() / "PG_VERSION").exists()
    if embedded() == SQLITE and found:
        raise SystemExit(
            f"error: {EMBEDDED}={SQLITE}, but the runs and models of {home()} are in its PostgreSQL"
            f" ({postgres_data()})\n  remedy: leave {EMBEDDED} out, or give a home of its own: LONGVIEW_HOME=folder"
        )
    return found


def postgres_data() -> Path:
    return home() / "postgres" / "data"


def postgres_socket() -> Path:
    """Folder of PostgreSQL's Unix socket: beside its data, or below /tmp where the home's path is too long or has
    characters that mean something in an address (a space, a comma, a percent sign). Its owner alone may enter it.
    """
    folder = home() / "postgres"
    if len(os.fsencode(folder / ".s.PGSQL.5432")) <= SOCKET_PATH_BYTES and re.fullmatch(
        r"[\w./-]+", str(folder), re.ASCII
    ):
        return folder
    return Path("/tmp") / f"longview-{os.getuid()}-{hashlib.sha256(os.fsencode(home())).hexdigest()[:12]}"


def postgres_address(database: str) -> str:
    """Return the address of a database of the home's PostgreSQL.

    It holds no password: the socket shows the server who calls.
    """
    return f"postgresql+psycopg2:///{database}?host={postgres_socket()}&port=5432&user={POSTGRES_USER}"


def artifact_root() -> Path:
    return home() / "mlartifacts"


def model_environment() -> str:
    """Return where the mechanical gate runs a model: in an environment of its OWN requirements, or the PIPELINE's.

    Raises:
        StageError: LONGVIEW_MODEL_ENVIRONMENT is neither.
    """
    text = os.environ.get(MODEL_ENVIRONMENT) or OWN
    if text not in (OWN, PIPELINE):
        raise StageError(f"{MODEL_ENVIRONMENT}={text!r} is unknown", f"give {OWN} or {PIPELINE}, or nothing: {OWN}")
    return text


def model_environments() -> Path:
    """Folder of the environments that models ask for, one for each list of requirements."""
    return home() / "model_environments"


def retry_waits() -> list[float]:
    """Seconds before each retry of a stage that may succeed a minute later."""
    text = os.environ.get("LONGVIEW_RETRY_WAITS") or RETRY_WAITS
    try:
        return [float(word) for word in text.split()]
    except ValueError:
        raise SystemExit(
            f"error: LONGVIEW_RETRY_WAITS={text!r} is no list of seconds\n  remedy: give numbers with spaces between,"
            f" such as {RETRY_WAITS!r}"
        ) from None


def airflow_port() -> int:
    return _port("LONGVIEW_AIRFLOW_PORT", 8080)


def mlflow_port() -> int:
    return _port("LONGVIEW_MLFLOW_PORT", 5000)


def airflow_url() -> str:
    return f"http://127.0.0.1:{airflow_port()}"


def mlflow_url() -> str:
    return f"http://127.0.0.1:{mlflow_port()}"


def airflow_run_url(dag_id: str, run_id: str) -> str:
    return f"{airflow_url()}/dags/{dag_id}/runs/{urllib.parse.quote(run_id)}"


def mlflow_run_url(experiment_id: str, run_id: str) -> str:
    return _mlflow_page(f"experiments/{experiment_id}/runs/{run_id}{TRAININGS}")


def mlflow_artifact_url(experiment_id: str, run_id: str, artifact: str) -> str:
    return _mlflow_page(f"experiments/{experiment_id}/runs/{run_id}/artifacts/{artifact}{TRAININGS}")


def mlflow_version_url(model: str, version: str) -> str:
    return _mlflow_page(f"models/{model}/versions/{version}{TRAININGS}")


def _mlflow_page(path: str) -> str:
    """Return the address of a page of MLflow: of its own server, or of the one that keeps the database."""
    server = tracking_uri() if tracking_uri().startswith("http") else mlflow_url()
    return f"{server.rstrip('/')}/#/{path}"


def _address(variable: str) -> str:
    return without_secrets(os.environ.get(variable) or "", variable)


def _folder(variable: str, name: str) -> str:
    """Return the address that a variable gives, a path made absolute: tasks, and workers of Ray, work in folders of
    their own. By default a folder of this name in LONGVIEW_HOME."""
    given = _address(variable) or str(home() / name)
    return given if "://" in given else os.path.abspath(given)


def _port(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise SystemExit(f"error: {variable}={text!r} is not a port\n  remedy: give a number from 1 to 65535")
    return int(text)


def secret(name: str) -> str:
    """Return a secret of this installation, made once and readable by its owner only."""
    return _made_once(name, secrets.token_hex(32)).read_text()


def passwords_file() -> Path:
    """Return Airflow's file of users and passwords; the password is made once."""
    return _made_once("airflow_passwords.json", json.dumps({AIRFLOW_USER: secrets.token_urlsafe(15)}))


def password() -> str:
    return json.loads(passwords_file().read_text())[AIRFLOW_USER]


def _made_once(name: str, text: str) -> Path:
    path = private(home() / "secrets") / name
    with (
        contextlib.suppress(FileExistsError),
        os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file,
    ):
        file.write(text)
    return path


def private(folder: Path) -> Path:
    """Make a folder that its owner alone may enter; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def login() -> bool:
    """Whether Airflow asks for the password.

    LONGVIEW_LOGIN=1 or 0; else when other people can log in on this machine.
    """
    text = os.environ.get("LONGVIEW_LOGIN") or str(int(bool(other_logins())))
    if text not in ("0", "1"):
        raise SystemExit(
            f"error: LONGVIEW_LOGIN={text!r} is neither 0 nor 1\n  remedy: give 1 for a password, 0 for none"
        )
    return text == "1"


def other_logins() -> list[str]:
    """Return the people, besides this process's user, who have a login shell here."""
    first = 501 if sys.platform == "darwin" else 1_000  # lower ids are the system's
    return [
        user.pw_name
        for user in pwd.getpwall()
        if first <= user.pw_uid < 60_000
        and user.pw_uid != os.getuid()
        and user.pw_shell
        and not user.pw_shell.endswith(("/nologin", "/false"))
    ]


def environment() -> dict[str, str]:
    """Return the whole environment of a child process: what was set, then Airflow, MLflow and the stages."""
    private(airflow_home())  # its database, its configuration and its logs may hold secrets
    env = dict(os.environ)
    for name in [name for name in env if name.startswith("AIRFLOW__")]:
        del env[name]  # another installation's settings
    env.update({f"AIRFLOW__{name}": value for name, value in airflow_options().items()})
    env.update(
        AIRFLOW_HOME=str(airflow_home()),
        MLFLOW_TRACKING_URI=tracking_uri(),
        MLFLOW_DISABLE_TELEMETRY="true",
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        GX_ANALYTICS_ENABLED="false",
        SCARF_ANALYTICS="false",
        DO_NOT_TRACK="1",
        RAY_USAGE_STATS_ENABLED="0",
        PYSPARK_PYTHON=sys.executable,
        PYSPARK_DRIVER_PYTHON=sys.executable,
        SPARK_LOCAL_IP=os.environ.get("SPARK_LOCAL_IP", "127.0.0.1"),
        PYTHONPATH=os.pathsep.join([str(ROOT), *_other_python_paths()]),
        PYTHONUNBUFFERED="1",
        SPT_NOENV="1",  # process titles leave /proc/<pid>/environ alone: it shows which service a process belongs to
        LONGVIEW_HOME=str(home()),
        LONGVIEW_DEFINITIONS=str(definitions()),
        LONGVIEW_WAREHOUSE=warehouse(),
        LONGVIEW_RUNS=runs(),
        LONGVIEW_REPORTS=str(reports()),
    )
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return env


def airflow_options() -> dict[str, str]:
    """Return what Airflow is set to: SECTION__OPTION -> value."""
    return {
        "CORE__EXECUTOR": os.environ.get("AIRFLOW__CORE__EXECUTOR", "LocalExecutor"),
        "CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "CORE__PLUGINS_FOLDER": str(ROOT / "dags" / "plugins"),
        "CORE__LOAD_EXAMPLES": "False",
        "CORE__PARALLELISM": "4",
        "CORE__MAX_ACTIVE_TASKS_PER_DAG": "4",
        # Without a login there is no login page; the server listens on the loopback only.
        "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": str(not login()),
        "CORE__SIMPLE_AUTH_MANAGER_USERS": f"{AIRFLOW_USER}:admin",
        "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords_file()),
        "CORE__EXECUTION_API_SERVER_URL": f"{airflow_url()}/execution/",
        "CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "5",
        "DATABASE__SQL_ALCHEMY_CONN": airflow_database(),
        "API__HOST": "127.0.0.1",
        "API__PORT": str(airflow_port()),
        "API__BASE_URL": airflow_url(),
        "API__WORKERS": "1",
        "API__SECRET_KEY": secret("airflow_api_key"),
        "API_AUTH__JWT_SECRET": secret("airflow_jwt_key"),
        # A task asks the server five times before it ends: one that is slow, or whose database hangs until that is
        # noticed, costs none.
        "WORKERS__EXECUTION_API_TIMEOUT": "60",
        # What a killed scheduler had at work is tried again so long after its last heartbeat counts no more (30 s).
        "SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "60",
        "DAG_PROCESSOR__REFRESH_INTERVAL": "10",
        "DAG_PROCESSOR__BUNDLE_REFRESH_CHECK_INTERVAL": "2",
        "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "15",
        "DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "LOGGING__BASE_LOG_FOLDER": str(airflow_home() / "logs"),
        "LOGGING__DAG_PROCESSOR_CHILD_PROCESS_LOG_DIRECTORY": str(airflow_home() / "logs" / "dag_processor"),
        # A cleared or reprocessed task must do its work again, not find the job of its first pass finished.
        "STATE_STORE__CLEAR_ON_SUCCESS": "True",
    }


def stage_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what of an environment (default.

    This process's) a stage needs: of Airflow, and of all that is not named here, nothing.
    """
    given = os.environ if env is None else env
    return {
        name: value
        for name, value in given.items()
        if name != DATABASE and (name in STAGE_NAMES or name.startswith(STAGE_PREFIXES))
    }


def _other_python_paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(ROOT)]
