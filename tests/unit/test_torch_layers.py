"""Hand-written gradients and kernels of the torch layers against autograd and numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backends.torch_common.device import CpuPolicy
from backends.torch_common.layers import (
    MASKED,
    RMSNorm,
    _RMSNormFunction,
    apply_rope,
    attention,
    dropout,
    ordered_lookup,
    scatter_rows,
)
from backends.torch_common.losses import _HeadLoss, token_nll
from core.dropout import dropout_row_keys
from core.rope import rope_tables
from tests.helpers import tiny_config
from tests.reference import model_np

torch.manual_seed(0)


def gradients(function, *inputs):
    """Output and gradients of a fixed random projection of it."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y.double() * weight).sum().backward()
    return [y.detach(), *(x.grad for x in leaves)]


def test_rms_norm_equals_the_formula():
    def plain(x, w):
        return w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-2)

    x, w = torch.randn(2, 7, 4, 6), torch.randn(6)
    wanted = gradients(plain, x.double(), w.double())
    for a, b in zip(wanted, gradients(lambda x, w: _RMSNormFunction.apply(x, w, 1e-2), x, w)):
        assert torch.allclose(a.float(), b, rtol=1e-5, atol=1e-5)


def test_rms_norm_works_in_float32():
    norm = RMSNorm(512, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 512).bfloat16()
    wanted = model_np.rms_norm(x.double().numpy(), norm.weight.detach().double().numpy(), 1e-5)
    found = norm(x)
    assert found.dtype == torch.bfloat16
    # Half a unit in the last place of bfloat16: only the result is rounded.
    assert np.all(abs(found.detach().double().numpy() - wanted) <= abs(wanted) * 2**-8)


def test_rope_equals_the_formula():
    x = torch.randn(2, 7, 4, 6)
    cos, sin = (torch.from_numpy(t) for t in rope_tables(7, 6, 100.0))
    found, grad = gradients(lambda x: apply_rope(x, cos[:, None], sin[:, None]), x)
    wanted = model_np.rope(x.double().numpy().transpose(0, 2, 1, 3), 100.0).transpose(0, 2, 1, 3)
    assert np.allclose(found.numpy(), wanted, atol=1e-6)

    def plain(x):
        x1, x2 = x.chunk(2, -1)
        c, s = cos[:, None].double(), sin[:, None].double()
        return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1)

    assert torch.allclose(grad, gradients(plain, x.double())[1].float(), atol=1e-6)


@pytest.mark.parametrize("block", [1, 3, 7, 64])
def test_block_attention_equals_the_fused_kernel(block):
    q, k, v = torch.randn(2, 4, 7, 6), torch.randn(2, 2, 7, 6), torch.randn(2, 2, 7, 6)
    policy = CpuPolicy(tiny_config())
    bias = torch.full((7, 7), MASKED).triu(1)
    ours = gradients(lambda *x: attention(*x, bias, block, from_start=True), q, k, v)
    fused = gradients(lambda *x: policy.attention(*x, None, from_start=True), q, k, v)
    for a, b in zip(ours, fused):
        assert torch.allclose(a, b, rtol=1e-5, atol=2e-6)
    mask = (torch.rand(2, 1, 7, 7) < 0.5).tril() | torch.eye(7, dtype=torch.bool)
    bias = (~mask).float() * MASKED
    ours = gradients(lambda *x: attention(*x, bias, block, from_start=True), q, k, v)
    fused = gradients(lambda *x: policy.attention(*x, mask, from_start=True), q, k, v)
    for a, b in zip(ours, fused):
        assert torch.allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("block", [3, 64])
