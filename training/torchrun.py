"""The training of `training.train` in the processes of torchrun, for machines without Ray:

    torchrun --nproc-per-node 8 -m training.torchrun --dataset D --warehouse W --dt YYYY-MM-DD --attempt A --runs RUNS

Several machines (`--nnodes N --rdzv-backend c10d --rdzv-endpoint HOST:PORT` on each) share the folder of runs. With
`--max-restarts N` a lost process costs the steps since the last checkpoint; so does the same command, run again.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from etl.stage.commands import run_stage
from etl.stage.errors import TryAgainError
from training.job import take_share_of_cores, train_all
from training.loop import LONGEST_STEP_S, Worker, from_first
from training.train import train, training_parser

LONGEST_MEETING_S = 1.5 * LONGEST_STEP_S  # a worker whose step waits for lost ones ends first, and comes anew


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
    store = dist.PrefixStore(name_of_start(store, rank, world), store)
    take_share_of_cores(int(os.environ["LOCAL_WORLD_SIZE"]))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=world, device_id=device)
        return Worker(rank, world, str(device))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    return Worker(rank, world)


def name_of_start(store: dist.Store, rank: int, world: int, patience_s: float = LONGEST_MEETING_S) -> str:
    """Agree with the other workers upon a name that no start before had.

    torchrun keeps its store over restarts, with the addresses of workers that are gone, and counts restarts on each
    machine for itself (https://github.com/pytorch/pytorch/issues/135712). The first worker answers whoever says hello
    with a name of its own: what a dead one wrote is answered and never heard. Nobody of an earlier start may be alive,
    as is so on one machine, and with the rendezvous c10d.

    Raises:
        TryAgainError: the others did not come.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        try:
            store.wait([f"answer/{mine}"], timedelta(seconds=patience_s))
        except dist.DistStoreError as error:
            raise _alone(f"worker 0 did not answer worker {rank}", patience_s) from error
        name = store.get(f"answer/{mine}").decode()
        store.set(f"heard/{name}/{rank}", mine)
        return name
    waiting, end = set(range(1, world)), time.monotonic() + patience_s
    while waiting:
        if time.monotonic() > end:
            raise _alone(f"workers {sorted(waiting)} of {world} did not come", patience_s)
        waiting = {other for other in range(1, world) if not _has_heard(store, other, mine)}
        time.sleep(0.01)
    return mine


def _has_heard(store: dist.Store, rank: int, name: str) -> bool:
    """Answer a worker's hello with the name, and say whether the one that said it has heard."""
    hello, heard = f"hello/{rank}", f"heard/{name}/{rank}"
    if not store.check([hello]):
        return False
    other = store.get(hello)
    store.set(f"answer/{other.decode()}", name)
    return store.check([heard]) and store.get(heard) == other


def _alone(what: str, patience_s: float) -> TryAgainError:
    return TryAgainError(f"{what} within {patience_s:.0f} s", "run the same command again")


if __name__ == "__main__":
    run_stage(main)
