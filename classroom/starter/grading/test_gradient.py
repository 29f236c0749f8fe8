"""The gradient of l against finite differences, and finite differences against functions whose slope is known."""

import torch
from gradient import central_difference, gradient_of_l

from conftest import against, check, draw


def attention_loss(dice, B, T, C):
    """A smooth loss of scaled keys (B, T, C): random queries and values attend to them."""
    q, v, w = draw(dice, 3, B, T, C)
    return lambda y: ((q @ y.mT).softmax(-1) @ v * w).sum()


def test_the_gradient(dice):
    """Differences with ε = 1e-5 in float64 are off by O(ε²) + rounding/ε: by less than 1e-8 in thousands of draws."""
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
        tuple(found.shape) == (C,),
        f"the gradient has one entry per channel, ({C},), but this one is {tuple(found.shape)}",
    )

    def is_truth(scale):
        return bool((scale * found - truth).abs().max() <= 1e-8 + 1e-6 * truth.abs().max())

    for scale, words in ((B * T, "over B and T"), (B, "over B"), (T, "over T")):
        check(not is_truth(scale), f"it is {scale} times too small: a mean {words}, where the chain rule gives a sum")
    check(not is_truth(-1), "its sign is wrong")
    worst = (found - truth).abs().argmax()
    words = f"∂L/∂l[{worst}] by this function is {against(found[worst].item(), truth[worst].item())}"
    check(is_truth(1), f"{words}, by finite differences")


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
    check(abs(slope - truth) < 1e-9 * (1 + abs(truth)), f"the function says {against(slope, truth)}")


def test_the_step_is_the_one_given(dice):
    """Of p³ the central difference is 3p² + step², exactly: off by step², as the docstring has it."""
    p = draw(dice, 3)
    for step in dice.uniform(0.1, 1, 3):
        truth = 3 * p[1].item() ** 2 + step**2
        slope = central_difference(lambda: p[1].item() ** 3, p, 1, step)
        words = f"of p³ with step = {step:.3g} at p = {p[1]:.3g} the function says {against(slope, truth)}, 3p² + step²"
        check(abs(slope - truth) < 1e-9 * (1 + truth), f"{words}: does it use the step that it is given?")


def test_the_very_bits_are_put_back(dice):
    """Beside a step of 1, a number near 10⁻⁹ loses half of its digits."""
    p = 1e-9 * draw(dice, 5)
    before = p.clone()
    central_difference(lambda: p.sum().item(), p, 2, 1.0)
    words = "p must be left with the bits that it had: p + step - step is not p, digits are lost on the way"
    check(torch.equal(p, before), words)


def test_only_the_given_place_moves(dice):
    p = draw(dice, 2, 3)
    w = draw(dice, 2, 3)
    for place in ((0, 0), (1, 2)):
        slope = central_difference(lambda: (w * p).sum().item(), p, place)
        words = f"of ∂L/∂p{list(place)} the function says {against(slope, w[place].item())}"
        check(abs(slope - w[place]) < 1e-6 * (1 + abs(w[place])), words)


def test_a_leaf_that_requires_a_gradient_can_be_moved(dice):
    p = draw(dice, 3).requires_grad_()
    slope = central_difference(lambda: p.square().sum().item(), p, 1)
    check(abs(slope - 2 * p[1].item()) < 1e-6, f"the function says {against(slope, 2 * p[1].item())}")
    check(p.grad is None, "no gradient may be left in p.grad")
