"""The meaning of every op in plain PyTorch: the oracle of the tests, nothing else.

Same names and signatures as the package, computed in the dtype of the arguments (float64 for the tests), with
[K, V] tensors kept and gradients left to autograd. Two conventions that limits suggest and floating point does not:
a column outside the support of p (logit -inf) contributes 0 to an expectation under p, and a token whose
divergence is infinite says so in its value but has gradient 0, so that one such token cannot destroy the weights.
"""

import math

import torch
from torch import Tensor

from distill_kernels.counter import column_words, exponential, row_keys
from distill_kernels.prefix_layout import PrefixLayout
from distill_kernels.types import OBJECTIVES, Sample, TokenStats, TopTokens


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TokenStats:
    """Statistics of [K, Vs] student and [K, Vt] teacher logits at token_ids [K]."""
    student, teacher = _logprobs(student_logits, teacher_logits, temperature, vocab_size)
    return _token_stats(student, teacher, token_ids)


def linear_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    token_ids: Tensor,
    *,
    teacher_logprob: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
) -> TokenStats:
    """`reverse_kl` of the logits of two heads, without gradients."""
    with torch.no_grad():
        student_logits = _head(student_hidden, student_weight, student_bias, student_softcap, student_scale)
        if teacher_hidden is None:
            return _without_teacher(student_logits, teacher_logprob, token_ids, temperature, vocab_size)
        teacher_logits = _head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_scale)
        return reverse_kl(student_logits, teacher_logits, token_ids, temperature=temperature, vocab_size=vocab_size)


