"""Target attention over one user's history, in its two equal forms: over events (training), over codes (serving).

Legend: L events of the user, T targets, H heads, d head width, G groups, C codes, M kernel components.
Queries and keys arrive scaled, so logits are plain dot products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.model.kernel import MixtureKernel, age_days


def event_attention(
    query_THd: Tensor,
    key_LHd: Tensor,
    value_LHd: Tensor,
    event_time_ms_L: Tensor,
    target_time_ms_T: Tensor,
    target_end_T: Tensor,
    kernel: MixtureKernel | None,
) -> Tensor:
    """Softmax attention of every target over the first `target_end` events; exact for every target.

    Returns:
        [T, H, d]; a target that may see no event gets zeros.
    """
    out_THd = torch.zeros_like(query_THd)
    if key_LHd.shape[0] == 0:
        return out_THd
    seen = target_end_T > 0
    every = bool(seen.all())
    q, end, times = (
        (query_THd, target_end_T, target_time_ms_T)
        if every
        else (query_THd[seen], target_end_T[seen], target_time_ms_T[seen])
    )
    if q.shape[0] == 0:
        return out_THd
    hidden_TL = torch.arange(key_LHd.shape[0], device=q.device)[None, :] >= end[:, None]
    if kernel is None:
        bias = torch.zeros(hidden_TL.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden_TL, float("-inf"))
    else:
        bias = kernel.log_kernel(times, event_time_ms_L).masked_fill(hidden_TL, float("-inf")).to(q.dtype)
    mixed_HTd = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        key_LHd.transpose(0, 1)[None],
        value_LHd.transpose(0, 1)[None],
        attn_mask=bias[None] if bias.dim() == 3 else bias,
        scale=1.0,
    )[0]
    mixed_THd = mixed_HTd.transpose(0, 1)
    return mixed_THd if every else out_THd.index_put((seen.nonzero()[:, 0],), mixed_THd)


@dataclass(frozen=True)
class UserCache:
    """All that attention needs of one user's history, whatever its length.

    Attributes:
        log_count_HMC: log of the kernel-weighted event count per code; -inf where a code has no event.
        mean_HMCd: kernel-weighted mean of the values per code (means, not sums: bounded, so fp16 can hold them).
        reference_time_ms: time at which the kernel's weights are taken.
    """

    log_count_HMC: Tensor
    mean_HMCd: Tensor
    reference_time_ms: int


def build_cache(
    codes_LG: Tensor,
    value_LHd: Tensor,
    event_time_ms_L: Tensor,
    reference_time_ms: int,
    codes: int,
    kernel: MixtureKernel | None,
) -> UserCache:
    """Sum a history into its codes, in log space with a maximum per code (linear counts underflow under a fast kernel)."""
    length, heads, width = value_LHd.shape
    code_HL = codes_LG.T.repeat_interleave(heads // codes_LG.shape[1], dim=0)
    if kernel is None:
        log_weight_HML = value_LHd.new_zeros(heads, 1, length)
    else:
        age_L = age_days(torch.full_like(event_time_ms_L, reference_time_ms), event_time_ms_L).to(value_LHd.dtype)
        log_weight_HML = -kernel.rate_HM()[:, :, None] * age_L
    components = log_weight_HML.shape[1]
    index_HML = code_HL[:, None, :].expand(-1, components, -1)
    empty = value_LHd.new_full((heads, components, codes), float("-inf"))
    top_HMC = empty.scatter_reduce(2, index_HML, log_weight_HML, "amax")
    safe_top = torch.where(top_HMC.isinf(), torch.zeros_like(top_HMC), top_HMC)
    mass_HMC = torch.zeros_like(empty).scatter_add(2, index_HML, (log_weight_HML - safe_top.gather(2, index_HML)).exp())
    log_count_HMC = safe_top + mass_HMC.log()
    share_HML = (log_weight_HML - log_count_HMC.gather(2, index_HML)).exp()
    weighted_HMLd = share_HML[..., None] * value_LHd.transpose(0, 1)[:, None]
    mean_HMCd = value_LHd.new_zeros(heads, components, codes, width).scatter_add(
        2, index_HML[..., None].expand(-1, -1, -1, width), weighted_HMLd
    )
    return UserCache(log_count_HMC, mean_HMCd, reference_time_ms)


def cache_attention(
    query_THd: Tensor, codebook_HCd: Tensor, cache: UserCache, target_time_ms_T: Tensor, kernel: MixtureKernel | None
) -> Tensor:
    """Attention over codes: softmax(q . e_c + log phi + log n_c) on the means; equals `event_attention` on codewords.

    The log count is what makes the softmax over codes the softmax over events; without it a code with a thousand events
    weighs no more than a code with one.
    """
    heads = query_THd.shape[1]
    logit_HTC = torch.einsum("thd,hcd->htc", query_THd, codebook_HCd)
    logit_HTMC = logit_HTC[:, :, None, :] + cache.log_count_HMC[:, None]
    if kernel is not None:
        age_T = age_days(target_time_ms_T, torch.full_like(target_time_ms_T, cache.reference_time_ms)).to(
            query_THd.dtype
        )
        logit_HTMC = (
            logit_HTMC + (kernel.log_weight_HM()[:, None] - kernel.rate_HM()[:, None] * age_T[None, :, None])[..., None]
        )
    if bool(cache.log_count_HMC.isinf().all()):
        return torch.zeros_like(query_THd)
    weight_HTK = logit_HTMC.reshape(heads, logit_HTMC.shape[1], -1).softmax(-1)
    return torch.einsum("htk,hkd->thd", weight_HTK, cache.mean_HMCd.reshape(heads, -1, cache.mean_HMCd.shape[-1]))


def mean_pooling(value_LHd: Tensor, target_end_T: Tensor) -> Tensor:
    """Mean of the first `target_end` values of every target, [T, H, d]; zeros for none."""
    total_LHd = (
        torch.cat([torch.zeros_like(value_LHd[:1]), value_LHd.cumsum(0)])
        if len(value_LHd)
        else value_LHd.new_zeros(1, *value_LHd.shape[1:])
    )
    return total_LHd[target_end_T] / target_end_T.clamp(min=1)[:, None, None]
