"""Chunks of a loop that do not merge are left alone, and told; what is an attention by itself is none of them."""

import pytest
import torch

from lacompile.testing import assert_refused, assert_rewritten

B, H, N, D, C = 2, 3, 24, 8, 8


def arguments(n=N):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(B, H, n, D, generator=generator).requires_grad_() for _ in range(3)]


def chunks_of_a_view(q, k, v, between):
    """A loop over chunks that stand in a dimension of their own; ``between`` decays the state from one to the next."""
    q, k, v = (torch.relu(x.unflatten(2, (-1, C))) for x in (q, k, v))
    state, out = torch.zeros(B, H, D, D), []
    for n in range(q.shape[2]):
        a, b, c = q[:, :, n], k[:, :, n], v[:, :, n]
        out.append((a @ b.mT).tril() @ c + a @ state)
        state = between(n) * state + b.mT @ c
    return torch.cat(out, 2)


def chunks_of_parts(q, k, v, between):
    state, out = torch.zeros(B, H, D, D), []
    for n, (a, b, c) in enumerate(zip(*(x.split(C, 2) for x in (q, k, v)), strict=True)):
        out.append((a @ b.mT).tril() @ c + a @ state)
        state = between(n) * state + b.mT @ c
    return torch.cat(out, 2)


LOOPS = [chunks_of_a_view, chunks_of_parts]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_that_merges(loop):
    assert_rewritten(lambda q, k, v: loop(q, k, v, lambda n: 1.0), *arguments(), compiled=False)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_state_that_decays_from_chunk_to_chunk_alone(loop):
    report = assert_refused(lambda q, k, v: loop(q, k, v, lambda n: 0.9), *arguments())
    assert "costs more as an operator than it saves" in str(report)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_same_at_a_second_length(loop):
    def program(q, k, v):
        return loop(q, k, v, lambda n: 0.9)

    assert_rewritten(program, *arguments(), after=arguments(2 * C), count=0, compiled=False)


@pytest.mark.parametrize("left", [0, 2])
def test_chunks_of_a_longer_tensor_whose_end_stays_empty(left):
    """A loop over whole chunks of a length that need not be a multiple of theirs; where it is one, that is guarded."""

    def program(q, k, v):
        out, state = torch.zeros_like(q), torch.zeros(B, H, D, D)
        for n in range(q.shape[2] // C):
            a, b, c = (x[:, :, n * C : n * C + C] for x in (q, k, v))
            out[:, :, n * C : n * C + C] = (a @ b.mT).tril() @ c + a @ state
            state = state + b.mT @ c
        return out

    long, short = arguments(3 * C + left), arguments(2 * C)
    assert_rewritten(program, *long, after=short, count=not left, compiled=False, grads=False)


# ------------------------------------------------------------------------------------- attentions by themselves


def test_one_chunk_that_is_given_a_state():
    def program(q, k, v, state):
        return (q @ k.mT).tril() @ v + q @ state, state + k.mT @ v

    assert_rewritten(program, *arguments(C), torch.randn(B, H, D, D).requires_grad_(), compiled=False)


def test_a_short_sequence():
    assert_rewritten(lambda q, k, v: (q @ k.mT).tril() @ v, *arguments(4), compiled=False)


def test_heads_of_one_tensor_with_an_attention_each():
    def program(q, k, v):
        return torch.cat([(q[:, h] @ k[:, h].mT).tril() @ v[:, h] * (h + 1.5) ** 2 for h in range(H)], -1)

    assert_rewritten(program, *arguments(), count=1, compiled=False)


def test_two_layers():
    def program(q, k, v):
        y = (q @ k.mT).tril() @ v
        return (torch.relu(y) @ k.mT).tril() @ torch.sigmoid(y)

    assert_rewritten(program, *arguments(), count=2, compiled=False)


def test_an_attention_beside_what_all_rows_read():
    """Of other tensors than the attention: a memory that all rows read is no chunk before."""

    def program(q, k, v, k2, v2):
        return torch.sigmoid((q @ k.mT).tril() @ v) + q @ (k2.mT @ v2)

    assert_rewritten(program, *arguments(), *arguments(5)[1:], compiled=False)
