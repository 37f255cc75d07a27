"""DIN, SDIM and ETA of FuxiCTR and ours, trained in one loop on the same rows: is the AUC the same, and if not, why.

    pip install --target var/peers --no-deps fuxictr==2.3.10 polars polars-runtime-32 h5py keras_preprocessing
    python -m benchmarks.peer_trainings --package var/peers --warehouse var/comparison/warehouse --jobs 15

pandas, scikit-learn, PyYAML and tqdm have to be there, too. Rows, their order, embeddings and their widths, loss, AdamW
and its rates are those of the configuration `default` for all; a target sees the newest --length events. Of each:

    ours    the kind of interest as it is shipped
    bare    ours without what FuxiCTR's has no part for: what the user did with an event, and its age
    theirs  FuxiCTR's long interest in our ranker
    whole   FuxiCTR's model, from the embeddings of the items to the logit: with its short attention and its head
    plain   ETA alone: bare, with the plain products of FuxiCTR's attention

`bare` against `theirs` is one definition in two codes, but for the attention of ETA and for what SDIM and ETA hash.
`theirs` and `whole` run the forward pass of FuxiCTR's class.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing as mp
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.trials import NEEDED, Partition, Rows, measured, model_config
from training import loop
from training.config import ModelConfig, TrainConfig, load_config
from training.data import Batch, Sequences
from training.loop import TrainingData
from training.model.fused_rows import Places, embedded, gathered_exactly
from training.model.history import Events, Items, Targets, begin_of_users
from training.model.interests import INTERESTS
from training.model.interests.din import HIDDEN, Din
from training.model.interests.eta import BITS as ETA_BITS
from training.model.interests.eta import Eta
from training.model.interests.interface import Interest
from training.model.interests.sdim import BITS as SDIM_BITS
from training.model.interests.sdim import TABLES, Sdim
from training.model.ranker import FieldSizes, Ranker

KINDS = ("din", "sdim", "eta")
ARMS = ("ours", "bare", "theirs", "whole", "plain")
CLOSE = 0.005  # AUC
AT_ONCE = 512  # targets; FuxiCTR's tensors have a row for every event of each


class Bare(Interest):
    """A kind of ours whose values are the items alone, as FuxiCTR's are."""

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        super().__init__(config, static_width)
        self.to_value = nn.Linear(static_width, config.width, bias=False)

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        value_EHd = self.to_value(items.static_NS).index_select(0, events.item_E).view_as(events.value_EHd)
        return super().forward(items, replace(events, value_EHd=value_EHd), targets)


class BareDin(Bare, Din):
    pass


class BareSdim(Bare, Sdim):
    pass


class BareEta(Bare, Eta):
    pass


class PlainEta(BareEta):
    """With the products that FuxiCTR's attention has in place of normalised keys and queries and a learned scale."""

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        super().__init__(config, static_width)
        self.log_scale_H.requires_grad_(False)

    def normalised(self, flat_ND: Tensor) -> Tensor:
        return self.heads(flat_ND) * self.config.head_width**-0.25


class Given(nn.Module):
    """In the place of FuxiCTR's embeddings: what it is given are embeddings already."""

    def forward(self, features: dict[str, Tensor], flatten_emb: bool) -> Tensor:
        [only] = features.values()
        return only


class Peer(Interest):
    """FuxiCTR's model between embeddings and head; `name` is that of its class."""

    name: str
    settings: dict[str, Any]

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        super().__init__(config, static_width)
        from fuxictr.features import FeatureMap
        from model_zoo import LongCTR

        features = FeatureMap("rows", "")
        features.features["item"] = {
            "type": "embedding",
            "source": "item",
            "embedding_dim": static_width,
            "pretrain_dim": 1,
        }
        common = {"task": "regression", "optimizer": "adam", "loss": "mse_loss", "embedding_dim": static_width}
        common |= {"verbose": 0, "model_root": "", "metrics": []}
        settings = self.settings | ({"topk": config.search_k} if self.name == "ETA" else {})
        self.peer = getattr(LongCTR, self.name)(features, **common, **settings)
        self.peer.embedding_layer, self.peer.dnn = Given(), nn.Identity()

    def features(self, items: Items, events: Events, targets: Targets) -> Tensor:
        """Return what FuxiCTR's model hands to its head, [T, S for each of target and interests]."""
        self.peer.device = items.static_NS.device
        begin_T = begin_of_users(events.start, targets.start, targets.end_T.device)
        parts = [
            self._of(items.static_NS, events.item_E, targets.item_T[rows], (begin_T + targets.end_T)[rows], count_T)
            for rows in torch.arange(len(begin_T), device=begin_T.device).split(AT_ONCE)
            for count_T in [(targets.end_T - targets.first_T)[rows]]
        ]
        return torch.cat(parts)

    def _of(self, static_NS: Tensor, item_E: Tensor, item_T: Tensor, end_T: Tensor, count_T: Tensor) -> Tensor:
        longest = max(50, int(count_T.max()))  # its short attention wants its newest 49
        back_L = torch.arange(longest, 0, -1, device=end_T.device)  # padding comes first, the newest event last
        seen_TL = back_L <= count_T[:, None]
        # Padding reads any rows: one row for all of it would gather its gradient one by one.
        place_TL = (end_T[:, None] - back_L) % max(1, len(item_E))
        item_TL = item_E[place_TL] if len(item_E) else place_TL
        item_TM = torch.cat([item_TL, item_T[:, None]], 1)
        sequence_TMS = static_NS.index_select(0, item_TM.flatten()).view(*item_TM.shape, -1)
        sequence_TMS = sequence_TMS * F.pad(seen_TL, (0, 1), value=True)[..., None]
        return self.peer(({}, {"item": sequence_TMS.flatten(0, 1)}, seen_TL.float()))["y_pred"]