def linear_distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    token_ids: Tensor,
    token_weight: Tensor,
    *,
    teacher_logprob: Tensor | None = None,
    teacher_top: TopTokens | None = None,
    objective: str = "sampled_reverse_kl",
    sampling_logprob: Tensor | None = None,
    importance_clip: float | None = None,
    advantage: Tensor | None = None,
    task_advantage: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
) -> tuple[Tensor, TokenStats]:
    """sum_k token_weight[k] * loss_k, and the detached statistics. A token of weight 0 contributes 0."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; found {objective!r}")
    student_logits = _head(student_hidden, student_weight, student_bias, student_softcap, student_scale)
    if teacher_hidden is None:
        stats = _without_teacher(student_logits, teacher_logprob, token_ids, temperature, vocab_size)
        if teacher_top is not None:
            student, _ = _logprobs(student_logits, student_logits, temperature, vocab_size)
            student, teacher = _in_parts(student, teacher_top)
    else:
        with torch.no_grad():
            teacher_logits = _head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_scale)
        student, teacher = _logprobs(student_logits, teacher_logits, temperature, vocab_size)
        stats = _token_stats(student, teacher, token_ids)
    if objective == "sampled_reverse_kl":
        losses = _sampled(stats, sampling_logprob, importance_clip, advantage)
    elif objective == "reverse_kl":
        losses = stats.reverse_kl if teacher_top is None else _kl(student, teacher)
    elif objective == "forward_kl":
        losses = _kl(teacher, student)
    else:
        # Agarwal et al. 2023 (GKD), eq. 2: beta KL(teacher || m) + (1 - beta) KL(student || m).
        mixture = _mixture(teacher, student, beta)
        losses = beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)
    if task_advantage is not None:
        losses = losses + _sampled(stats, sampling_logprob, importance_clip, task_advantage)
        losses = losses.where(losses.isfinite(), losses.detach())
    used = token_weight != 0
    loss = (token_weight.to(losses.dtype) * losses.masked_fill(~used, 0)).sum()
    return loss, TokenStats(*(field.detach() for field in stats))


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor,
    step: int | Tensor,
    row_ids: Tensor | None = None,
) -> Sample:
    """Draws one token a row: the filters by sorting, each on what the last one left, then the largest p / E."""
    R, V = logits.shape
    sampled_from = sampling_logprobs(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    row_ids = torch.arange(R, device=logits.device) if row_ids is None else row_ids
    words = column_words(row_keys(seed, step, row_ids), torch.arange(V, dtype=torch.int32, device=logits.device))
    token_ids = (sampled_from.exp() / exponential(words, sampled_from.dtype)).argmax(-1, keepdim=True)
    logprob = logits.to(sampled_from.dtype).log_softmax(-1).gather(1, token_ids)[:, 0]
    return Sample(token_ids[:, 0], logprob, sampled_from.gather(1, token_ids)[:, 0])


def sampling_logprobs(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """[R, V] log-probabilities of the distribution that `sample` draws from, -inf for what the filters drop."""
    V = logits.shape[1]
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    scaled = logits.to(dtype) / temperature
    if 0 < top_k < V:
        kth = scaled.topk(top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < kth, -math.inf)
    if top_p < 1:
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        scaled = scaled.masked_fill(dropped, -math.inf)
    if min_p > 0:
        floor = scaled.amax(-1, keepdim=True) + math.log(min_p)
        scaled = scaled.masked_fill(scaled < floor, -math.inf)
    return scaled.log_softmax(-1)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    scale: float,
    prompt_keys: Tensor | None = None,
    prompt_values: Tensor | None = None,
    row_start: Tensor | None = None,
    rows_a_prompt: int | None = None,
    left_padding: Tensor | None = None,
    ended: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
) -> Tensor:
    """Attention of [R, Hq, D] on every row's whole keys: those of its prompt, repeated, then its own; and on a sink.

    New keys and values are written at `position` first.
    """
    if new_keys is not None:
        keys[:, :, position], values[:, :, position] = new_keys[:, :, None], new_values[:, :, None]
    (R, Hq, _), T, newest = query.shape, keys.shape[2], position
    real = (torch.arange(T, device=keys.device) <= position).expand(R, T)
    if prompt_keys is not None:
        rows = torch.arange(R, device=keys.device)
        # Rows of no prompt have ended: the last prompt will do.
        index = torch.searchsorted(row_start, rows, right=True).clamp(max=len(prompt_keys)) - 1
        keys, values = torch.cat([prompt_keys[index], keys], 2), torch.cat([prompt_values[index], values], 2)
        real = torch.cat([real.new_ones(R, prompt_keys.shape[2]), real], 1)
        left_padding = None if left_padding is None else left_padding[index]
        newest = position + prompt_keys.shape[2]
    slot = torch.arange(real.shape[1], device=keys.device)
    if left_padding is not None:
        real = real & (slot >= left_padding[:, None])
    if window is not None:
        real = real & (slot > newest - window)
    values = values.masked_fill(~real[:, None, :, None], 0)
    group = Hq // keys.shape[1]
    scores = torch.einsum("rhd,rhnd->rhn", query, keys.repeat_interleave(group, 1)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~real[:, None], -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None].expand(R, Hq, 1)], -1)
    weights = scores.softmax(-1)[..., : real.shape[1]]
    out = torch.einsum("rhn,rhnd->rhd", weights, values.repeat_interleave(group, 1))
    return out if ended is None else out.masked_fill(ended[:, None, None], 0)


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """A masked softmax over all packed tokens [L, h, d], and over the sinks."""
    group, seen = query.shape[1] // key.shape[1], seen_keys(layout, window).to(query.device)
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, 1)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(query), 1)], -1)
    weights = scores.softmax(-1)[..., : len(key)]
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(group, 1))


def seen_keys(layout: PrefixLayout, window: int | None) -> Tensor:
    """[L, L] bool, true where a packed token sees another."""
    position = _positions(layout)
    distance = position[:, None] - position
    lengths = torch.tensor(layout.segments)
    segment = torch.arange(len(lengths)).repeat_interleave(lengths)
    seen = segment[:, None] == segment
    for start, keys, first, queries in layout.shared:
        seen[first : first + queries, start : start + keys] = True
    return seen & (distance >= 0) & (distance < (len(position) + 1 if window is None else window))


def _positions(layout: PrefixLayout) -> Tensor:
    """Where each packed token stands in its row [L] int64: after its prompt, if that is shared."""
    positions = torch.cat([torch.arange(length) for length in layout.segments])
    for _, keys, first, queries in layout.shared:
        positions[first : first + queries] += keys
    return positions


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _logprobs(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, vocab_size: int | None
) -> tuple[Tensor, Tensor]:
    """Both models' log-probabilities on the shared columns, [K, V] each; none for the teacher's gradient."""
    V = student_logits.shape[1] if vocab_size is None else vocab_size
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    student = (student_logits[:, :V].to(dtype) / temperature).log_softmax(-1)
    teacher = (teacher_logits[:, :V].detach().to(dtype) / temperature).log_softmax(-1)
    return student, teacher


def _without_teacher(
    student_logits: Tensor,
    teacher_logprob: Tensor | None,
    token_ids: Tensor,
    temperature: float,
    vocab_size: int | None,
) -> TokenStats:
    """Statistics with what a teacher elsewhere said of the tokens, NaN for what is not known."""
    student, _ = _logprobs(student_logits, student_logits, temperature, vocab_size)
    stats = _token_stats(student, student.detach(), token_ids)
    unknown = torch.full_like(stats.reward, math.nan)
    said = unknown if teacher_logprob is None else teacher_logprob.to(unknown.dtype)
    impossible = (stats.student_logprob == -math.inf) & (said == -math.inf)
    reward = (said - stats.student_logprob).detach().masked_fill(impossible, 0)
    return stats._replace(teacher_logprob=said, reward=reward, reverse_kl=unknown, teacher_entropy=unknown)


def _in_parts(student: Tensor, top: TopTokens) -> tuple[Tensor, Tensor]:
    """Both models' log-probabilities of parts of the vocabulary: the tokens that a teacher names, those others that
    would have more than any of these if all had the student's shares of what is left, and the rest together."""
    K, V = student.shape
    there = (top.token_ids >= 0) & (top.token_ids < V) & (top.logprob > -math.inf)
    ids = torch.where(there, top.token_ids, top.token_ids[:, :1])
    named = torch.zeros(K, V, dtype=torch.bool, device=student.device).scatter(1, ids, True)
    said = top.logprob.to(student.dtype).masked_fill(~there, -math.inf)
    left, least = (1 - said.exp().sum(1)).clamp(min=2.0**-20), said.masked_fill(~there, math.inf).amin(1)
    others = student.masked_fill(named, -math.inf)
    shares = others - others.logsumexp(1, keepdim=True) + left.log()[:, None]
    limited = _among_the_likeliest(others.detach(), ids.shape[1]) & (shares > least[:, None]) & ~named
    rest = others.masked_fill(limited, -math.inf).logsumexp(1)
    left = (left - limited.sum(1) * least.exp()).clamp(min=2.0**-20).log().masked_fill(rest == -math.inf, -math.inf)
    ours = torch.cat(
        [student.gather(1, ids).masked_fill(~there, -math.inf), student.masked_fill(~limited, -math.inf)], 1
    )
    theirs = torch.cat([said, least[:, None].where(limited, -math.inf)], 1)
    return torch.cat([ours, rest[:, None]], 1), torch.cat([theirs, left[:, None]], 1)


