"""Reading the model registry: names, aliases, versions of an attempt, packages of a version."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow.fs as pafs

from etl.stage.errors import StageError
from etl.warehouse.retention import Lineage
from etl.warehouse.store import sha256_of
from training.tracking import ATTEMPT_TAG, PARTITION_TAG, asking_mlflow, set_tracking

CHAMPION, CHALLENGER, PREVIOUS_CHAMPION = "champion", "challenger", "previous_champion"
ANCHOR = "anchor"  # what no promotion may fall behind; evaluation.gate.anchor_after says when it moves
DIGEST_TAG, SNAPSHOT_TAG = "model.digest", "data.snapshot_digest"
WARM_START_TAG = "warm_start"  # what it began with: `none`, a version of the same model, or the address of a package
PAGE = 1_000  # versions that are asked for at once
# Of a package: what scores depend on. The example request is of the day that the model was trained on.
EXAMPLE = "example_request.json"


def model_name(dataset: str) -> str:
    """Return the registered model's name; simulated data sets have names, hence models, of their own."""
    return f"vql_{dataset}"


def model_digest(package: Path) -> str:
    """Return the digest of what a model is.

    Its weights, vocabulary and settings; two models of one digest give the same scores.
    """
    digest, local = hashlib.sha256(), pafs.LocalFileSystem()
    for path in sorted(path for path in package.iterdir() if path.name != EXAMPLE):
        digest.update(f"{path.name}:{sha256_of(local, str(path))}\n".encode())
    return digest.hexdigest()[:16]


class ArtifactGone(Exception):
    """The registry has a version, but not its files."""


class Registry:
    """One registered model.

    Raises:
        TryAgainError: from any method, when MLflow does not answer. "No champion" is never guessed from silence.
        StageError: from any method, when MLflow refuses.
    """

    def __init__(self, dataset: str) -> None:
        self.uri = set_tracking()
        from mlflow import MlflowClient

        with asking_mlflow():
            self.client, self.name = MlflowClient(), model_name(dataset)

    def aliases(self) -> dict[str, str]:
        """Return alias -> version; empty when the model is not registered yet."""
        model = self._model()
        return {} if model is None else {alias: str(version) for alias, version in model.aliases.items()}

    def tags(self) -> dict[str, str]:
        """Return the tags of the model itself; empty when it is not registered yet."""
        model = self._model()
        return {} if model is None else dict(model.tags)

    def _model(self):
        from mlflow.exceptions import MlflowException

        with asking_mlflow():
            try:
                return self.client.get_registered_model(self.name)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise

    def version(self, version: str):
        """Return a model version with its tags.

        Raises:
            StageError: it is gone, though an alias may still point at it.
        """
        from mlflow.exceptions import MlflowException

        with asking_mlflow():
            try:
                return self.client.get_model_version(self.name, version)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                aliases = [alias for alias, owner in self.aliases().items() if owner == version]
                what = f"version {version} of {self.name} is gone" + (
                    f", yet the alias {' and '.join(aliases)} points at it" if aliases else ""
                )
                client = f"mlflow.MlflowClient({self.uri!r})"
                remedy = " and ".join(
                    f"{client}.delete_registered_model_alias({self.name!r}, {alias!r})" for alias in aliases
                )
                raise StageError(
                    what,
                    (
                        f"point the alias at a version that exists, or take it away: {remedy}"
                        if aliases
                        else "run the partition again, as a new attempt"
                    ),
                ) from error

    def version_of_attempt(self, attempt: str, dt: str) -> str | None:
        """Return the version that this attempt registered, if it did. Of doubles, which a lost answer leaves, the first
        stays.

        Raises:
            StageError: it was registered for another day.
        """
        with asking_mlflow():
            found = sorted(
                self.client.search_model_versions(f"name = '{self.name}' AND tags.`{ATTEMPT_TAG}` = '{attempt}'"),
                key=lambda one: int(one.version),
            )
            if not found:
                return None
            if (other := found[0].tags.get(PARTITION_TAG)) != dt:
                raise StageError(
                    f"attempt {attempt} has registered version {found[0].version} of {self.name} for dt={other}, not"
                    f" for dt={dt}",
                    "give every day an --attempt of its own",
                )
            for double in found[1:]:
                self.client.delete_model_version(self.name, double.version)
            return str(found[0].version)

    def lineage(self) -> Lineage:
        """Return what the versions that there are need of the tables and the runs."""
        with asking_mlflow():
            aliases = set(self.aliases().values())
            found = self.client.search_model_versions(f"name = '{self.name}'", max_results=PAGE)
            versions = list(found)
            while found.token:
                found = self.client.search_model_versions(
                    f"name = '{self.name}'", max_results=PAGE, page_token=found.token
                )
                versions += found
        served = [version for version in versions if str(version.version) in aliases]
        return Lineage(
            versions=len(versions),
            snapshots=frozenset(one.tags[SNAPSHOT_TAG] for one in versions if SNAPSHOT_TAG in one.tags),
            served=frozenset(f"{self.name}/{one.version}" for one in served),
            attempts=frozenset(one.tags[ATTEMPT_TAG] for one in served if ATTEMPT_TAG in one.tags),
        )

    def files(self, version: str) -> Path:
        """Download a version and return the folder of the model that MLflow has logged.

        Raises:
            ArtifactGone: its files are not there any more.
        """
        import mlflow
        from mlflow.exceptions import MlflowException

        with asking_mlflow():
            try:
                return Path(mlflow.artifacts.download_artifacts(f"models:/{self.name}/{version}"))
            except (MlflowException, OSError) as error:
                if _is_gone(error):
                    raise ArtifactGone(
                        f"the files of version {version} of {self.name} are gone: {type(error).__name__}: {error}"[:500]
                    ) from error
                raise

    def package(self, version: str) -> Path:
        """Download a version and return its package folder.

        Raises:
            ArtifactGone: its files are not there any more.
        """
        folder = self.files(version)
        weights = next(folder.glob("artifacts/*/model.safetensors"), None)
        if weights is None:
            raise ArtifactGone(f"version {version} of {self.name} holds no artifacts/*/model.safetensors")
        return weights.parent

    def aliases_of(self, version: str) -> list[str]:
        return sorted(alias for alias, owner in self.aliases().items() if owner == version)


def _is_gone(error: Exception) -> bool:
    """Whether the files are not there; a server or a store that does not answer says something else."""
    import requests

    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code == 404
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in (
        "RESOURCE_DOES_NOT_EXIST",
        "NOT_FOUND",
    )
