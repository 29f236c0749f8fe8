"""Vectors are made: (n_layer, width) for each site, all ones, and None for a site left out."""

import pytest
import torch

from conftest import SUBSETS, Other, against, check, make_gpt, runs
from ia3 import IA3


@pytest.mark.parametrize("sites", SUBSETS)
def test_the_start(dice, sites):
    config = make_gpt(dice).config
    vectors = IA3(config, sites)
    for site in {"k", "v", "ff"} - set(sites):
        words = f"{site} is not among the sites {sites}, so l_{site} must be None"
        check(getattr(vectors, f"l_{site}") is None, words)
    for site in sites:
        name = f"l_{site}"
        l = getattr(vectors, name)
        shape = (config.n_layer, config.n_embd * (4 if site == "ff" else 1))
        check(l is not None, f"{site} is among the sites {sites}, but {name} is None")
        check(isinstance(l, torch.nn.Parameter), f"{name} must be an nn.Parameter: it is to be trained")
        check(tuple(l.shape) == shape, f"{name} must be {shape}, one row per layer, but it is {tuple(l.shape)}")
        check(l.dtype == torch.float32, f"{name} must be float32, not {l.dtype}")
        far = l.flatten()[(l - 1).abs().argmax()].item()
        check(far == 1, f"{name} must be all ones, so that step 0 is the base; here an entry is {against(far, 1.0)}")
        check(l.requires_grad, f"{name} must require a gradient")
    check(
        set(dict(vectors.named_parameters())) == {f"l_{site}" for site in sites}, "only the sites may have parameters"
    )


def test_the_widths_are_the_ones_given(dice):
    vectors = IA3(Other(dice, (5, 6, 7)).config)
    found = tuple(l.size(-1) for l in vectors.parameters())
    check(found == (5, 6, 7), f"a base whose config.widths is (5, 6, 7) gets vectors of the widths {found}")


def test_every_vector_has_numbers_of_its_own(dice):
    vectors = IA3(make_gpt(dice).config)
    before = vectors.l_v.clone(), vectors.l_k[:, 1:].clone()

    @torch.no_grad()
    def move():
        vectors.l_k[:, 0] += 1

    words = "every entry must have memory of its own: torch.ones makes it, expand does not"
    runs(words, move)
    check(all(map(torch.equal, before, (vectors.l_v, vectors.l_k[:, 1:]))), words)
