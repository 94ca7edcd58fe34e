"""A step of the MLX backend, walked through with a ledger.

MLX builds the graph of a whole step and then computes it. Two things follow that torch does not have:
new weights and state are made beside the old ones, and the host is ahead of the device: an operator's
output is allocated when it is queued, and what it read is freed when it is done. On a CPU MLX queues up
to 10 tasks of 10 operators (mlx/transforms.cpp and mlx/backend/cpu/encoder.h, mlx 0.32.4), so that the
temporaries of a window of operators are alive together. The `*_AHEAD` numbers are those windows, measured
on a CPU by `mx.get_peak_memory` of the forward pass, the backward pass and the update each by itself. A
GPU's window is not known here; the same is taken.

Legend: d d_model, q and k widths of queries and keys, f d_ff, T tokens of a row, H heads.
"""

import sys
from collections.abc import Sequence

import numpy as np

from core.chunks import FSUM_BLOCK, LOSS_CHUNK_ELEMENTS, NS_ELEMENTS, TILE_COST
from core.config.schema import RunConfig
from core.machine.memory_ledger import (
    ACTIVATIONS,
    GRADIENTS,
    LOGITS,
    NEW_STATE,
    WORKSPACE,
    Ledger,
)
from core.machine.memory_torch import Sizes, TorchTraits
from core.params import ParamSpec, num_parameters, slot_specs, uses_muon

# Tensors of the size of a chunk of logits that an operator of the loss makes: logits, those less their
# maximum, exponentials, the hit of the target in two forms, and the gradient in two; some are made in
# place.
LOSS_AHEAD = 5.5
# Chunks that are alive together, of so many there are. They are chained, so that a window (about 110
# tasks, of which a chunk queues 55) reaches over two of them; measured from 1 to 64 chunks.
LOSS_CHUNKS, LOSS_CHUNKS_AHEAD = (0.0, 1.0, 2.0, 4.0), (0.0, 1.0, 1.7, 2.08)
# Products of the size of the head's matrix beside its gradient, at most: measured likewise.
HEAD_AHEAD = 2.5
# The last block's backward pass has two windows; whichever holds most is the peak. The numbers below are
# counts of tensors, fitted by least squares to 100 steps: the grid's, and others that varied one width at a
# time (head_dim 16 to 256, d_model 32 to 512, heads, d_ff up to 4 d_model, T, layers, dtype).
# Around its MLP: of the stream's size, the MLP's, and the queries'.
MLP_STREAM_AHEAD, MLP_AHEAD, MLP_QUERIES_AHEAD = 14.1, 2.2, 0.6
# Around its attention: of the queries', the keys', the stream's, and the scores'.
QUERIES_AHEAD, KEYS_AHEAD, STREAM_AHEAD, SCORES_AHEAD = 4.9, 11.2, 7.4, 2.46
# With fewer heads of keys than of queries, more of the queries' size: gradients before they are summed.
SHARED_AHEAD = 2.0
# Without norms of queries and keys, fewer of both.
NORM_AHEAD = 3.3
# Where nothing is computed again, also by the stream's size, the MLP's and the scores' alone: fitted to
# models whose queries are as wide as the stream, and the better count there.
EVEN_STREAM_AHEAD, EVEN_MLP_AHEAD, EVEN_SCORES_AHEAD = 13.2, 3.0, 2.1
# Where blocks are computed again, the host has begun the one before. Around the MLP all of it is there,
# around attention what it has made up to its scores. With a third block, more of the stream's size, and
# around the MLP of the MLP's.
DEEP_STREAM_AHEAD, DEEP_MLP_AHEAD = 6.5, 2.2
QUERIES_AGAIN, KEYS_AGAIN, STREAM_AGAIN = 5.7, 2.0, 4.0
# Outputs of Newton-Schulz's operators in a window, 9 of which are one iteration.
NS_AHEAD = 27
# Temporaries of AdamW: first moment's two terms, second's and the step's, of which three outlive their
# operator. Tensors are chained, after Muon's, so that a window reaches over the one before; of the last
# one the clipped gradient is there besides.
ADAMW_AHEAD = 3


def device_kind() -> str:
    """What MLX computes on here: Metal on a Mac; elsewhere its CPU build is assumed."""
    return "mlx_gpu" if sys.platform == "darwin" else "mlx_cpu"


