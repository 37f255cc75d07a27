"""The training of `training.train` in the processes of torchrun, for machines without Ray:

    torchrun --nproc-per-node 8 -m training.torchrun --dataset D --warehouse W --dt YYYY-MM-DD --attempt A --runs RUNS

Several machines share the folder of runs. With `--max-restarts N` a lost process costs the steps since the last
checkpoint; so does the same command, run again.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from etl.stage.commands import run_stage
from training.job import take_share_of_cores, train_all
from training.loop import Worker, from_first
from training.train import train, training_parser


def main() -> None:
    worker = _join()
    if worker.rank == 0:
        args = training_parser(__doc__).parse_args()
        train(args, lambda job: train_all(from_first(job, worker), worker), prints=True)
    else:
        train_all(from_first(None, worker), worker)
    dist.destroy_process_group()


def _join() -> Worker:
    local, rank, world = (int(os.environ[name]) for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))
    take_share_of_cores(int(os.environ["LOCAL_WORLD_SIZE"]))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local))
        return Worker(rank, world, f"cuda:{local}")
    dist.init_process_group("gloo")
    return Worker(rank, world)


if __name__ == "__main__":
    run_stage(main)
