"""stack(): tasks under a leading task axis; per_layer(task_ids): every row of a batch its own task's vectors."""

from dataclasses import replace

import torch

from conftest import Other, check, make_gpt, make_vectors, refused, runs
from ia3 import IA3, stack

NAMES = ("l_k", "l_v", "l_ff")


def make_tasks(dice):
    """Three tasks with different sites, one base."""
    config = make_gpt(dice).config
    subsets = (("k", "v", "ff"), ("ff",), ("k", "v"))
    return [make_vectors(dice, config, sites, fingerprint="one base") for sites in subsets]


def test_the_base_may_stand_anywhere(dice, given_start):
    a, b, _ = make_tasks(dice)
    for place, order in {"first": [None, a], "in the middle": [a, None, b], "last": [a, None]}.items():
        runs(f"the base (None) stands {place} in the list, and is in none of its tasks", stack, order)


def test_the_stack(dice, given_start):
    tasks = make_tasks(dice)
    order = [tasks[i] for i in dice.permutation(3)]
    order.insert(int(dice.integers(4)), None)
    stacked, L = stack(order), tasks[0].config.n_layer
    check(isinstance(stacked, IA3), "stack must return an IA3")
    for name in NAMES:
        l, width = getattr(stacked, name), getattr(tasks[0], name).size(1)
        check(isinstance(l, torch.nn.Parameter), f"{name} of the stack must be a Parameter, since a task scales it")
        shape = (len(order), L, width)
        check(tuple(l.shape) == shape, f"{name} of {len(order)} tasks must be {shape}, not {tuple(l.shape)}")
        check(l.requires_grad, f"{name} of the stack must require a gradient")
        for i, task in enumerate(order):
            given = None if task is None else getattr(task, name)
            if given is None:
                check(bool((l[i] == 1).all()), f"task {i} does not scale by {name}: its entries there must be ones")
            else:
                check(torch.equal(l[i], given), f"{name}[{i}] is not the {name} of task {i}, bit for bit")
    check(stacked.fingerprint == "one base", "the stack must carry the fingerprint of its tasks' base")
    before = {name: getattr(tasks[0], name).detach().clone() for name in NAMES}
    with torch.no_grad():
        for p in stacked.parameters():
            p.zero_()
    check(all(torch.equal(getattr(tasks[0], name), t) for name, t in before.items()), "the stack must hold copies")


def test_a_base_that_is_not_a_gpt2(dice, given_start):
    """The widths are the config's, whatever n_embd is: as in two Llamas that differ in n_hidden alone."""
    task, other = (make_vectors(dice, Other(dice, widths).config) for widths in ((6, 6, 11), (6, 6, 12)))
    stacked = runs("the widths are those of config.widths, not multiples of n_embd", stack, [None, task])
    found = tuple(l.size(-1) for l in (stacked.l_k, stacked.l_v, stacked.l_ff))
    check(found == (6, 6, 11), f"tasks whose config.widths is (6, 6, 11) give a stack of the widths {found}")
    words = "tasks whose configs differ in the last of the widths alone, as Llamas may in n_hidden (compare widths)"
    refused(words, stack, [task, other])


def test_what_no_task_scales_is_none(dice, given_start):
    config = make_gpt(dice).config
    stacked = stack([None, make_vectors(dice, config, ("k",)), make_vectors(dice, config, ("v",))])
    check(stacked.l_ff is None, "no task has l_ff, so the stack's must be None")
    check(stacked.l_k is not None and stacked.l_v is not None, "one task has l_k, another l_v: the stack has both")
    check(stacked.fingerprint is None, "tasks that were never attached give a stack whose fingerprint is None")


def test_the_base_is_the_one_that_any_task_remembers(dice, given_start):
    config = make_gpt(dice).config
    tasks = [make_vectors(dice, config), None, make_vectors(dice, config, fingerprint="one base")]
    for order in (tasks, tasks[::-1]):
        words = "one task remembers a base, another none: the stack must remember it, wherever the task stands"
        check(stack(order).fingerprint == "one base", words)


def test_another_block_size_or_dropout_is_no_other_base(dice, given_start):
    config = make_gpt(dice).config
    tasks = [make_vectors(dice, c) for c in (config, replace(config, block_size=4, dropout=0.1))]
    words = "refused: tasks whose configs differ in block_size and dropout. Compare n_layer, widths and fingerprints"
    runs(words, stack, tasks)


