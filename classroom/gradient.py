"""The gradient of the vectors by hand, and what checks a gradient without knowing its formula."""

import torch


def gradient_of_l(x, upstream):
    """The gradient of a loss L with respect to l, where y = l ⊙ x goes into L at every position of a batch.

    x (B, T, width): what is scaled, such as the keys; upstream (B, T, width): ∂L/∂y. Returns ∂L/∂l (width,).
    """
    return (upstream * x).sum((0, 1))


@torch.no_grad()
def central_difference(loss, p, place, step=1e-6):
    """(L(p + step) - L(p - step)) / (2·step) in the one entry of p at place: ∂L/∂p[place] but for O(step²).

    loss(): computes L, a float, from p as it is now. p: a tensor in float64, left with the bits that it had.
    """
    before = p[place].clone()
    p[place] = before + step
    above = loss()
    p[place] = before - step
    below = loss()
    p[place] = before
    return (above - below) / (2 * step)
