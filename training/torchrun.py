"""The training of `training.train` in the processes of torchrun, for machines without Ray:

    torchrun --nproc-per-node 8 -m training.torchrun --dataset D --warehouse W --dt YYYY-MM-DD --attempt A --runs RUNS

Several machines share the folder of runs. With `--max-restarts N` a lost process costs the steps since the last
checkpoint; so does the same command, run again.
"""

from __future__ import annotations

import os
import time
import uuid

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from etl.stage.commands import run_stage
from training.job import take_share_of_cores, train_all
from training.loop import Worker, from_first
from training.train import train, training_parser

LONGEST_MEETING_S = 300.0


def main() -> None:
    worker = _join()
    if worker.rank == 0:
        args = training_parser(__doc__).parse_args()
        train(args, lambda job: train_all(from_first(job, worker), worker), prints=True)
    else:
        train_all(from_first(None, worker), worker)
    dist.destroy_process_group()


def _join() -> Worker:
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore(_name_of_start(store, rank, world), store)
    take_share_of_cores(int(os.environ["LOCAL_WORLD_SIZE"]))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=world, device_id=device)
        return Worker(rank, world, str(device))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    return Worker(rank, world)


def _name_of_start(store: dist.Store, rank: int, world: int) -> str:
    """Agree with the other workers upon a name that no start before had.

    torchrun keeps its store over restarts, with the addresses of workers that are gone, and counts restarts on each
    machine for itself (https://github.com/pytorch/pytorch/issues/135712).

    Raises:
        TimeoutError, dist.DistStoreError: the others did not come.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        name = store.get(f"answer/{mine}").decode()
        store.set(f"heard/{name}/{rank}", "")
        return name
    waiting, end = set(range(1, world)), time.monotonic() + LONGEST_MEETING_S
    while waiting:
        if time.monotonic() > end:
            raise TimeoutError(f"workers {sorted(waiting)} of {world} did not come within {LONGEST_MEETING_S:.0f} s")
        for other in waiting:  # whose hello may be of the start before: another follows
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", mine)
        waiting = {other for other in waiting if not store.check([f"heard/{mine}/{other}"])}
        time.sleep(0.01)
    return mine


if __name__ == "__main__":
    run_stage(main)
