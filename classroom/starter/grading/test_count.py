"""count(): the number of values."""

import pytest

from conftest import SUBSETS, check, make_gpt, make_vectors


@pytest.mark.parametrize("n_tasks", [None, 3])
@pytest.mark.parametrize("sites", SUBSETS)
def test_the_count(dice, sites, n_tasks):
    config = make_gpt(dice).config
    vectors = make_vectors(dice, config, sites, n_tasks)
    expected = 0
    for site in sites:
        expected += config.n_layer * config.n_embd * (4 if site == "ff" else 1) * (n_tasks or 1)
    found = vectors.count()
    shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in vectors.named_parameters())
    check(type(found) is int, f"count() must return an int, not {type(found).__name__}")
    check(found == expected, f"{shapes} hold {expected} values, but count() says {found}")
