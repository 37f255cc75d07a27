"""Run by path in a process of its own, away from the repository: score requests with a registered model and nothing
else.

python -P fresh_scores.py MODEL_URI requests.json scores.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    uri, requests_file, scores_file = sys.argv[1:]
    import mlflow
    import pandas as pd

    try:
        folder = Path(mlflow.artifacts.download_artifacts(uri))
    except Exception as error:
        print(error, file=sys.stderr)
        sys.exit(75)  # `etl.stage.errors.EXIT_TRY_AGAIN`: says nothing of the model
    model = mlflow.pyfunc.load_model(str(folder))
    requests = pd.DataFrame(json.loads(Path(requests_file).read_text()))
    example = model.input_example
    scores = model.predict(requests)["scores"]
    import training

    Path(scores_file).write_text(
        json.dumps(
            {
                "example": [float(value) for value in model.predict(example)["scores"].iloc[0]],
                "requests": [[float(value) for value in row] for row in scores],
                "own_code": Path(training.__path__[0]).resolve().is_relative_to(folder.resolve()),
                "pickles": [
                    str(path.relative_to(folder))
                    for path in folder.rglob("*")
                    if path.suffix in (".pkl", ".pickle", ".pt", ".pth")
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
