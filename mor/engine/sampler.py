"""The next token of many requests at once: penalties, filters, and a draw that depends on the request alone.

Everything between the logits and a token is exact or in double precision, and the sums over the vocabulary that decide
are sums of integers, so that neither the rows beside it nor the device's order of summation changes a row's token.

Legend: N requests, M those of them that need a step, V vocabulary, K largest values, L tokens of prompts and outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from mor.engine.params import SamplingParams
from mor.engine.request import Top

FEW = 1024
"""So many of the most probable tokens nearly always hold the mass that top-p asks for, and need no sort to be found."""

_UNIT = 2.0**40  # weight of the most probable token: sums over 2**22 tokens still fit 63 bits
_STEP = -7046029254386353131  # 2**64 / golden ratio, as a signed integer; with the two factors from SplitMix64
_FACTORS = ((30, -4658895280553007687), (27, -7723592293110705685))


@dataclass(frozen=True, kw_only=True)
class SamplingRow:
    """What decides the next token of one request, besides its logits.

    `seed`: the request's own, or one that the engine drew. `index`: how many tokens it has generated. `prompt`,
    `output`: its tokens so far, which the penalties read. `banned`: tokens that must not come now (the end of the text
    and stop tokens before `min_tokens`); those outside the vocabulary are ignored.
    """

    params: SamplingParams
    seed: int
    index: int
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    banned: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The next token of one request, or why there is none.

    `logprob`: natural logarithm of the probability that the model gives the token, None if not asked for. `top`: the
    most probable tokens (the lower id first where they are equal) with theirs, as many as asked for; those of
    probability 0 are left out. Both are the log-softmax of the logits as they came: before penalties, bans,
    temperature and filters. `error`: None, or what is wrong with the row; `token` is then -1.
    """

    token: int
    logprob: float | None = None
    top: Top = ()
    error: str | None = None


