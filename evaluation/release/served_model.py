"""The registered model, as MLflow runs it.

Code and a package folder, no pickle. One input row is one user's request.
"""

from __future__ import annotations

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class ServedModel(PythonModel):
    """Loads the package through `training.scoring` and scores each row's candidates."""

    def load_context(self, context) -> None:
        from training.scoring import load_scorer

        self.scorer = load_scorer(context.artifacts["package"])

    def predict(self, context, model_input: pd.DataFrame, params=None) -> pd.DataFrame:
        """Return one row a request: `scores`, a list with one probability a candidate."""
        requests = model_input.to_dict("records")
        return pd.DataFrame({"scores": [self.scorer.score_request(request).tolist() for request in requests]})


set_model(ServedModel())
