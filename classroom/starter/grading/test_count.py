"""count(): the number of values."""

import pytest
from conftest import SUBSETS, check, make_gpt, make_vectors


@pytest.mark.parametrize("tasks", [(), (3,)])
@pytest.mark.parametrize("targets", SUBSETS)
def test_the_count(dice, targets, tasks):
    config = make_gpt(dice).config
    vectors = make_vectors(dice, config, targets, tasks=tasks)
    expected = 0
    for t in targets:
        expected += config.n_layer * config.n_embd * (4 if t == "ff" else 1) * (tasks or (1,))[0]
    found = vectors.count()
    shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in vectors.named_parameters())
    check(type(found) is int, f"count() must return an int, not {type(found).__name__}")
    check(found == expected, f"{shapes} hold {expected} values, but count() says {found}")
