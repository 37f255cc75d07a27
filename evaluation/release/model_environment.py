"""The environment that a registered model asks for: made from its own requirements, once for each list of them.

`LONGVIEW_MODEL_ENVIRONMENT=pipeline` takes the pipeline's own instead, for a machine without a package index; what is
said of a model that was run there names it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from etl.stage.commands import log
from etl.stage.errors import StageError, TryAgainError
from etl.stage.local_files import one_at_a_time
from infra import settings
from infra.settings import MODEL_ENVIRONMENT, PIPELINE

BUILD_SECONDS = 900  # pip fetches and unpacks some 300 MB where uv has nothing stored
MADE = ".longview-made"  # written into an environment last


class RequirementsUnmet(Exception):
    """A package index that answers has nothing that meets the model's requirements."""


@dataclass(frozen=True)
class ModelEnvironment:
    """An interpreter that runs a model, and what it is, in words."""

    python: Path
    described: str


def environment_of(model: Path) -> ModelEnvironment:
    """Return the environment for a model that MLflow has logged, made where there is none yet.

    Args:
        model: local folder of the logged model, with `requirements.txt` and `python_env.yaml`.

    Raises:
        RequirementsUnmet: no environment can meet its requirements.
        StageError: LONGVIEW_MODEL_ENVIRONMENT has an unknown value; or the model asks for another Python.
        TryAgainError: no package index answers here.
    """
    if settings.model_environment() == PIPELINE:
        return ModelEnvironment(
            Path(sys.executable),
            f"the pipeline's environment ({MODEL_ENVIRONMENT}={PIPELINE}: its own requirements NOT checked)",
        )
    requirements = (model / "requirements.txt").read_text()
    asked, here = _python_of(model), f"{sys.version_info.major}.{sys.version_info.minor}"
    if asked != here:
        raise StageError(
            f"the model asks for Python {asked}, this is {here}",
            f"run it with that Python, or set {MODEL_ENVIRONMENT}={PIPELINE} to check it in this one",
        )
    folder = _folder_of(requirements)
    with one_at_a_time(folder.with_name(f".{folder.name}.lock"), lambda: log(f"{folder} is being made: waiting")):
        if not (folder / MADE).exists():
            _make(folder, model / "requirements.txt")
    packages = len(requirements.split())
    return ModelEnvironment(folder / "bin" / "python", f"an environment of its own {packages} pinned requirements")


def _python_of(model: Path) -> str:
    found = re.search(r"^python: *['\"]?(\d+\.\d+)", (model / "python_env.yaml").read_text(), re.MULTILINE)
    assert found is not None  # MLflow writes it with every model
    return found[1]


def _folder_of(requirements: str) -> Path:
    digest = hashlib.sha256(f"{sys.version}\n{requirements}".encode()).hexdigest()[:16]
    return settings.model_environments() / digest


def _make(folder: Path, requirements: Path) -> None:
    """Install with uv, which takes seconds, else with pip, as the pipeline itself is (infra/local/bootstrap.sh)."""
    log(f"making the model's own environment in {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, capture_output=True)
    python, said = folder / "bin" / "python", []
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-input"]
    for words in ([_uv(), "pip", "install", "--quiet", "--python", str(python)], pip):
        try:
            done = subprocess.run(
                [*words, "-r", str(requirements)],
                env=os.environ | links_of_pip(),
                capture_output=True,
                text=True,
                timeout=BUILD_SECONDS,
                check=False,
            )
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            said.append(str(error))
            continue
        if done.returncode == 0:
            (folder / MADE).touch()
            return
        said.append(" ".join(done.stderr.split())[:500] or f"{words[0]} ended with code {done.returncode}")
    shutil.rmtree(folder, ignore_errors=True)
    if "No solution found" in said[0] and "network was disabled" not in said[0]:
        raise RequirementsUnmet(said[0])
    if re.search(r"from versions: (?!none)", said[1]):  # it has others: it was asked
        raise RequirementsUnmet(said[1])
    raise TryAgainError(
        f"no environment can be made of {requirements}: uv: {said[0]}; pip: {said[1]}",
        "see that the package index which uv or pip is configured with answers; on a machine without one set"
        f" {MODEL_ENVIRONMENT}={PIPELINE}: the model runs in the pipeline's environment then, and the decision says so",
    )


def _uv() -> str:
    return shutil.which("uv") or str(Path(sys.executable).with_name("uv"))


def links_of_pip() -> dict[str, str]:
    """Return the folder of wheels that pip is configured with, for uv, which does not read pip's configuration."""
    if os.environ.get("UV_FIND_LINKS"):
        return {}
    links = os.environ.get("PIP_FIND_LINKS") or ""
    for key in ("global.find-links", "install.find-links"):
        links = (
            links
            or subprocess.run(
                [sys.executable, "-m", "pip", "config", "get", key], capture_output=True, text=True, check=False
            ).stdout
        )
    return {"UV_FIND_LINKS": ",".join(links.split())} if links.strip() else {}
