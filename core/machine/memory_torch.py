"""A step of the torch backends, walked through with a ledger.

What autograd keeps was read from the tensors alive at each operator of a step on the CPU (torch 2.13); the
order is that of `backends/torch_common`. Blocks are alike, so the last and the first are walked through
and those between are booked at once: what is held changes by the same amount with each.

Legend: n tokens of a micro-batch, d d_model, q and k widths of queries and keys, f d_ff, v vocab_size,
w bytes of the compute dtype. `4` is a float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.chunks import (
    FSUM_BLOCK,
    LOSS_CHUNK_ELEMENTS,
    NS_ELEMENTS,
    TILE_COST,
    num_tiles,
    tile_rows,
)
from core.config.schema import RunConfig
from core.machine.memory_ledger import (
    ACTIVATIONS,
    GRADIENTS,
    LOGITS,
    WORKSPACE,
    Ledger,
)
from core.params import ParamSpec, uses_muon


@dataclass(frozen=True)
class TorchTraits:
    """What a device's policy chooses, as far as memory goes.

    Attributes:
        loss_chunk_elements: Logits that the loss holds at a time.
        skips_padding: Whether the head copies the rows that it keeps.
        fused_attention: Whether scores of all queries and keys are never held.
        expands_heads: Whether keys and values are repeated for their query heads.
        ordered_lookup: Whether the embedding's gradient is summed by sorting.
        tile_cost: Rows of a product that take as long as copying its matrix, for tiles of experts.
        copies_tiles: Whether each tile has a copy of its expert's matrix.
    """

    loss_chunk_elements: int
    skips_padding: bool = False
    fused_attention: bool = True
    expands_heads: bool = False
    ordered_lookup: bool = False
    tile_cost: int = TILE_COST["cpu"]
    copies_tiles: bool = True


TRAITS = {
    "cpu": TorchTraits(LOSS_CHUNK_ELEMENTS["cpu"], skips_padding=True),
    "cuda": TorchTraits(
        LOSS_CHUNK_ELEMENTS["cuda"], expands_heads=True, tile_cost=TILE_COST["cuda"]
    ),
    "mps": TorchTraits(
        LOSS_CHUNK_ELEMENTS["mps"],
        fused_attention=False,
        expands_heads=True,
        ordered_lookup=True,
        tile_cost=TILE_COST["mps"],
    ),
}
# Blocks of queries of the unfused attention, and the fewest queries of one (torch_mps/policy.py).
ATTENTION_BLOCKS, LEAST_BLOCK = 8, 64


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors of one micro-batch, and of what autograd keeps of a block."""

    config: RunConfig
    traits: TorchTraits
    width: int

    @property
    def tokens(self) -> int:
        """Rows of every matrix product."""
        return self.config.train.micro_batch_size * self.config.data.seq_len

    @property
    def stream(self) -> int:
        """The residual stream in the compute dtype."""
        return self.width * self.tokens * self.config.model.d_model

    @property
    def wide(self) -> int:
        """The residual stream in float32."""
        return 4 * self.tokens * self.config.model.d_model

    @property
    def queries(self) -> int:
        """Queries of all heads."""
        return self.width * self.tokens * self.config.model.n_heads * self.config.model.head_dim

    @property
    def keys(self) -> int:
        """Keys of all heads; values are as many."""
        return self.width * self.tokens * self.config.model.n_kv_heads * self.config.model.head_dim

    @property
    def hidden(self) -> int:
        """One tensor of the MLP's inner width."""
        return self.width * self.mlp_rows * self.config.model.d_ff

    @property
    def tiles(self) -> tuple[int, int]:
        """Of a mixture of experts: tiles, and rows of one, as `experts.make_plan` cuts them."""
        m = self.config.model
        choices = self.tokens * m.top_k
        rows = tile_rows(choices, m.n_experts, self.traits.tile_cost)
        return num_tiles(choices, m.n_experts, rows), rows

    @property
    def mlp_rows(self) -> int:
        """Rows of the MLP's products: the tokens, or with experts the rows of all tiles."""
        return math.prod(self.tiles) if self.config.model.n_experts else self.tokens

    @property
    def kept_experts(self) -> int:
        """What a mixture of experts keeps besides the MLP's own: 0 for a dense model.

        Rows of the tiles before and after the experts, the choices' outputs (float32 too where they
        are not), the router's probabilities and what chose and counted by them.
        """
        m = self.config.model
        if not m.n_experts:
            return 0
        choices = self.tokens * m.top_k
        kept = 2 * self.width * self.mlp_rows * m.d_model
        kept += (4 + (self.width if self.half else 0)) * choices * m.d_model
        kept += self.wide if self.half else 0
        return kept + 4 * 6 * self.tokens * m.n_experts + 8 * 2 * self.mlp_rows

    @property
    def tile_copies(self) -> int:
        """Matrices of the tiles, and their gradients in float32, of one projection."""
        m = self.config.model
        if not m.n_experts or not self.traits.copies_tiles:
            return 0
        return (self.width + 4) * self.tiles[0] * m.d_model * m.d_ff

    @property
    def half(self) -> bool:
        """Whether the compute dtype is narrower than float32."""
        return self.width < 4

    def casts(self, *, block: int) -> int:
        """Copies of a block's matrices in the compute dtype, which its products keep.

        Args:
            block: Elements of the block's matrices.
        """
        return self.width * block if self.half else 0

    @property
    def scores(self) -> int:
        """Elements of the scores of one block, where they are held: the causal part of `[B, H, T, T]`."""
        m, t = self.config.model, self.config.data.seq_len
        block = max(LEAST_BLOCK, -(-t // ATTENTION_BLOCKS))
        seen = sum(min(block, t - i) * min(t, i + block) for i in range(0, t, block))
        return self.config.train.micro_batch_size * m.n_heads * seen

    @property
    def kept_attention(self) -> int:
        """From the projections' outputs to the input of `o_proj`."""
        m, n = self.config.model, self.tokens
        kept = self.queries + 2 * self.keys  # rotated q and k, and v
        if m.qk_norm:  # the norms keep their inputs, and a float32 a row
            kept += self.queries + self.keys + 4 * n * (m.n_heads + m.n_kv_heads)
        kept += self.queries  # the output
        if self.traits.fused_attention:
            kept += 4 * n * m.n_heads  # the log of the sum of each row
            if self.traits.expands_heads and m.n_heads != m.n_kv_heads:
                kept += 2 * (self.queries - self.keys)
            return kept
        return kept + self._kept_unfused()

    def _kept_unfused(self) -> int:
        """Plain operators: q scaled, float32 copies of it and of k, v expanded, and the probabilities."""
        m = self.config.model
        wide = 4 * self.tokens * m.n_heads * m.head_dim
        expanded = 0 if m.n_heads == m.n_kv_heads else 2 * (self.queries - self.keys)
        casts = wide if self.half else 0
        # q and k scaled or made contiguous; probabilities in float32, and in the dtype of v.
        return 2 * wide + expanded + casts + self.scores * (4 + (self.width if self.half else 0))

    def kept_block(self, block: int) -> int:
        """All that a block keeps besides its input, until its backward pass.

        Args:
            block: Elements of the block's matrices.
        """
        m, n = self.config.model, self.tokens
        kept = 2 * 4 * n  # both norms: a float32 a row
        kept += 2 * self.stream  # both norms' outputs, which the projections keep
        kept += self.kept_attention
        kept += self.stream  # the stream between attention and MLP
        kept += 4 * self.hidden  # gate, its activation, up, and their product
        kept += self.kept_experts
        if m.dropout > 0:
            kept += 2 * n * m.d_model  # a bool an element, twice
        return kept + self.casts(block=block)


def walk_micro_batches(ledger: Ledger, config: RunConfig, specs: Sequence[ParamSpec]) -> None:
    """Forward and backward of the micro-batches of a step; leaves the gradients booked."""
    t = config.train
    traits = TRAITS[t.backend]
    sizes = Sizes(config, traits, 4 if t.precision == "float32" else 2)
    _micro_batch(ledger, sizes, specs, accumulated=False)
    if t.grad_accum_steps > 1:
        _micro_batch(ledger, sizes, specs, accumulated=True)


def _micro_batch(
    led: Ledger, sizes: Sizes, specs: Sequence[ParamSpec], *, accumulated: bool
) -> None:
    config, m = sizes.config, sizes.config.model
    # Experts' matrices are cast for each product anew.
    cast = [s for s in specs if s.layer == 0 and s.group == "matrix" and s.experts_used is None]
    block = sum(s.size for s in cast)
    block_grads = 0 if accumulated else 4 * sum(s.size for s in specs if s.layer == 0)
    largest = 4 * max(s.size for s in specs if s.layer == 0)
    embed = 4 * specs[0].size
    kept = sizes.kept_block(block)
    recompute = config.train.gradient_checkpointing
    mask = _mask_bytes(config)
    led.add(ACTIVATIONS, mask)
    # Forward: every block keeps its input and, where it is not computed again, all the rest.
    led.add(ACTIVATIONS, m.n_layers * (sizes.stream + (0 if recompute else kept)), "forward")
    led.add(ACTIVATIONS, sizes.stream)  # the last block's output, kept by the last norm
    led.spike(WORKSPACE, (1 if not sizes.half else 3) * sizes.wide, "the last norm")
    if recompute:
        # While the last block computes: its tensors go as the next are made, but the MLP's overlap.
        led.spike(WORKSPACE, 2 * sizes.stream + 3 * sizes.hidden, "forward of a block")
    _loss(led, sizes, embed)
    _head_backward(led, sizes, embed, accumulated=accumulated)
    led.add(GRADIENTS, 0 if accumulated else 4 * m.d_model)  # the last norm's
    # Backward, from the last block to the first.
    count = m.n_layers
    for index in (0, count - 1) if count > 1 else (0,):
        if index:  # those between
            led.add(GRADIENTS, (count - 2) * block_grads)
            led.drop(ACTIVATIONS, (count - 2) * (sizes.stream + (0 if recompute else kept)))
        if recompute:
            led.add(ACTIVATIONS, kept, "a block computed again")
        where = "backward of the last block" if not index else "backward of the first block"
        _block_backward(led, sizes, kept, largest, where)
        led.add(GRADIENTS, block_grads)
    _embedding_backward(led, sizes, embed, accumulated=accumulated)
    led.drop(ACTIVATIONS, mask)


def _mask_bytes(config: RunConfig) -> int:
    """The mask of documents in one window, bool and as the kernels want it, float32."""
    if config.data.sampling != "packed":
        return 0
    return 5 * config.train.micro_batch_size * config.data.seq_len**2


def _loss(led: Ledger, sizes: Sizes, embed: int) -> None:
    """Leaves the gradients of the head's input and matrix, which the loss makes itself."""
    m = sizes.config.model
    rows = max(1, min(sizes.tokens, sizes.traits.loss_chunk_elements // m.vocab_size))
    head = embed // 4 * sizes.width
    led.add(ACTIVATIONS, sizes.stream, "loss")  # its input
    led.add(LOGITS, sizes.stream + embed)
    if sizes.half:
        led.add(LOGITS, head)
    # Logits of one chunk, in float32 and where they came or went in another dtype.
    chunk = rows * m.vocab_size * (4 + (sizes.width if sizes.half else 0))
    with led.hold(LOGITS, chunk, "logits"):
        if rows < sizes.tokens:  # those of the chunk before go when the next are there
            led.spike(LOGITS, chunk, "logits")
        # The product of one chunk beside the sum; a narrower one is widened first.
        led.spike(LOGITS, head + (embed if sizes.half else 0), "gradient of the head")
    if sizes.half:
        led.drop(LOGITS, head)
    led.drop(ACTIVATIONS, sizes.stream)


def _head_backward(led: Ledger, sizes: Sizes, embed: int, *, accumulated: bool) -> None:
    """Leaves the gradient of the stream, and the head's; the loss's own are freed."""
    led.add(GRADIENTS, embed, "backward of the head")
    led.add(WORKSPACE, sizes.stream, "backward of the head")
    led.drop(LOGITS, sizes.stream + embed)
    tied = sizes.config.model.tie_embeddings
    if accumulated and not tied:  # added to the gradient that is there
        led.drop(GRADIENTS, embed)
    if sizes.traits.skips_padding:
        led.spike(WORKSPACE, sizes.stream, "backward of the head")
    # The norm: a product and its result in float32, and narrower input and gradient widened.
    led.spike(WORKSPACE, (2 + 2 * sizes.half) * sizes.wide, "backward of the last norm")
    led.drop(ACTIVATIONS, sizes.stream)


def _block_backward(led: Ledger, sizes: Sizes, kept: int, largest: int, where: str) -> None:
    """One block: the gradient of its output is booked, and so is that of its input after it.

    Args:
        led: The ledger.
        sizes: Of the micro-batch.
        kept: What the block keeps, its input not counted.
        largest: Gradient of its largest matrix.
        where: Name of the moment.
    """
    hidden, stream = sizes.hidden, sizes.stream
    if sizes.config.model.dropout > 0:
        led.spike(WORKSPACE, 2 * stream, where)
    # down_proj: gradients of its input and matrix; then the product: gradients of both its factors.
    with led.hold(WORKSPACE, largest if sizes.half else 0):
        led.spike(WORKSPACE, hidden + largest + sizes.tile_copies, where)
    led.drop(ACTIVATIONS, hidden)
    led.spike(WORKSPACE, 3 * hidden + largest, where)
    led.drop(ACTIVATIONS, 2 * hidden)  # the activation and up
    # gate_proj and up_proj: each gradient of the norm's output, summed.
    led.spike(WORKSPACE, 2 * hidden + stream + 2 * largest, where)
    led.drop(ACTIVATIONS, hidden)
    with led.hold(WORKSPACE, stream):
        led.spike(WORKSPACE, (2 + 2 * sizes.half) * sizes.wide + 2 * largest, where)
    led.drop(ACTIVATIONS, stream)
    # Attention: gradients of q, k, v and of its output.
    inner = 3 * sizes.queries + 2 * sizes.keys
    if not sizes.traits.fused_attention:
        # Gradients of the probabilities and scores of the block that is worked on, and of every key.
        t = sizes.config.data.seq_len
        share = max(LEAST_BLOCK, -(-t // ATTENTION_BLOCKS)) / t
        inner += round(4 * 3 * sizes.scores * min(1.0, 2 * share)) + 6 * 4 * (
            sizes.tokens * sizes.config.model.n_heads * sizes.config.model.head_dim
        )
    led.spike(WORKSPACE, stream + inner + largest, where)
    led.drop(ACTIVATIONS, kept - 4 * hidden - stream)
    led.drop(ACTIVATIONS, stream)  # its input


def _embedding_backward(led: Ledger, sizes: Sizes, embed: int, *, accumulated: bool) -> None:
    tied = sizes.config.model.tie_embeddings
    led.spike(WORKSPACE, sizes.wide if sizes.half else 0, "backward of the embedding")
    led.drop(WORKSPACE, sizes.stream)
    if sizes.traits.ordered_lookup:
        # Sorted rows, their shifted sum, the masked copy, and both joined; then the rows of each id.
        led.spike(WORKSPACE, 5 * sizes.wide + embed, "backward of the embedding")
    led.spike(WORKSPACE, embed, "backward of the embedding")
    if not tied and not accumulated:
        led.add(GRADIENTS, embed)
    if tied and accumulated:
        led.drop(GRADIENTS, embed)


def stacks(config: RunConfig, specs: Sequence[ParamSpec]) -> list[tuple[bool, int, int, int, int]]:
    """The optimizer's stacks in its order: whether Muon's, how many, rows, columns, elements of one."""
    found: dict[tuple[str, tuple[int, ...]], list[ParamSpec]] = {}
    for spec in specs:
        if spec.trainable:
            found.setdefault((spec.group, spec.shape), []).append(spec)
    out = []
    for kind in found.values():
        shape, each = kind[0].shape, math.prod(kind[0].shape[:-2])  # experts of a block
        rows, columns = shape[-2:] if len(shape) > 1 else (1, shape[0])
        muon = uses_muon(kind[0], config.train.optimizer)
        out.append((muon, len(kind) * each, rows, columns, kind[0].size // each))
    return out


def walk_update(ledger: Ledger, config: RunConfig, specs: Sequence[ParamSpec]) -> None:
    """Gather, norm, clip and update; the gradients are booked before and gone after."""
    led, kinds = ledger, stacks(config, specs)
    for _, count, _, _, size in kinds:
        if count > 1:
            led.spike(WORKSPACE, 4 * count * size, "gradients gathered")
    for _, count, _, _, size in kinds:
        squares = 4 * count * size
        padded = size > FSUM_BLOCK and size % FSUM_BLOCK > 0
        led.spike(WORKSPACE, squares * (2 if padded else 1), "norm of the gradients")
    ns_width = 4 if config.train.ns_dtype == "float32" else 2
    kept = 0  # the update before this one is alive until the next is made
    for muon, count, rows, columns, size in kinds:
        whole = 4 * count * size
        # The gradient, clipped, and that again without NaN.
        led.add(WORKSPACE, kept)
        led.spike(WORKSPACE, whole, "clip")
        led.drop(GRADIENTS, whole)
        led.add(WORKSPACE, whole)
        led.spike(WORKSPACE, whole, "clip")
        if muon:
            _newton_schulz(led, count, (rows, columns), ns_width)
        else:
            led.spike(WORKSPACE, 2 * whole, "update by AdamW")
        led.drop(WORKSPACE, whole + kept)
        kept = whole


def _newton_schulz(led: Ledger, count: int, shape: tuple[int, int], width: int) -> None:
    """Momentum and iterations of one stack; the clipped gradient is booked by the caller."""
    rows, columns = shape
    size, least = rows * columns, min(rows, columns)
    part = min(count, max(1, NS_ELEMENTS["torch"] // size))
    whole = 4 * count * size
    with led.hold(WORKSPACE, whole):  # the update
        led.spike(WORKSPACE, whole, "momentum")
        done = whole if part < count else 0
        with led.hold(WORKSPACE, done):  # parts that are done
            x, gram = width * part * size, width * part * least * least
            padded = size > FSUM_BLOCK and size % FSUM_BLOCK > 0
            led.spike(WORKSPACE, 4 * part * size * (2 if padded else 1), "norms of Newton-Schulz")
            led.spike(WORKSPACE, x + (4 * part * size if width < 4 else x), "Newton-Schulz begins")
            led.spike(WORKSPACE, 2 * x + 2 * gram, "Newton-Schulz")
            if part < count:
                led.spike(WORKSPACE, whole, "parts of Newton-Schulz joined")