def kept_block(sizes: Sizes) -> float:
    """What a block keeps for its backward pass besides its input, in bytes.

    Both norms' outputs and the stream between: 3 d. Queries: projected, normed, rotated, scaled, the
    attention's output and that in the order of `o_proj`, 7 q with the copy that the norm reads; keys and
    values 3 k. The MLP: gate, its sigmoid, their product, up, and the product: 5 f. And the
    probabilities of all queries and keys, in the compute dtype.
    """
    m = sizes.config.model
    kept = 3 * sizes.stream + 7 * sizes.queries + 3 * sizes.keys + 5 * sizes.hidden
    kept += scores(sizes)
    kept += 4 * sizes.tokens * (2 + m.n_heads + m.n_kv_heads)
    kept += sizes.kept_experts
    if not m.qk_norm:
        kept -= sizes.queries + sizes.keys
    if sizes.half:  # float32 copies that the norms read
        kept += 2 * sizes.wide + 2 * (sizes.queries + sizes.keys)
    if m.dropout > 0:
        kept += 2 * (sizes.stream + sizes.tokens * m.d_model)
    return kept


def walk_step(ledger: Ledger, config: RunConfig, specs: Sequence[ParamSpec]) -> None:
    """A whole step: micro-batches, then the update beside the old weights and state."""
    traits = TorchTraits(
        LOSS_CHUNK_ELEMENTS[device_kind()], tile_cost=TILE_COST["mlx"], copies_tiles=False
    )
    sizes = Sizes(config, traits, 4 if config.train.precision == "float32" else 2)
    weights = 4 * num_parameters(specs)
    if config.train.grad_accum_steps > 1:
        ledger.add(GRADIENTS, weights)  # the sum so far, beside that of the micro-batch
        _micro_batch(ledger, sizes, specs)
        ledger.spike(GRADIENTS, weights, "gradients added up")
        ledger.drop(GRADIENTS, weights)
    else:
        _micro_batch(ledger, sizes, specs)
        if config.train.gradient_checkpointing:
            # The inputs of checkpointed blocks are alive until the graph is done, the update included.
            ledger.add(ACTIVATIONS, (config.model.n_layers + 3) * sizes.stream)
    _update(ledger, config, specs)


