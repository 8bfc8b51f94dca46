"""Attention of a decode step in Triton: what `twin_decode_attention` does for a CPU. One launch, and one that merges.

A piece is a range of keys: the first pieces cut up the prompt, the others the row's own keys up to the position.
Programs of the first kind take a prompt's rows times the grouped heads as the rows of their products, so that the
prompt's keys are read once for all of them; programs of the second take one row, and the first piece of each begins
with its new key, if there is one, which it writes. Each keeps a float32 output and a base-2 log-sum-exp. The prompt's
programs come first: they are the longest. How much one program does depends on shapes alone, so that a captured graph
serves every position: a piece is a part of what is seen, which padding, the position and a window bound on the device.
A sink is known to the merge only.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill_kernels.triton_decode_piece import attend_piece, newest, nothing, store_piece
from distill_kernels.triton_heads import load_rows
from distill_kernels.triton_math import FUSION, given_or, offset_of, starts_early, take_turn

PROGRAMS = 256  # about two for every multiprocessor of a large card: fewer are cut into more pieces
PIECES = 16  # the most that a prompt, or a row's own keys, are cut into
LOG2_E = math.log2(math.e)
MERGED = 1024  # elements of the output that a program of the merge holds


class Plan(NamedTuple):
    """How a call is cut up. `plan` chooses; a benchmark may choose otherwise."""

    prompt_pieces: int
    own_pieces: int
    block_m: int
    """Rows times grouped heads that a program takes against the prompt's keys."""
    block_n: int
    """Keys that a program holds at once."""
    warps: int = 4
    stages: int = 2
    registers: int | None = None
    """The most that a thread may have; None leaves it to the compiler."""


def plan(R: int, Hq: int, Hkv: int, D: int, T: int, itemsize: int, *, B: int = 0, P: int = 0, rows: int = 0) -> Plan:
    """For R rows that see at most T own keys and, where B > 0, P of a prompt with at most `rows` rows; D is the larger
    head size."""
    group = Hq // Hkv
    # Larger blocks take registers from the programs of the rows, which are the most, or spill.
    half, narrow = itemsize <= 2, D <= 128 if itemsize <= 2 else D <= 64
    block_n = (64 if narrow else 32) if half else (32 if narrow else 16)
    block_m = 32 if half and narrow and rows * group > 16 else 16
    of_prompts = B * Hkv * triton.cdiv(max(1, rows) * group, block_m)
    return Plan(_pieces(of_prompts, P) if B else 0, _pieces(R * Hkv, T), block_m, block_n)


def _pieces(programs: int, keys: int) -> int:
    """A power of two: enough for PROGRAMS, of 64 keys or more."""
    wanted = min(triton.cdiv(PROGRAMS, max(1, programs)), triton.cdiv(keys, 64), PIECES)
    return triton.next_power_of_2(max(1, wanted))