class Theirs(Peer):
    """Its long interest, in our ranker; all weights that `bare` has too begin as they do there with the same seed."""

    place: int  # of the long interest among what its head gets; the target is the first
    bare: type[Bare]

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        bare = self.bare(config, static_width)
        drawn = torch.get_rng_state()
        super().__init__(config, static_width)
        torch.set_rng_state(drawn)
        self.to_value = bare.to_value
        if isinstance(bare, Din):
            first, _, last = self.peer.attention_layers.attention_layer.mlp
            first.load_state_dict(bare.first.state_dict())
            last.load_state_dict(bare.last.state_dict())

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        interest_TS = self.features(items, events, targets).split(items.static_NS.shape[1], 1)[self.place]
        interest_TS = interest_TS * (targets.end_T > targets.first_T)[:, None]
        interest_THd = self.to_value(interest_TS).view(-1, self.config.heads, self.config.head_width)
        return interest_THd, interest_THd.new_zeros(())


class Whole(Peer):
    """All that its head gets, for `PeerRanker`."""

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        return self.features(items, events, targets)[:, None], items.static_NS.new_zeros(())


class PeerRanker(Ranker):
    """Our ranker, which gives `Whole` the head of FuxiCTR: no product with the target, no recency."""

    def __init__(self, sizes: FieldSizes, config: ModelConfig) -> None:
        super().__init__(sizes, config)
        if isinstance(self.interest, Whole):
            from fuxictr.pytorch.layers import MLP_Block

            parts = 2 if self.interest.name == "DIN" else 3
            tables = [*self.user_fields, self.context]
            width = parts * self.items.width + sum(table.get_parameter("weight").shape[1] for table in tables)
            hidden = list(config.mlp)
            self.head = MLP_Block(width, hidden_units=hidden, output_dim=1, dropout_rates=config.dropout)

    def predict(self, interest_THd: Tensor, items: Items, targets: Targets, batch: Batch) -> Tensor:
        if not isinstance(self.interest, Whole):
            return super().predict(interest_THd, items, targets, batch)
        columns = zip(self.user_fields, batch.user_rows.unbind(1), strict=True)
        about = [embedded(table, Places(rows), rows.shape) for table, rows in columns]
        about.append(gathered_exactly(self.context.weight, Places(batch.target_context)))
        return self.head(torch.cat([*about, interest_THd.flatten(1)], -1)).squeeze(-1)


# The settings of ours, where FuxiCTR's have a name for them.
ATTENTION = {"attention_dim": 64, "num_heads": 4, "short_seq_len": 50}
PEERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "din": ("DIN", 1, {"attention_hidden_units": [HIDDEN], "attention_hidden_activations": "ReLU"}),
    "sdim": ("SDIM", 1, {"num_hashes": TABLES, "hash_bits": SDIM_BITS, "l2_norm": True, **ATTENTION}),
    "eta": ("ETA", 2, {"hash_bits": ETA_BITS, **ATTENTION}),
}
for _kind, _bare in zip(KINDS, (BareDin, BareSdim, BareEta), strict=True):
    _name, _place, _settings = PEERS[_kind]
    INTERESTS[f"{_kind}_bare"] = _bare
    _theirs = {"name": _name, "place": _place, "settings": _settings, "bare": _bare}
    INTERESTS[f"{_kind}_theirs"] = type(f"Theirs{_name}", (Theirs,), _theirs)
    INTERESTS[f"{_kind}_whole"] = type(f"Whole{_name}", (Whole,), {"name": _name, "settings": _settings})
    NEEDED |= {f"{_kind}_{arm}": NEEDED.get(_kind, {}) for arm in ARMS[1:]}
