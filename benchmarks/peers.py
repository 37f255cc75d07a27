"""DIN of this repository against the layer of FuxiCTR: the same weights, events and targets, in double precision.

    pip install --target var/peers --no-deps fuxictr==2.3.10 polars polars-runtime-32 h5py keras_preprocessing
    python -m benchmarks.peers --package var/peers      # benchmarks/peer_trainings.py trains whole models side by side

An activation unit has one layer of weights for both, so they are compared by what they compute, and by the gradients
that reach weights and embeddings, and not by trainings that differ in all else. FuxiCTR mixes the embeddings
themselves, so here the values are the embeddings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.config import ModelConfig
from training.model.history import Events, Items, Targets
from training.model.interests.din import HIDDEN, Din, DinSoftmax

HEADS, WIDTH, ITEMS = 2, 4, 50
STATIC = HEADS * WIDTH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", required=True, type=Path, help="folder with FuxiCTR in it")
    args = parser.parse_args()
    sys.path.insert(0, str(args.package.absolute()))
    from fuxictr.pytorch.layers.attentions.target_attention import DIN_Attention

    for kind, softmax in ((Din, False), (DinSoftmax, True)):
        worst = [
            max(both) for both in zip(*(differences(kind, DIN_Attention, softmax, s) for s in range(5)), strict=True)
        ]
        print(
            f"{kind.__name__}: output {worst[0]:.1e}, gradients {worst[1]:.1e} (largest relative difference, 5 seeds)"
        )


def differences(kind: type[Din], peer: Any, softmax: bool, seed: int) -> tuple[float, float]:
    """Return the relative differences of outputs and of gradients, of one user with 30 events and 7 targets."""
    torch.manual_seed(seed)
    ours = kind(ModelConfig(heads=HEADS, head_width=WIDTH, groups=HEADS), STATIC).double()
    theirs = peer(STATIC, [HIDDEN], use_softmax=softmax).double()
    first, _, last = theirs.attention_layer.mlp
    for mine, other in ((ours.first, first), (ours.last, last)):
        other.load_state_dict(mine.state_dict())
    event_E, target_T = torch.randint(ITEMS, (30,)), torch.randint(ITEMS, (7,))
    end_T = torch.randint(1, 31, (7,))
    seen_TE = torch.arange(30) < end_T[:, None]
    static = [torch.randn(ITEMS, STATIC, dtype=torch.float64).requires_grad_()]
    static.append(static[0].detach().clone().requires_grad_())
    events = Events(event_E, static[0][event_E].unflatten(1, (HEADS, WIDTH)), torch.arange(30), [0, 30])
    cut_offs = [len(end_T.unique())]
    targets = Targets(target_T, torch.full((7,), 99), torch.zeros_like(end_T), end_T, [0, 7], cut_offs, [0])
    found, _ = ours(Items(static[0], {}, {}), events, targets)
    expected = theirs(static[1][target_T], static[1][event_E].expand(7, -1, -1), seen_TE)
    weights_TD = torch.randn_like(expected)
    (found.flatten(1) * weights_TD).sum().backward()
    (expected * weights_TD).sum().backward()
    pairs = [(static[0].grad, static[1].grad), (ours.first.weight.grad, first.weight.grad)]
    pairs.append((ours.last.weight.grad, last.weight.grad))
    return relative(found.flatten(1), expected), max(relative(mine, other) for mine, other in pairs)


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
