"""Reading the model registry: names, aliases, versions of an attempt, packages of a version."""

from __future__ import annotations

import os
from pathlib import Path

from etl.errors import StageError
from training.tracking import ATTEMPT_TAG, set_tracking

CHAMPION, CHALLENGER, PREVIOUS_CHAMPION = "champion", "challenger", "previous_champion"


def model_name(dataset: str) -> str:
    """Return the registered model's name; simulated data sets have names, hence models, of their own."""
    return f"vql_{dataset}"


class Registry:
    """One registered model.

    Raises:
        StageError: from any method, when MLflow does not answer. "No champion" is never guessed from silence.
    """

    def __init__(self, dataset: str) -> None:
        self.uri = set_tracking()
        from mlflow import MlflowClient

        self.client, self.name = MlflowClient(), model_name(dataset)

    def aliases(self) -> dict[str, str]:
        """Return alias -> version; empty when the model is not registered yet."""
        from mlflow.exceptions import MlflowException

        try:
            return {alias: str(version) for alias, version in self.client.get_registered_model(self.name).aliases.items()}
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise unreachable(self.uri, error) from error
        except Exception as error:
            raise unreachable(self.uri, error) from error

    def version(self, version: str):
        """Return a model version with its tags."""
        try:
            return self.client.get_model_version(self.name, version)
        except Exception as error:
            raise unreachable(self.uri, error) from error

    def version_of_attempt(self, attempt: str) -> str | None:
        """Return the version that this attempt registered, if it did."""
        try:
            found = self.client.search_model_versions(f"name = '{self.name}' AND tags.`{ATTEMPT_TAG}` = '{attempt}'")
        except Exception as error:
            raise unreachable(self.uri, error) from error
        return str(min(int(version.version) for version in found)) if found else None

    def package(self, version: str) -> Path:
        """Download a version and return its package folder."""
        import mlflow

        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{self.name}/{version}"))
        return next(folder.glob("artifacts/*/model.safetensors")).parent

    def aliases_of(self, version: str) -> list[str]:
        return sorted(alias for alias, owner in self.aliases().items() if owner == version)


def unreachable(uri: str, error: Exception) -> StageError:
    """Return the failure of a registry that does not answer."""
    first = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return StageError(f"the MLflow registry at {uri} does not answer ({first})",
                      f"start it or correct MLFLOW_TRACKING_URI (now {os.environ.get('MLFLOW_TRACKING_URI', 'not set')}), then retry the task")
