"""DIN, SDIM and ETA of this repository against FuxiCTR's code: the same weights, planes, events and targets.

    pip install --target var/peers --no-deps fuxictr==2.3.10 polars polars-runtime-32 h5py keras_preprocessing
    python -m benchmarks.peers --package var/peers

pandas, scikit-learn, PyYAML and tqdm have to be there, too. A layer of weights is compared by what it computes and by
the gradients that reach weights and embeddings, a search by what it finds; benchmarks/peer_trainings.py trains them.
FuxiCTR mixes the embeddings themselves, so here the values are the embeddings. SDIM and ETA hash them there, and keys
here: both are given the embeddings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer_trainings import INTERESTS, Theirs
from training.config import ModelConfig
from training.model.blocks import Layout, highest
from training.model.history import Events, Items, Targets
from training.model.interests.din import HIDDEN, Din, DinSoftmax
from training.model.interests.eta import Eta
from training.model.interests.sdim import Sdim

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
    print(f"Sdim: output {max(sdim_difference(seed) for seed in range(5)):.1e} (single precision, 5 seeds)")
    print(f"Eta: {sum(map(eta_differences, range(5)))} of {5 * 7} targets get other distances from the search")


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


def sdim_difference(seed: int) -> float:
    """Return the relative difference of the outputs of one user with 30 events and 7 targets."""
    torch.manual_seed(seed)
    config = ModelConfig(heads=HEADS, head_width=WIDTH, groups=HEADS)
    theirs, ours = INTERESTS["sdim_theirs"](config, STATIC), Sdim(config, STATIC)
    assert isinstance(theirs, Theirs)
    theirs.peer.random_rotations.data[0] = ours.planes_DXB
    ours.keys = _embeddings  # type: ignore[method-assign]
    drawn = one_user_drawn()
    expected = theirs.features(*drawn).split(STATIC, 1)[theirs.place]
    return relative(ours(*drawn)[0].flatten(1), expected)


def eta_differences(seed: int) -> int:
    """Return how many of 7 targets get other Hamming distances from the searches for 10 of 30 events; of events at
    the same distance either may be taken."""
    torch.manual_seed(seed)
    config = ModelConfig(interest="eta", heads=HEADS, head_width=WIDTH, groups=HEADS, search_k=10)
    theirs, ours = INTERESTS["eta_theirs"](config, STATIC), Eta(config, STATIC)
    assert isinstance(theirs, Theirs)
    rotations, ours.keys = ours.planes_DB[None], _embeddings  # type: ignore[method-assign]
    items, events, targets = one_user_drawn()
    [layout] = Layout.of(events.start, targets.start, items.static_NS.device)
    score_NPB = ours.search(items, events, targets)(layout, torch.empty(0))
    score_NPB = score_NPB.masked_fill(~layout.visible(targets), float("-inf"))
    found_NPB = highest(layout, score_NPB, config.search_k)[0]
    history_TES = items.static_NS[events.item_E].expand(len(targets.item_T), -1, -1)
    seen_TE = torch.arange(len(events.item_E)) < targets.end_T[:, None]
    static_TS = items.static_NS[targets.item_T]
    theirs_TKS, mask_TK = theirs.peer.topk_retrieval(rotations, static_TS, history_TES, seen_TE, config.search_k)
    hashed = [vector @ rotations[0] > 0 for vector in (static_TS[:, None], history_TES, theirs_TKS)]
    ours_TE = layout.summed(found_NPB[None].float() @ layout.events(torch.eye(len(events.item_E))[:, None]))[:, 0] > 0
    other = 0
    for target in range(len(static_TS)):
        mine = (hashed[1][target] != hashed[0][target]).sum(-1)[ours_TE[target]]
        peer = (hashed[2][target] != hashed[0][target]).sum(-1)[mask_TK[target]]
        other += sorted(mine.tolist()) != sorted(peer.tolist())
    return other


def one_user_drawn() -> tuple[Items, Events, Targets]:
    """Return 30 events and 7 targets of one user, the values of the events their items' embeddings."""
    static_NS = torch.randn(ITEMS, STATIC)
    event_E, end_T = torch.randint(ITEMS, (30,)), torch.randint(1, 31, (7,))
    events = Events(event_E, static_NS[event_E].unflatten(1, (HEADS, WIDTH)), torch.arange(30), [0, 30])
    seen = torch.zeros_like(end_T), end_T, [0, 7], [len(end_T.unique())], [0]
    return Items(static_NS, {}, {}), events, Targets(torch.randint(ITEMS, (7,)), torch.full((7,), 99), *seen)


def _embeddings(static_NS: Tensor) -> Tensor:
    return static_NS.unflatten(1, (HEADS, WIDTH))


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