def _among_the_likeliest(logprobs: Tensor, count: int) -> Tensor:
    """[K, V] bool: the likeliest of each of the `count` ranges of columns in which it is largest."""
    (K, V), found = logprobs.shape, torch.zeros_like(logprobs, dtype=torch.bool)
    width = max(1, min(64, V // (4 * count)))
    for row in range(K):
        starts = range(0, V // width * width, width)
        largest = [start + int(logprobs[row, start : start + width].argmax()) for start in starts]
        largest.sort(key=lambda column: -float(logprobs[row, column]))
        found[row, largest[:count]] = True
    return found


def _token_stats(student: Tensor, teacher: Tensor, token_ids: Tensor) -> TokenStats:
    student_logprob = student.gather(1, token_ids[:, None])[:, 0]
    teacher_logprob = teacher.gather(1, token_ids[:, None])[:, 0]
    impossible = (student_logprob == -math.inf) & (teacher_logprob == -math.inf)
    reward = (teacher_logprob - student_logprob).detach().masked_fill(impossible, 0)
    return TokenStats(
        student_logprob,
        teacher_logprob,
        reward,
        _kl(student, teacher),
        -_expectation(student, student),
        -_expectation(teacher, teacher),
    )


def _expectation(logprobs: Tensor, values: Tensor) -> Tensor:
    """sum_v p(v) values(v), 0 for each v outside the support of p."""
    outside = logprobs == -math.inf
    return (logprobs.exp() * values.masked_fill(outside, 0)).sum(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [K, V]; infinite (with gradient 0) where q misses part of p's support."""
    outside = p == -math.inf
    missed = (q == -math.inf) & ~outside
    infinite = missed.any(-1)
    ignored = outside | missed | infinite[:, None]
    ratio = p.masked_fill(ignored, 0) - q.masked_fill(ignored, 0)
    return (p.exp() * ratio).sum(-1).masked_fill(infinite, math.inf)


def _mixture(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p) of log-probabilities [K, V]."""
    outside = (teacher == -math.inf) & (student == -math.inf)  # logaddexp has no gradient there
    q, p = teacher.masked_fill(outside, 0), student.masked_fill(outside, 0)
    return torch.logaddexp(q + math.log(beta), p + math.log1p(-beta)).masked_fill(outside, -math.inf)


def _sampled(
    stats: TokenStats, sampling_logprob: Tensor | None, importance_clip: float | None, advantage: Tensor | None
) -> Tensor:
    """-rho A log p_student(y), A the reward or what is given, rho the truncated importance ratio, both constants."""
    reward = stats.reward if advantage is None else advantage.to(stats.reward.dtype)
    ratio = torch.ones_like(stats.reward)
    if sampling_logprob is not None:
        ratio = (stats.student_logprob.detach() - sampling_logprob).exp()
        if importance_clip is not None:
            ratio = ratio.clamp(max=importance_clip)
    advantage = (ratio * reward).masked_fill(ratio == 0, 0)
    finite = advantage.isfinite() & stats.student_logprob.isfinite()
    losses = -advantage.masked_fill(~finite, 0) * stats.student_logprob.masked_fill(~finite, 0)
    unbounded = (advantage != 0) & (stats.student_logprob != 0) & ~finite
    return torch.where(unbounded, -advantage * stats.student_logprob.detach(), losses)


def record_draw(
    drawn: Sample,
    step: int | Tensor,
    rows: Tensor,
    ended: Tensor,
    ends: Tensor,
    pad_token_id: int,
    *,
    token_ids: Tensor,
    lengths: Tensor,
    logprob: Tensor,
    sampling_logprob: Tensor,
    finished: Tensor,
) -> Tensor:
    """Row by row: one that had ended leaves padding and zeros, another its draw, which may be its last."""
    go_on = torch.full_like(drawn.token_ids, pad_token_id)
    for row, place in enumerate(rows.tolist()):
        lives = not ended[row]
        if lives:
            go_on[row] = drawn.token_ids[row]
            lengths[place] += 1
        token_ids[place, step] = go_on[row]
        logprob[place, step] = drawn.logprob[row] if lives else 0
        sampling_logprob[place, step] = drawn.sampling_logprob[row] if lives else 0
        finished[place] = ended[row] = not lives or bool((go_on[row] == ends).any())
    return go_on