def _micro_batch(led: Ledger, sizes: Sizes, specs: Sequence[ParamSpec]) -> None:
    """Leaves the gradients booked."""
    config, m = sizes.config, sizes.config.model
    kept = kept_block(sizes)
    block = sum(s.size for s in specs if s.layer == 0 and s.experts_used is None)
    casts = m.n_layers * sizes.casts(block=block)
    recompute = config.train.gradient_checkpointing
    blocks = m.n_layers * (sizes.stream + (0 if recompute else kept))
    embed = 4 * specs[0].size
    led.add(ACTIVATIONS, blocks + casts, "forward")
    # The last block's output, its norm, and the gradient that the loss makes of it.
    ends = 3 * sizes.stream
    led.add(ACTIVATIONS, ends)
    rows = max(1, min(sizes.tokens, sizes.traits.loss_chunk_elements // m.vocab_size))
    chunks = sizes.tokens / rows
    ahead = float(np.interp(chunks, LOSS_CHUNKS, LOSS_CHUNKS_AHEAD))
    led.add(LOGITS, embed)
    # Narrower ones are there beside float32: logits as they come, the gradient as it goes. The padded
    # exponentials come between them, so that only the larger of both is there at once.
    padded = 0.0
    if m.vocab_size > FSUM_BLOCK and m.vocab_size % FSUM_BLOCK:
        padded = -(-m.vocab_size // FSUM_BLOCK) * FSUM_BLOCK / m.vocab_size
    made = LOSS_AHEAD + max(float(sizes.half), padded)
    matrices = min(HEAD_AHEAD, chunks)
    led.spike(LOGITS, made * ahead * 4 * rows * m.vocab_size + matrices * embed, "logits")
    led.drop(LOGITS, embed)
    led.add(GRADIENTS, embed)
    _blocks_backward(led, sizes, kept)
    led.drop(ACTIVATIONS, blocks + casts + ends)
    led.add(GRADIENTS, 4 * num_parameters(specs) - embed)


def _blocks_backward(led: Ledger, sizes: Sizes, kept: float) -> None:
    """The last block, while the forward pass of all is kept: its MLP, and then its attention.

    Args:
        led: What a block keeps is booked where it is not computed again.
        sizes: Of the micro-batch.
        kept: What a block keeps besides its input.
    """
    m = sizes.config.model
    recompute = sizes.config.train.gradient_checkpointing
    again = recompute and m.n_layers > 1  # The block before is computed again beside it.
    if recompute:
        led.add(ACTIVATIONS, kept, "a block computed again")
    wide = 4 // sizes.width  # norms and rotations are in float32
    # The stream's gradients are in the compute dtype, the norms' in float32.
    work = MLP_STREAM_AHEAD * (sizes.wide + sizes.stream) / 2 + MLP_AHEAD * sizes.hidden
    work += MLP_QUERIES_AHEAD * wide * sizes.queries
    if not recompute:
        even = EVEN_STREAM_AHEAD * sizes.wide + EVEN_MLP_AHEAD * sizes.hidden
        even += EVEN_SCORES_AHEAD * scores(sizes)
        led.spike(WORKSPACE, even, "backward of the last block")
    deep = DEEP_STREAM_AHEAD * sizes.stream if again and m.n_layers > 2 else 0.0
    if deep:
        work += deep + DEEP_MLP_AHEAD * sizes.hidden + sizes.kept_experts
    led.spike(WORKSPACE, work + (kept if again else 0.0), "backward of the last block")
    # The MLP's are gone: gate to product, the norm's output, and the stream before it. Not so where
    # the window reaches over all of a model of one block.
    done = 5 * sizes.hidden + 2 * sizes.stream + sizes.kept_experts if m.n_layers > 1 else 0
    led.drop(ACTIVATIONS, done)
    queries, keys = QUERIES_AHEAD, KEYS_AHEAD
    if m.n_kv_heads < m.n_heads:
        queries += SHARED_AHEAD
    if not m.qk_norm:
        queries, keys = queries - NORM_AHEAD, keys - NORM_AHEAD
    work = wide * (queries * sizes.queries + keys * sizes.keys) + STREAM_AHEAD * sizes.wide
    work += deep + SCORES_AHEAD * scores(sizes)
    if again:  # its projections are in the compute dtype
        heads = QUERIES_AGAIN * sizes.queries + KEYS_AGAIN * sizes.keys
        work += (1 + wide) / 2 * heads + STREAM_AGAIN * sizes.stream
        work += 5 * sizes.hidden + sizes.kept_experts
    led.spike(WORKSPACE, work, "backward of the last block")
    led.add(ACTIVATIONS, done - (kept if recompute else 0.0))


def scores(sizes: Sizes) -> int:
    """Bytes of the scores of one block, of all queries and keys, in the compute dtype."""
    m, length = sizes.config.model, sizes.config.data.seq_len
    return sizes.width * sizes.tokens * m.n_heads * length


def _update(led: Ledger, config: RunConfig, specs: Sequence[ParamSpec]) -> None:
    """New weights and state; gradients go as they are used."""
    t = config.train
    new = 4 * num_parameters(specs)
    new += sum(4 * _product(slot.shape) for slot in slot_specs(t.optimizer, specs))
    adamw = [4 * s.size for s in specs if not uses_muon(s, t.optimizer)]
    muon: dict[tuple[int, ...], int] = {}
    for spec in specs:
        if uses_muon(spec, t.optimizer):
            muon[spec.shape] = muon.get(spec.shape, 0) + 1
    # Muon's matrices come first: of the others the gradients are still there, and nothing new is.
    waiting = sum(adamw)
    led.add(GRADIENTS, waiting - led.held[GRADIENTS])
    led.add(NEW_STATE, new - 3 * waiting, "update")
    width = 4 if t.ns_dtype == "float32" else 2
    for shape, count in muon.items():
        led.spike(WORKSPACE, _newton_schulz(shape, count, width), "Newton-Schulz")
    before = 0
    for index, size in enumerate(adamw):
        led.drop(GRADIENTS, size)
        led.add(NEW_STATE, 3 * size, "update")
        clipped = size if index == len(adamw) - 1 else 0
        led.spike(WORKSPACE, ADAMW_AHEAD * (size + before) + clipped, "update by AdamW")
        before = size


def _newton_schulz(shape: tuple[int, ...], count: int, width: int) -> float:
    """Bytes of a window of Newton-Schulz's operators.

    Of the 9 outputs of an iteration 4 have the matrices' shape and 5 are grams of the smaller side.
    """
    size, least = _product(shape[-2:]), min(shape[-2:])
    count *= _product(shape[:-2])
    part = min(count, max(1, NS_ELEMENTS[device_kind()] // size))
    gram = part * least * least
    return NS_AHEAD * width * (4 * part * size + 5 * gram) / 9


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out