INTERESTS["eta_plain"] = PlainEta


class Wanted(NamedTuple):
    kind: str
    arm: str
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", required=True, type=Path, help="folder with FuxiCTR in it")
    parser.add_argument("--warehouse", required=True, help="of `benchmarks.comparison prepare`")
    parser.add_argument("--dataset", default="movielens")
    parser.add_argument("--dt", default="2018-09-24")
    parser.add_argument("--length", type=int, default=500, help="events that a target sees at most")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--steps", type=int, help="steps at most: a first look")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    sys.path.insert(0, str(args.package.absolute()))  # a process that is spawned begins with this one's path
    kinds, seeds = args.kinds.split(","), [int(seed) for seed in args.seeds.split(",")]
    wanted = [Wanted(*each) for each in itertools.product(kinds, args.arms.split(","), seeds)]
    wanted = [one for one in wanted if one.arm == "ours" or f"{one.kind}_{one.arm}" in INTERESTS]
    # The longest first, and `bare` and `theirs` before the others, so that one that is cut off has most.
    wanted.sort(key=lambda one: (one.arm not in ("bare", "theirs", "plain"), one.kind != "eta"))
    partition = Partition(args.warehouse, args.dataset, args.dt, "default")
    one = partial(line_of, partition=partition, length=args.length, steps=args.steps, device=args.device)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    lines = []
    with mp.get_context("spawn").Pool(args.jobs) as pool:
        for line in pool.imap_unordered(one, wanted):
            print(json.dumps(line), flush=True)
            lines.append(line)
    print(table_of(lines, kinds))


def line_of(one: Wanted, partition: Partition, length: int, steps: int | None, device: str) -> dict[str, Any]:
    """Train one; return its figures on the evaluation targets."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows = Rows.of(partition)
    config = configuration(one, partition.config, steps)
    data = TrainingData.of(Sequences.from_arrow(rows.sequences, length), rows.items, config)
    with patch.object(loop, "Ranker", PeerRanker):
        figures = measured(config, data, rows, device)
    names = ("targets", "users", "auc", "gauc", "logloss", "epochs", "train_seconds")
    return one._asdict() | {name: figures[name] for name in names}


def configuration(one: Wanted, name: str, steps: int | None) -> TrainConfig:
    """Return the configuration of a training: all but the kind of interest, and the ages of `bare`, is that name's."""
    config = load_config(name)
    kind = one.kind if one.arm == "ours" else f"{one.kind}_{one.arm}"
    model = model_config(kind, next(iter(config.models.values())))
    if one.arm in ("bare", "plain"):
        model = replace(model, kernel_components=0)
    return replace(config, models={kind: model}, seed=one.seed, max_epoch_steps=steps)


def table_of(lines: list[dict[str, Any]], kinds: list[str]) -> str:
    """Return the table of AUC by kind, and what two codes of one definition differ by, seed by seed."""
    auc = {(line["kind"], line["arm"], line["seed"]): line["auc"] for line in lines}

    def said(of: list[float]) -> str:
        return f"{np.mean(of):.4f} ± {np.std(of, ddof=1):.4f}" if len(of) > 1 else " ".join(f"{one:.4f}" for one in of)

    def apart(kind: str, one: str, other: str) -> str:
        seeds = [seed for (its, arm, seed) in auc if its == kind and arm == one and (kind, other, seed) in auc]
        of = np.array([auc[kind, one, seed] - auc[kind, other, seed] for seed in seeds])
        if len(of) < 2:
            return " ".join(f"{each:+.4f}" for each in of)
        close = "" if abs(of.mean()) <= CLOSE else f", more than {CLOSE}"
        return f"{of.mean():+.4f} (standard error {of.std(ddof=1) / len(of) ** 0.5:.4f}{close})"

    pairs = ("bare", "theirs"), ("plain", "theirs")
    names = (*ARMS, *(f"{one} minus {other}" for one, other in pairs))
    rows = [f"| kind | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for kind in kinds:
        cells = [said([value for (its, of, _), value in auc.items() if (its, of) == (kind, arm)]) for arm in ARMS]
        rows.append(f"| {kind} | {' | '.join([*cells, *(apart(kind, *pair) for pair in pairs)])} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
