"""The mean of the visible values whose item shares a category with the target's item.

    o_t = 1 / |S_t| sum_{i in S_t} v_i,   S_t: visible events with a category of the target's; none, no interest

Where it ties with VQL, codes have learned nothing but categories.

Legend: N distinct items, E events (flat), T targets (flat), H heads, d head width, k categories of an item; N, P and B
of a layout as in blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from etl.stage.errors import StageError
from training.model.blocks import Layout
from training.model.history import Events, Items, Targets
from training.model.interests.interface import Interest
from training.model.passes import by_layout


class CategoryPooling(Interest):
    """Has no weights of its own."""

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        shared = shared_category(items, events, targets)

        def totals(layout: Layout) -> Tensor:
            weight_NPB = (shared(layout) & layout.visible(targets)).to(events.value_EHd.dtype)
            count_TH1 = layout.summed(weight_NPB[None].sum(-1, keepdim=True))
            return layout.summed(weight_NPB @ layout.events(events.value_EHd)) / count_TH1.clamp(min=1)

        return by_layout(totals, events, targets), items.static_NS.new_zeros(())


def shared_category(items: Items, events: Events, targets: Targets) -> Callable[[Layout], Tensor]:
    """Return what says of a layout's pairs whether event and target share a category, bool [N, P, B].

    The categories of an item are its fields with several values; a data set without one has its fields with one value
    instead. "Missing" is no category.

    Raises:
        StageError: the items have neither.
    """
    several = [rows for name, rows in items.rows.items() if items.kinds[name] == "categories"]
    single = [rows[:, None] for name, rows in items.rows.items() if items.kinds[name] == "category"]
    if not several + single:
        raise StageError(
            f"items have no category: their fields are {', '.join(items.kinds)}",
            "leave out the models that pool or search by category, or give the data set an item field of such a kind",
        )

    def of(layout: Layout) -> Tensor:
        same_NPB = torch.zeros((), dtype=torch.bool, device=layout.event_NB.device)
        for rows_Nk in several or single:
            target_NPk = rows_Nk[targets.item_T][layout.target_NP]
            # One category of each at a time: no tensor has both lists of categories and all pairs.
            for event_E in rows_Nk[events.item_E].unbind(1):
                event_NB = torch.where(event_E > 0, event_E, -1)[layout.event_NB]
                for target_NP in target_NPk.unbind(2):
                    same_NPB = same_NPB | (target_NP[..., None] == event_NB[:, None])
        return same_NPB

    return of