def test_what_does_not_belong_together_is_refused(dice, given_start):
    tasks = make_tasks(dice)
    other = make_vectors(dice, tasks[0].config, fingerprint="another base")
    config = tasks[0].config
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    deeper = make_vectors(dice, make_gpt(dice, **(sizes | {"n_layer": config.n_layer + 1})).config)
    wider = make_vectors(dice, make_gpt(dice, **(sizes | {"n_embd": 2 * config.n_embd})).config, ("v",))
    keys = make_vectors(dice, config, ("k",))
    stacked = make_vectors(dice, tasks[0].config, n_tasks=2)
    for what, wrong in {
        "a stack of nothing": [],
        "a stack of the base alone": [None],
        "tasks of two bases": [tasks[0], other],
        "tasks of two bases, the last one's another": [None, keys, tasks[0], tasks[1], other],
        "tasks of two depths": [tasks[0], deeper],
        "tasks of two widths, whatever their sites are": [keys, wider],
        "a stack in a stack": [tasks[0], stacked],
    }.items():
        refused(what, stack, wrong)


def test_every_row_of_a_batch_gets_its_own_tasks_vectors(dice):
    config = make_gpt(dice).config
    vectors = make_vectors(dice, config, n_tasks=int(dice.integers(config.n_layer + 1, 9)))
    n_tasks, B = len(vectors.l_k), 6
    ids = torch.from_numpy(dice.integers(0, n_tasks, B))
    words = "a matrix is (n_tasks, n_layer, width) and task_ids are (B,): index with the ids first, then the layer"
    layers = runs(words, vectors.per_layer, ids)
    for i, layer in enumerate(layers):
        for name, l in zip(NAMES, layer, strict=True):
            matrix = getattr(vectors, name)
            shape = (B, 1, matrix.size(2))
            words = f"layer {i}'s {name} for a batch of {B} must be {shape}, to meet (B, T, width)"
            check(l is not None and tuple(l.shape) == shape, f"{words}, not {None if l is None else tuple(l.shape)}")
            for b, task in enumerate(ids.tolist()):
                if torch.equal(l[b, 0], matrix[task, i]):
                    continue
                same = (matrix == l[b, 0]).all(-1).nonzero().tolist()
                got = "task {}, layer {}".format(*same[0]) if same else "no task's"
                check(False, f"{name}: row {b} of the batch has task {task}, but layer {i} gets the vector of {got}")
    words = "no gradient reaches {}: gather from the Parameter itself, not from a detached copy"
    for name, l in zip(NAMES, layers[0], strict=True):
        check(l.requires_grad, words.format(name))
    sum(l.sum() for layer in layers for l in layer).backward()
    used = torch.zeros(n_tasks, dtype=torch.bool)
    used[ids] = True
    right = vectors.l_k.grad is not None and torch.equal(vectors.l_k.grad.abs().sum((1, 2)) > 0, used)
    check(right, "gradients must reach the vectors of the tasks in the batch, and only theirs")


def operations(node):
    """How many operations autograd remembers behind a tensor's grad_fn."""
    return 1 + sum(operations(other) for other, _ in node.next_functions if other is not None)


def test_the_gather_has_no_loop_over_rows_or_tasks(dice):
    config = make_gpt(dice).config
    counts = []
    for n_tasks, B in ((2, 3), (7, 3), (7, 20)):
        ids = torch.from_numpy(dice.integers(0, n_tasks, B))
        counts.append(operations(make_vectors(dice, config, n_tasks=n_tasks).per_layer(ids)[0][0].grad_fn))
    words = "2 tasks and 3 rows, 7 and 3, 7 and 20 take {}, {} and {} operations per layer: index once, without a loop"
    check(len(set(counts)) == 1, words.format(*counts))


def test_a_site_left_out_is_none_for_a_batch_too(dice):
    vectors = make_vectors(dice, make_gpt(dice).config, ("v",), n_tasks=3)
    layers = vectors.per_layer(torch.tensor([2, 0]))
    check(all(l_k is None and l_ff is None for l_k, _, l_ff in layers), "a site left out must be None in every layer")
