"""Ends the MLflow run of an attempt that no stage will end any more: its stage was killed, or failed for good outside
of MLflow.

    python -m training.ended --dataset D --warehouse W --dt YYYY-MM-DD --attempt A --status FAILED

A run that has ended, or was never begun, stays as it is. An MLflow that does not answer is logged, and costs nothing.
"""

from __future__ import annotations

from etl.datasets.arguments import partition_parser
from etl.stage.commands import run_stage
from training.tracking import end_run


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument("--status", required=True, choices=("FAILED", "KILLED"), help="how the run ends")
    args = parser.parse_args()
    end_run(args.definition, args.attempt, args.status)


if __name__ == "__main__":
    run_stage(main)
