"""The gradient of l against finite differences, and finite differences against functions whose slope is known."""

import torch
from conftest import check, draw
from gradient import central_difference, gradient_of_l


def attention_loss(dice, B, T, C):
    """A smooth loss of scaled keys (B, T, C): random queries and values attend to them."""
    q, v, w = draw(dice, 3, B, T, C)
    return lambda y: ((q @ y.mT).softmax(-1) @ v * w).sum()


def test_the_gradient(dice):
    """Differences with ε = 1e-5 in float64 are off by O(ε²) + rounding/ε, about 1e-9."""
    B, T, C = (int(n) for n in dice.integers(2, 6, 3))
    x, l = draw(dice, B, T, C), draw(dice, C, mean=1.0, spread=0.5)
    loss = attention_loss(dice, B, T, C)
    y = (l * x).requires_grad_()
    (upstream,) = torch.autograd.grad(loss(y), y)
    given = x.clone(), upstream.clone()
    found = gradient_of_l(x, upstream)
    truth = torch.zeros(C, dtype=torch.float64)
    for c in range(C):
        e = torch.zeros(C, dtype=torch.float64)
        e[c] = 1e-5
        truth[c] = (loss((l + e) * x) - loss((l - e) * x)) / 2e-5
    check(torch.equal(x, given[0]) and torch.equal(upstream, given[1]), "x or upstream was changed in place")
    check(
        tuple(found.shape) == (C,), f"the gradient has an entry a channel, ({C},), but this one is {tuple(found.shape)}"
    )

    def is_truth(scale):
        return bool((scale * found - truth).abs().max() <= 1e-6 * (1 + truth.abs().max()))

    for scale, words in ((B * T, "over B and T"), (B, "over B"), (T, "over T")):
        check(not is_truth(scale), f"it is {scale} times too small: a mean {words}, where the chain rule gives a sum")
    check(not is_truth(-1), "its sign is wrong")
    check(is_truth(1), f"finite differences say {truth[:3].tolist()}..., the function {found[:3].tolist()}...")


def test_the_difference_is_central(dice):
    p = draw(dice, 3, 4)
    place = tuple(int(i) for i in (dice.integers(3), dice.integers(4)))
    a, b = dice.normal(size=2)
    before, step = p.clone(), 0.25
    slope = central_difference(lambda: (a * p[place] ** 2 + b * p[place]).item(), p, place, step)
    truth = (2 * a * before[place] + b).item()  # for a parabola a central difference is exact, whatever its step
    check(torch.equal(p, before), "p must be left with the bits that it had")
    check(abs(slope - truth - a * step) > 1e-9, "that is a forward difference, (L(p + step) - L(p)) / step")
    check(abs(slope - 2 * truth) > 1e-9, "it is twice the slope: p moved by 2·step, so divide by that")
    check(abs(slope - truth) < 1e-9 * (1 + abs(truth)), f"the slope is {truth:.6g}, and the function says {slope:.6g}")


def test_only_the_given_place_moves(dice):
    p = draw(dice, 2, 3)
    w = draw(dice, 2, 3)
    for place in ((0, 0), (1, 2)):
        slope = central_difference(lambda: (w * p).sum().item(), p, place)
        words = f"∂L/∂p{list(place)} is {w[place]:.6g}, and the function says {slope:.6g}"
        check(abs(slope - w[place]) < 1e-6 * (1 + abs(w[place])), words)


def test_a_leaf_that_requires_a_gradient_can_be_moved(dice):
    p = draw(dice, 3).requires_grad_()
    slope = central_difference(lambda: p.square().sum().item(), p, 1)
    check(abs(slope - 2 * p[1].item()) < 1e-6, f"the slope is {2 * p[1].item():.6g}, and the function says {slope:.6g}")
    check(p.grad is None, "no gradient may be left in p.grad")