def sample(logits_NV: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
    """The next token of each row, from float32 logits on any device.

    In this order: repetition penalty, presence and frequency penalties, bans, temperature, top-k, top-p, min-p, draw.
    Temperature 0 takes the largest, the lower id of equals. A row whose logits hold NaN or infinity, or leave no token
    to choose, has an `error` and disturbs no other.
    """
    assert logits_NV.shape[0] == len(rows) and logits_NV.dtype == torch.float32
    peak_N, token_N = logits_NV.max(-1)
    errors = [_problem(peak) for peak in peak_N.tolist()]
    edited = [n for n, row in enumerate(rows) if errors[n] is None and not _is_argmax(row)]
    if edited:
        tokens, peaks = _choose(logits_NV[_ids(edited, logits_NV)], [rows[n] for n in edited])
        token_N[_ids(edited, logits_NV)] = tokens
        for n, peak in zip(edited, peaks):
            errors[n] = _problem(peak, after=" after penalties and bans")
    found: list[tuple[float | None, Top]] = [(None, ())] * len(rows)
    wanted = {n: row.params.logprobs for n, row in enumerate(rows) if row.params.logprobs is not None}
    if wanted:
        index = _ids(list(wanted), logits_NV)
        for n, about in zip(wanted, log_probabilities(logits_NV[index], token_N[index], list(wanted.values()))):
            found[n] = about
    return [
        Sampled(token=token, logprob=logprob, top=top) if error is None else Sampled(token=-1, error=error)
        for token, (logprob, top), error in zip(token_N.tolist(), found, errors)
    ]


def log_probabilities(logits_MV: Tensor, token_M: Tensor, num_tops: Sequence[int]) -> list[tuple[float, Top]]:
    """The log-probability of a token of each row, and as many of the row's most probable ones as `num_tops` says, the
    lower id first where they are equal; those of probability 0 are left out."""
    logprob_MV = logits_MV.log_softmax(-1)
    chosen: list[float] = logprob_MV.gather(1, token_M[:, None]).squeeze(-1).tolist()
    most = min(max(num_tops), logits_MV.shape[1])
    if not most:
        return [(logprob, ()) for logprob in chosen]
    token_MK = _falling(logits_MV, most)
    leading = zip(token_MK.tolist(), logprob_MV.gather(1, token_MK).tolist())
    tops = [tuple((token, logprob) for token, logprob in zip(*best) if logprob > -math.inf) for best in leading]
    return [(logprob, top[:k]) for logprob, top, k in zip(chosen, tops, num_tops)]


def _problem(peak: float, after: str = "") -> str | None:
    """Why no token can be chosen from logits with this maximum, which is NaN if any of them is."""
    if math.isnan(peak):
        return f"the logits hold NaN{after}"
    if math.isinf(peak):
        return f"the logits hold infinity{after}" if peak > 0 else f"every token has probability 0{after}"
    return None


def _choose(logits_MV: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, list[float]]:
    """A token (M,) for each row, and its largest logit after penalties and bans: if not finite, there is no token."""
    x_MV = edit(logits_MV, rows)
    peak_M, token_M = x_MV.max(-1)
    peaks: list[float] = peak_M.tolist()
    drawn = [m for m, row in enumerate(rows) if math.isfinite(peaks[m]) and not row.params.is_greedy]
    if drawn:
        index, chosen = _ids(drawn, x_MV), [rows[m] for m in drawn]
        seed_M, index_M = _ids([signed(row.seed) for row in chosen], x_MV), _ids([row.index for row in chosen], x_MV)
        weight_MV = weigh(x_MV[index] if len(drawn) < len(rows) else x_MV, chosen)
        token_M[index] = draw(weight_MV, uniform(seed_M, index_M))
    return token_M, peaks


def edit(logits_MV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Logits in double precision after penalties and bans.

    Repetition penalty r (arXiv 1909.05858) on tokens of prompt and output: x / r if x > 0, else x r. Then
    x - presence * [n > 0] - frequency * n, with n the token's occurrences in the output. Banned: -inf.
    """
    x_MV = logits_MV.double()
    repeated = [m for m, row in enumerate(rows) if row.params.repetition_penalty != 1]
    if repeated:
        penalty_M1 = _column([rows[m].params.repetition_penalty for m in repeated], x_MV)
        seen_MV = _count([(*rows[m].prompt, *rows[m].output) for m in repeated], x_MV) > 0
        index, value_MV = _ids(repeated, x_MV), x_MV[_ids(repeated, x_MV)]
        penalised_MV = torch.where(value_MV > 0, value_MV / penalty_M1, value_MV * penalty_M1)
        x_MV[index] = torch.where(seen_MV, penalised_MV, value_MV)
    counted = [m for m, row in enumerate(rows) if row.params.presence_penalty or row.params.frequency_penalty]
    if counted:
        presence_M1 = _column([rows[m].params.presence_penalty for m in counted], x_MV)
        frequency_M1 = _column([rows[m].params.frequency_penalty for m in counted], x_MV)
        count_MV = _count([rows[m].output for m in counted], x_MV)
        x_MV[_ids(counted, x_MV)] -= presence_M1 * (count_MV > 0) + frequency_M1 * count_MV
    banned = [(m, token) for m, row in enumerate(rows) for token in row.banned if 0 <= token < x_MV.shape[1]]
    if banned:
        x_MV[_ids([m for m, _ in banned], x_MV), _ids([token for _, token in banned], x_MV)] = -math.inf
    return x_MV


def weigh(x_MV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """What each token's probability is proportional to after temperature, top-k, top-p and min-p: integers from 0 to
    2**40, the largest being 2**40.

    Top-k keeps k tokens; top-p the fewest, most probable ones first, whose share of what top-k left reaches p; both
    take the lower id of equals. Min-p drops what is less probable than p times the most probable. A token less probable
    than 2**-40 of the most probable is never drawn.
    """
    scaled_MV = (x_MV - x_MV.max(-1, keepdim=True).values) / _column([row.params.temperature for row in rows], x_MV)
    kept_MV = scaled_MV
    for members, num_leading in _limited(scaled_MV, rows):
        if kept_MV is scaled_MV:
            kept_MV = scaled_MV.clone()
        index = _ids(members, x_MV)
        kept_MV[index] = _keep(scaled_MV[index], [rows[m] for m in members], num_leading)
    weight_MV = _weight(kept_MV)
    if any(row.params.min_p for row in rows):
        weight_MV *= weight_MV >= _column([row.params.min_p * _UNIT for row in rows], x_MV)
    return weight_MV


def _weight(scaled_MV: Tensor) -> Tensor:
    return (scaled_MV.exp() * _UNIT).round().long()


def _limited(scaled_MV: Tensor, rows: Sequence[SamplingRow]) -> Iterator[tuple[list[int], int]]:
    """The rows that top-k or top-p limits, in groups, and how many of their largest values decide which tokens stay."""
    size = scaled_MV.shape[1]
    by_k = [m for m, row in enumerate(rows) if 0 < row.params.top_k < size]
    if by_k:
        yield by_k, max(rows[m].params.top_k for m in by_k)
    by_p = sorted({m for m, row in enumerate(rows) if row.params.top_p < 1} - set(by_k))
    if by_p and size > FEW:
        value_MV = scaled_MV[_ids(by_p, scaled_MV)]
        mass_M1 = _weight(value_MV.topk(FEW).values).sum(-1, keepdim=True)
        least_M1 = _column([rows[m].params.top_p for m in by_p], scaled_MV) * _weight(value_MV).sum(-1, keepdim=True)
        enough = dict(zip(by_p, (mass_M1 >= least_M1).squeeze(-1).tolist()))
        by_few, by_p = [m for m in by_p if enough[m]], [m for m in by_p if not enough[m]]
        if by_few:
            yield by_few, FEW
    if by_p:
        yield by_p, size


def _keep(scaled_MV: Tensor, rows: Sequence[SamplingRow], num_leading: int) -> Tensor:
    """`scaled_MV` with -inf outside the tokens that top-k and top-p keep, all among the `num_leading` largest."""
    size = scaled_MV.shape[1]
    p_M1 = _column([row.params.top_p for row in rows], scaled_MV)
    ks = [min(row.params.top_k or size, size) for row in rows]
    k_M1 = _ids(ks, scaled_MV)[:, None]
    leading_MK = _leading(scaled_MV, num_leading)
    rank_K = torch.arange(num_leading, device=scaled_MV.device)
    sum_MK = torch.where(rank_K < k_M1, _weight(leading_MK), 0).cumsum(-1)
    beyond = num_leading < max(ks)  # top-p alone: what is not leading counts towards the whole
    total_M1 = _weight(scaled_MV).sum(-1, keepdim=True) if beyond else sum_MK[:, -1:]
    reached_MK = (sum_MK >= p_M1 * total_M1) & (p_M1 < 1)
    count_M1 = torch.minimum((~reached_MK).sum(-1, keepdim=True) + 1, k_M1)
    least_M1 = leading_MK.gather(1, count_M1 - 1)
    above_MV, equal_MV = scaled_MV > least_M1, scaled_MV == least_M1
    room_M1 = count_M1 - above_MV.sum(-1, keepdim=True)
    return scaled_MV.masked_fill(~(above_MV | (equal_MV & (equal_MV.cumsum(-1) <= room_M1))), -math.inf)


def _leading(scaled_MV: Tensor, count: int) -> Tensor:
    """The largest values of each row in falling order."""
    if count == scaled_MV.shape[1]:
        return scaled_MV.sort(descending=True).values
    return scaled_MV.topk(count).values


def draw(weight_MV: Tensor, uniform_M: Tensor) -> Tensor:
    """The first token at which the running sum of the weights is more than `uniform_M` of their total."""
    sum_MV = weight_MV.cumsum(-1)
    target_M = (uniform_M * sum_MV[:, -1]).long()  # less than the total even when rounded: u is at most 1 - 2**-53
    return torch.searchsorted(sum_MV, target_M[:, None], right=True).squeeze(-1)


def uniform(seed_N: Tensor, index_N: Tensor) -> Tensor:
    """Numbers in [0, 1), 53 bits each, a fixed pseudo-random function of two int64: SplitMix64's output function
    (doi 10.1145/2660193.2660195) on the seed, and again on that plus the index.
    """
    mixed_N = _mix(_mix(seed_N * _STEP + _STEP) + (index_N + 1) * _STEP)
    return _shifted(mixed_N, 11).double() * 2.0**-53


def _mix(value_N: Tensor) -> Tensor:
    for shift, factor in _FACTORS:
        value_N = (value_N ^ _shifted(value_N, shift)) * factor
    return value_N ^ _shifted(value_N, 31)


def _shifted(value_N: Tensor, shift: int) -> Tensor:
    """Bits moved to the right, zeros moved in."""
    return (value_N >> shift) & ((1 << (64 - shift)) - 1)


def _falling(logits_MV: Tensor, k: int) -> Tensor:
    """Ids of the k largest of each row in falling order, the lower id first where they are equal.

    Sorted by integers that hold the value's bits (in an order of integers) above the id's, which differ everywhere.
    """
    bits_MV = (logits_MV + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered_MV = torch.where(bits_MV >= 0, bits_MV, bits_MV ^ 0x7FFFFFFF).long()
    return ((ordered_MV << 32) - torch.arange(logits_MV.shape[1], device=logits_MV.device)).topk(k).indices


def _is_argmax(row: SamplingRow) -> bool:
    """Whether the largest logit as it came decides."""
    params = row.params
    changed = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty or row.banned
    return params.is_greedy and not changed


def _count(tokens: Sequence[Sequence[int]], like_MV: Tensor) -> Tensor:
    """How often each token of the vocabulary occurs in each row of `tokens`: int64 (M, V)."""
    token_L = _ids(list(chain.from_iterable(tokens)), like_MV)
    lengths = torch.tensor([len(row) for row in tokens])
    row_L = torch.repeat_interleave(torch.arange(len(tokens)), lengths).to(like_MV.device)
    size = like_MV.shape[1]
    return torch.bincount(row_L * size + token_L, minlength=len(tokens) * size).view(len(tokens), size)


def signed(value: int) -> int:
    """The signed 64-bit integer of the same low 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _ids(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=like.device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Doubles (M, 1) on the device of `like`."""
    return torch.tensor(values, dtype=torch.double, device=like.device)[:, None]