def test_block_attention_of_as_many_queries_as_keys_may_see_all_keys(block):
    """A full cache: T equals S, and queries stand behind keys that are there already."""
    q, k, v = torch.randn(2, 4, 7, 6), torch.randn(2, 2, 7, 6), torch.randn(2, 2, 7, 6)
    mask = torch.arange(7) <= torch.tensor([0, 3])[:, None, None, None] + torch.arange(7)[:, None]
    found = attention(q, k, v, (~mask).float() * MASKED, block, from_start=False)
    fused = CpuPolicy(tiny_config()).attention(q, k, v, mask, from_start=False)
    assert torch.allclose(found, fused, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_attention_scores_and_softmax_are_float32(dtype):
    """What is left is the rounding of probabilities and results, half a unit of the dtype each.

    Scores of about 30 that are rounded to the dtype are off by that share of 30.
    """
    q, k = 16 * torch.randn(1, 2, 50, 8).to(dtype), torch.randn(1, 2, 4001, 8).to(dtype)
    v = torch.randn(1, 2, 4001, 8).to(dtype)
    found = attention(q, k, v, None, 64, from_start=False)
    scores = q.double() @ k.double().transpose(2, 3) / math.sqrt(8)
    wanted = scores.softmax(-1) @ v.double()
    assert found.dtype == dtype
    assert float((found - wanted).norm() / wanted.norm()) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 64), (4, 33)])
def test_gradient_of_a_lookup_sums_repeated_ids(shape):
    tokens, grads = torch.randint(0, 5, shape) * 2, torch.randn(*shape, 6)
    expected = torch.zeros(11, 6, dtype=torch.float64)
    expected.index_add_(0, tokens.flatten(), grads.flatten(0, 1).double())
    found = scatter_rows(tokens, grads, 11)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=2e-6)
    weight = torch.randn(11, 6, requires_grad=True)
    rows = ordered_lookup(weight, tokens)
    assert torch.equal(rows, F.embedding(tokens, weight))
    (rows * grads).sum().backward()
    assert torch.equal(weight.grad, found)


def test_dropout_mask_is_the_hash():
    x = torch.randn(3, 5, 7)
    keys = dropout_row_keys(3, 11, 2, 3)
    salt = 0x9ABCDEF1
    wanted = model_np.dropout(x.double().numpy(), keys, salt, 0.3)
    y, grad = gradients(lambda x: dropout(x, torch.from_numpy(keys.view(np.int32)), salt, 0.3), x)
    assert np.allclose(y.numpy(), wanted, rtol=1e-6)
    assert torch.equal(grad == 0, y == 0)
    assert 0.1 < float((y == 0).float().mean()) < 0.5
    assert dropout(x, None, salt, 0.3) is x


def test_dropout_rate_and_scale():
    keys = torch.from_numpy(dropout_row_keys(1, 1, 0, 8).view(np.int32))
    y = dropout(torch.ones(8, 50, 100), keys, 5, 0.25)
    assert set(y.unique().tolist()) == {0.0, float(np.float32(1 / 0.75))}
    # Four standard deviations of 40,000 draws.
    assert abs(float((y == 0).float().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 40_000)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_loss_equals_cross_entropy(chunk):
    hidden, head = torch.randn(10, 6), torch.randn(17, 6)
    targets, weights = torch.randint(0, 17, (10,)), torch.rand(10)
    coefficient = torch.tensor(0.37)

    def ours(h, w):
        return _HeadLoss.apply(h, w, targets, weights, coefficient, chunk)

    def plain(h, w):
        nll = F.cross_entropy(h @ w.T, targets, reduction="none")
        return (nll * weights.double()).sum() * 0.37

    wanted = gradients(plain, hidden.double(), head.double())
    for a, b in zip(wanted, gradients(ours, hidden, head)):
        assert torch.allclose(a.float(), b, rtol=1e-5, atol=1e-6)


def test_loss_scale_is_applied_before_rounding():
    """A gradient of 1e-9 is zero in float16 unless it is scaled first."""
    hidden, head = torch.randn(4, 6).half(), torch.randn(17, 6)
    targets, weights = torch.randint(0, 17, (4,)), torch.full((4,), 1e-8)

    def grad(scale):
        leaf = hidden.clone().requires_grad_()
        loss = _HeadLoss.apply(leaf, head, targets, weights, torch.tensor(scale), 3)
        loss.backward()
        return leaf.grad

    assert not grad(1.0).any()
    assert grad(65_536.0).any()


def test_token_nll_far_from_zero():
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    assert token_nll(logits, torch.tensor([2])).tolist() == [20_000.0]
    assert token_nll(logits.bfloat16(), torch.tensor([0])).dtype == torch.float32