@triton.jit(
    do_not_specialize=["R", "P", "T", "prompt_programs", "prompt_pieces", "blocks", "own_pieces", "window"]
)  # of no use to the compiler, and a compilation each time rows are dropped
def _pieces_kernel(
    query, keys, values, prompt_keys, prompt_values, new_keys, new_values, pieces, piece_lse, position, row_start,
    left_padding, ended,
    query_row, query_head, key_row, key_head, key_slot, value_row, value_head, value_slot,
    prompt_key_row, prompt_key_head, prompt_key_slot, prompt_value_row, prompt_value_head, prompt_value_slot,
    new_key_row, new_key_head, new_value_row, new_value_head,
    R, P, T, prompt_programs, prompt_pieces, blocks, own_pieces, scale_log2, cap_log2, window,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OWN_M: tl.constexpr, PROMPT: tl.constexpr,
    PADDED: tl.constexpr, ENDED: tl.constexpr, NEW: tl.constexpr, ONLY: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    take_turn(EARLY)
    G: tl.constexpr = HQ // HKV
    pid = tl.program_id(0)
    if pid < prompt_programs:
        if PROMPT:
            piece = pid % prompt_pieces
            block = (pid // prompt_pieces) % blocks
            head = (pid // (prompt_pieces * blocks)) % HKV
            prompt = pid // (prompt_pieces * blocks * HKV)
            begin = tl.load(row_start + prompt).to(tl.int32)
            rows = tl.load(row_start + prompt + 1).to(tl.int32) - begin
            m = block * BLOCK_M + tl.arange(0, BLOCK_M)
            there = m < rows * G
            row = begin + m // G
            column = head * G + m % G
            first = 0
            if PADDED:
                first = tl.load(left_padding + prompt).to(tl.int32)
            if WINDOW:  # its last slot is P + position
                first = tl.minimum(tl.maximum(first, P + tl.load(position).to(tl.int32) + 1 - window), P)
            width = tl.cdiv(tl.cdiv(P - first, prompt_pieces), BLOCK_N) * BLOCK_N
            first += piece * width
            end = tl.minimum(first + width, P)
            alive = there
            if ENDED:
                alive = alive & (tl.load(ended + row, mask=there, other=1) == 0)
            end = tl.where(tl.max(alive.to(tl.int32), 0) > 0, end, 0)
            q = load_rows(query + head * G * query_head, row * query_row + m % G * query_head, 1, there, D, BLOCK_D)
            peak, total, out = nothing(BLOCK_M, BLOCK_DV)
            out, lse = attend_piece(
                q,
                prompt_keys + offset_of(prompt, prompt_key_row) + offset_of(head, prompt_key_head),
                prompt_values + offset_of(prompt, prompt_value_row) + offset_of(head, prompt_value_head),
                prompt_key_slot, prompt_value_slot, first, end, peak, total, out, scale_log2, cap_log2,
                D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, CAP, PRECISION,
            )  # fmt: skip
            at = offset_of(piece * R + row, HQ) + column
            store_piece(out, lse, pieces, piece_lse, at, there, DV, BLOCK_DV, ONLY)
    else:
        own = pid - prompt_programs
        own_piece = own % own_pieces
        own_head = (own // own_pieces) % HKV
        own_row = own // (own_pieces * HKV)
        g = tl.arange(0, OWN_M)
        in_group = g < G
        own_first = 0
        if PADDED and not PROMPT:
            own_first = tl.load(left_padding + own_row).to(tl.int32)
        last = tl.load(position).to(tl.int32)
        seen = tl.minimum(last if NEW else last + 1, T)
        if WINDOW:
            own_first = tl.maximum(own_first, last + 1 - window)
        here = (own_piece == 0) & (last < T)
        if ENDED:
            living = tl.load(ended + own_row) == 0
            seen = tl.where(living, seen, 0)
            here = here & living
        own_width = tl.cdiv(tl.cdiv(seen - own_first, own_pieces), BLOCK_N) * BLOCK_N
        own_first += own_piece * own_width
        own_end = tl.minimum(own_first + own_width, seen)
        own_keys = keys + offset_of(own_row, key_row) + offset_of(own_head, key_head)
        own_values = values + offset_of(own_row, value_row) + offset_of(own_head, value_head)
        own_query = load_rows(
            query + offset_of(own_row, query_row) + own_head * G * query_head, g, query_head, in_group, D, BLOCK_D
        )
        own_peak, own_total, own_out = nothing(OWN_M, BLOCK_DV)
        if NEW:
            own_peak, own_total, own_out = newest(
                own_query,
                new_keys + offset_of(own_row, new_key_row) + offset_of(own_head, new_key_head),
                new_values + offset_of(own_row, new_value_row) + offset_of(own_head, new_value_head),
                own_keys + last * key_slot, own_values + last * value_slot, here, scale_log2, cap_log2,
                D, BLOCK_D, DV, BLOCK_DV, OWN_M, CAP,
            )  # fmt: skip
        own_out, own_lse = attend_piece(
            own_query, own_keys, own_values, key_slot, value_slot, own_first, own_end, own_peak, own_total, own_out,
            scale_log2, cap_log2, D, BLOCK_D, DV, BLOCK_DV, BLOCK_N, CAP, PRECISION,
        )  # fmt: skip
        own_at = offset_of((prompt_pieces + own_piece) * R + own_row, HQ) + own_head * G + g
        store_piece(own_out, own_lse, pieces, piece_lse, own_at, in_group, DV, BLOCK_DV, ONLY)


@triton.jit(do_not_specialize=["R"])
def _merge_kernel(
    pieces, piece_lse, out, ended, sinks, R,
    HQ: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, PIECES: tl.constexpr,
    ENDED: tl.constexpr, SINKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    take_turn(EARLY)
    row = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    there = head < HQ
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None] & (d < D)[None, :]
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    for piece in tl.static_range(PIECES):
        at = offset_of(piece * R + row, HQ) + head
        peak = tl.maximum(peak, tl.load(piece_lse + at, mask=there, other=float("-inf")))
    if SINKS:
        sink = tl.load(sinks + head, mask=there, other=float("-inf")).to(tl.float32) * 1.4426950408889634  # log2 e
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)  # a row that has ended may see nothing
    total = tl.zeros([HEADS], tl.float32)
    if SINKS:
        total += tl.exp2(sink - peak)
    merged = tl.zeros([HEADS, BLOCK_D], tl.float32)
    for piece in tl.static_range(PIECES):
        at = offset_of(piece * R + row, HQ) + head
        weight = tl.exp2(tl.load(piece_lse + at, mask=there, other=float("-inf")) - peak)
        total += weight
        merged += weight[:, None] * tl.load(pieces + at[:, None] * D + d[None, :], mask=mask, other=0.0)
    merged = merged / tl.where(total > 0, total, 1.0)[:, None]
    if ENDED:
        merged = tl.where(tl.load(ended + row) == 0, merged, 0.0)
    at = offset_of(row, HQ) + head
    tl.store(out + at[:, None] * D + d[None, :], merged.to(out.dtype.element_ty), mask=mask)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    out: Tensor,
    *,
    prompt_keys: Tensor | None,
    prompt_values: Tensor | None,
    row_start: Tensor | None,
    rows_a_prompt: int,
    left_padding: Tensor | None,
    ended: Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
) -> None:
    """Writes the contiguous out [R, Hq, Dv], and the new keys and values; see `decode_attention`."""
    (R, Hq, D), (_, Hkv, T, DV) = query.shape, values.shape
    if R == 0:
        return
    B, P = (0, 0) if prompt_keys is None else (prompt_keys.shape[0], prompt_keys.shape[2])
    window = P + T if window is None or window >= P + T else window
    seen = {"B": B, "P": min(P, window), "rows": rows_a_prompt}
    chosen = plan(R, Hq, Hkv, max(D, DV), min(T, window), query.dtype.itemsize, **seen)
    number = chosen.prompt_pieces + chosen.own_pieces
    alone = number == 1 and sinks is None
    pieces = out if alone else torch.empty(number, R, Hq, DV, dtype=torch.float32, device=out.device)
    piece_lse = torch.empty(number, R, Hq, dtype=torch.float32, device=out.device)
    group, block_d, block_dv = Hq // Hkv, _block(D), _block(DV)
    blocks = triton.cdiv(rows_a_prompt * group, chosen.block_m)
    prompt_programs = B * Hkv * blocks * chosen.prompt_pieces
    stored = (given_or(prompt_keys, keys), given_or(prompt_values, values))
    new = (given_or(new_keys, query), given_or(new_values, query))
    farthest = max(query.stride(0) * R, *(each.shape[2] * each.stride(2) for each in (keys, values, *stored)))
    if farthest >= 2**31:
        raise ValueError(
            f"the rows of the query, and the slots of one head of keys and values, must lie within 2**31 elements; "
            f"found {farthest}: make slots the last dimension but one in memory too"
        )
    strides = [stride for tensor in (keys, values, *stored) for stride in tensor.stride()[:3]]
    strides += [stride for tensor in new for stride in tensor.stride()[:2]]
    early = starts_early(query.device)
    # Nats before a cap, bits where there is none: exponentials are of base 2.
    factors = (scale * LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2_E)
    _pieces_kernel[(prompt_programs + R * Hkv * chosen.own_pieces,)](
        query,
        keys,
        values,
        *stored,
        *new,
        pieces,
        piece_lse,
        position,
        given_or(row_start, position),
        given_or(left_padding, position),
        given_or(ended, position),
        query.stride(0),
        query.stride(1),
        *strides,
        R,
        P,
        T,
        prompt_programs,
        chosen.prompt_pieces,
        blocks,
        chosen.own_pieces,
        *factors,
        window,
        HQ=Hq,
        HKV=Hkv,
        D=D,
        BLOCK_D=block_d,
        DV=DV,
        BLOCK_DV=block_dv,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        OWN_M=max(16, triton.next_power_of_2(group)),
        PROMPT=prompt_keys is not None,
        PADDED=left_padding is not None,
        ENDED=ended is not None,
        NEW=new_keys is not None,
        ONLY=alone,
        WINDOW=window < P + T,
        CAP=softcap is not None,
        PRECISION="ieee",
        EARLY=early,
        launch_pdl=early,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        maxnreg=chosen.registers,
        **FUSION,
    )
    if not alone:
        heads = min(max(1, MERGED // block_dv), triton.next_power_of_2(Hq))
        _merge_kernel[(R, triton.cdiv(Hq, heads))](
            pieces,
            piece_lse,
            out,
            given_or(ended, position),
            given_or(sinks, position),
            R,
            HQ=Hq,
            D=DV,
            BLOCK_D=block_dv,
            HEADS=heads,
            PIECES=number,
            ENDED=ended is not None,
            SINKS=sinks is not None,
            EARLY=early,
            launch_pdl=early,
            **FUSION,
        )


def _block(width: int) -> int:
    """A head's columns in a program; products need 16."""
    return max(16, triton.next_power_of_2(width))
