"""Kinds of interest: a file a kind, a line a kind here. CONTRIBUTING.md says how to add one."""

from __future__ import annotations

from etl.stage.errors import StageError
from training.model.interests.category_pooling import CategoryPooling
from training.model.interests.controls import FrozenCodebook, RandomCodebook
from training.model.interests.dien import Dien
from training.model.interests.din import Din, DinSoftmax
from training.model.interests.eta import Eta
from training.model.interests.hstu import Hstu
from training.model.interests.interface import Interest
from training.model.interests.linear_attention import LinearAttention
from training.model.interests.mean_pooling import MeanPooling
from training.model.interests.recent_attention import RecentAttention
from training.model.interests.sdim import Sdim
from training.model.interests.sim import SimHard, SimSoft
from training.model.interests.softmax_attention import SoftmaxAttention
from training.model.interests.twin import Twin
from training.model.interests.vql import Vql

# By the name that `ModelConfig.interest` gives. A trial outside this package is added before a configuration names it.
INTERESTS: dict[str, type[Interest]] = {
    "vql": Vql,
    "frozen_codebook": FrozenCodebook,
    "random_codebook": RandomCodebook,
    "softmax_attention": SoftmaxAttention,
    "recent_attention": RecentAttention,
    "sdim": Sdim,
    "linear_attention": LinearAttention,
    "mean_pooling": MeanPooling,
    "category_pooling": CategoryPooling,
    "din": Din,
    "din_softmax": DinSoftmax,
    "dien": Dien,
    "sim_hard": SimHard,
    "sim_soft": SimSoft,
    "eta": Eta,
    "twin": Twin,
    "hstu": Hstu,
}


def interest_class(name: str) -> type[Interest]:
    """Return the kind of that name.

    Raises:
        StageError: there is none.
    """
    if name not in INTERESTS:
        raise StageError(f"unknown interest {name!r}", f"use one of: {', '.join(INTERESTS)}")
    return INTERESTS[name]
