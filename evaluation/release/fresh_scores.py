"""Run by path in a process of its own, away from the repository: score requests with a logged model and nothing else.

python -P fresh_scores.py MODEL_FOLDER requests.json scores.json

`requests.json` holds {"requests": [...], "timed": [places in it], "rounds": N}. `scores.json` gets the scores of each
request or why there are none, the best of N times of each timed one in seconds, whether the code that ran is the
model's own, and the pickles that it holds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    folder, asked_file, scores_file = (Path(word) for word in sys.argv[1:])
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model(str(folder))
    asked = json.loads(asked_file.read_text())
    frames = [pd.DataFrame([request]) for request in asked["requests"]]
    timed = [frames[place] for place in asked["timed"]]
    scores = [scored(model, frame) for frame in frames]
    # In one call, too: a caller may send several users at once.
    together = scored(model, pd.concat(timed, ignore_index=True)) if timed else {"scores": []}
    seconds = [float("inf")] * len(timed)
    for _ in range(asked["rounds"]):
        for place, frame in enumerate(timed):
            begun = time.perf_counter()
            scored(model, frame)
            seconds[place] = min(seconds[place], time.perf_counter() - begun)
    import training

    found = {
        "requests": scores,
        "together": together,
        "seconds": seconds,
        "own_code": Path(training.__path__[0]).resolve().is_relative_to(folder.resolve()),
        "pickles": [
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.suffix in (".pkl", ".pickle", ".pt", ".pth")
        ],
    }
    scores_file.write_text(json.dumps(found))


def scored(model, frame) -> dict:
    """Return {"scores": of all rows, one after the other}, or {"error": why there are none}."""
    try:
        return {"scores": [float(value) for row in model.predict(frame)["scores"] for value in row]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


if __name__ == "__main__":
    main()
