"""Many tasks on one frozen base: switched, stacked and unstacked, in batches that mix them, trained jointly."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from conftest import make_ia3, make_idx
from ia3 import IA3, attach, fingerprint, stack, unstack
from sample import generate

IDS = torch.tensor([2, 0, 1, 3, 0, 2])  # row by row; task 3 is the base


def make_tasks(model):
    """Three tasks that scale different sites, and the base."""
    sites = [("k", "v", "ff"), ("ff",), ("k", "v")]
    return [make_ia3(model, 0, sites[0]), make_ia3(model, 1, sites[1]), make_ia3(model, 2, sites[2]), None]


def test_switching_tasks_is_an_assignment(make_model):
    model = make_model()
    idx = make_idx(model)
    base = model(idx)[0]
    a = make_ia3(model, seed=1)
    with_a = model(idx)[0]
    b = make_ia3(model, seed=2)
    assert not torch.equal(model(idx)[0], with_a)
    model.ia3 = a
    assert torch.equal(model(idx)[0], with_a)
    model.ia3 = None
    assert torch.equal(model(idx)[0], base)
    assert b.fingerprint == a.fingerprint == fingerprint(model)


def test_a_row_of_a_mixed_batch_is_that_row_of_the_batch_under_its_task_bit_for_bit(make_model):
    """Same shapes, so the same matmul kernels; only the scales of other rows differ."""
    model = make_model()
    tasks, idx = make_tasks(model), make_idx(model, rows=len(IDS))
    attach(model, stack(tasks))
    mixed, loss = model(idx, idx, IDS)
    assert loss.isfinite()
    for i, task in enumerate(IDS):
        model.ia3 = attached = stack(tasks)
        assert torch.equal(mixed[i], model(idx, task_ids=torch.full_like(IDS, task))[0][i])
        model.ia3 = tasks[task]  # and not only the same as when stacked
        assert torch.equal(mixed[i], model(idx)[0][i])
    k_width, _, ff_width = model.config.widths
    assert attached.l_k.shape == (4, 2, k_width) and attached.l_ff.shape == (4, 2, ff_width)
    assert not torch.equal(mixed[1], mixed[4])  # one task, two texts
    same = idx[:1].expand(4, -1)
    model.ia3 = stack(task for task in tasks)  # of anything that can be run through
    assert torch.equal(model.ia3.l_k, attached.l_k)
    rows = model(same, task_ids=torch.arange(4))[0]
    assert all(not torch.equal(rows[i], rows[j]) for i in range(4) for j in range(i))  # four tasks, one text


def test_what_a_task_leaves_out_is_ones_and_what_all_leave_out_is_none(make_model):
    model = make_model()
    k, v = make_ia3(model, sites=("k",)), make_ia3(model, sites=("v",))
    stacked = stack([k, v, None])
    assert stacked.l_ff is None and stacked.count() == 3 * (k.count() + v.count())
    assert torch.equal(stacked.l_k[0], k.l_k) and (stacked.l_k[1:] == 1).all()
    assert torch.equal(stacked.l_v[1], v.l_v) and (stacked.l_v[::2] == 1).all()
    assert torch.equal(stack([k, v]).l_k.mean(0), (k.l_k + 1) / 2)  # in a mean, too, what is left out counts 1
    with torch.no_grad():
        stacked.l_k.zero_()
    assert (k.l_k != 0).any()  # a copy


def test_unstack_is_the_way_back(make_model):
    model = make_model()
    tasks = [make_ia3(model, 1, ("k", "v")), make_ia3(model, 2, ("k",)), None]
    stacked = stack(tasks)
    found = unstack(stacked)
    assert len(found) == 3 and {task.fingerprint for task in found} == {fingerprint(model)}
    for task, before in zip(found, tasks, strict=True):
        assert list(task.matrices()) == ["l_k", "l_v"] and not task.is_stacked()
        for name, p in task.matrices().items():
            wanted = None if before is None else before.matrices().get(name)
            assert torch.equal(p, torch.ones_like(p) if wanted is None else wanted)
    with torch.no_grad():
        found[0].l_k.zero_()
    assert torch.equal(stacked.l_k[0], tasks[0].l_k)  # copies
    with pytest.raises(ValueError, match="one task's"):
        unstack(tasks[0])


def test_joint_training_gives_each_task_the_gradients_that_it_gets_alone(make_model):
    """The joint loss is a mean over 6 rows, a task's own over its 2. Float64; sums in another order differ by 1e-12."""
    model = make_model().double()
    tasks = [make_ia3(model, seed) for seed in range(3)]
    idx, targets, ids = make_idx(model, 6), make_idx(model, 6, seed=1), torch.tensor([1, 0, 2, 2, 0, 1])
    joint = attach(model, stack(tasks)).double()
    model(idx, targets, ids)[1].backward()
    assert all(p.grad is None for p in [*model.blocks.parameters(), model.lm_head.weight])
    for i, task in enumerate(tasks):
        model.ia3 = task.double()
        model(idx[ids == i], targets[ids == i])[1].backward()
        for name, p in task.matrices().items():
            found = 3 * joint.matrices()[name].grad[i]
            assert found.abs().max() > 1e-6
            assert torch.allclose(found, p.grad, rtol=1e-10, atol=1e-12 * p.grad.abs().max().item()), name


def test_tasks_learn_in_one_batch_by_the_one_training_loop_and_are_saved_one_by_one(make_model, tmp_path):
    model = make_model()
    vectors = attach(model, stack([IA3(model.config) for _ in range(3)]))

    class Texts:
        def __len__(self):
            return 6

        def windows(self, ids):
            return make_idx(model, 6)[ids], make_idx(model, 6, seed=1)[ids], torch.tensor(ids) % 2  # never task 2

        def batch(self, seed, step, batch_size):
            return self.windows(list(range(6)))

    config = train.TrainConfig(steps=20, lr=0.05, batch_size=6, dtype="float32")
    history = train.train(model, {"train": Texts(), "val": Texts()}, config, lambda model, x, y, t: model(x, y, t)[1])
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    for p in vectors.parameters():
        assert (p[:2] != 1).any() and (p[2] == 1).all()  # a task without a row stays as it is
        assert not torch.equal(p[0], p[1])

    # unstacked, saved, loaded and stacked again: the same bits
    for i, task in enumerate(unstack(vectors)):
        task.save(tmp_path / f"{i}.npz")
    again = stack([IA3.load(tmp_path / f"{i}.npz", model) for i in range(3)])
    assert again.fingerprint == fingerprint(model)
    assert all(torch.equal(again.matrices()[name], p) for name, p in vectors.matrices().items())


class Count(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


def test_no_loop_over_rows_or_tasks(make_model):
    """The forward pass runs the same number of tensor operations for 2 rows of 2 tasks and for 16 rows of 16."""
    model, counts = make_model(), []
    task = make_ia3(model)
    for n in (2, 16):
        attach(model, stack([task] * n))
        with Count() as count:
            model(make_idx(model, n), task_ids=torch.arange(n))
        counts.append(count.n)
    assert counts[0] == counts[1]


def test_generate_writes_in_every_row_what_it_would_write_under_its_task_alone(make_model):
    """The noise of a row does not depend on other rows' predictions, so this holds for drawn text too."""
    model = make_model()
    tasks, idx = make_tasks(model), make_idx(model, 1)[:, :5].expand(len(IDS), -1)
    attach(model, stack(tasks))
    for temperature in (0, 1.0):
        settings = {"max_new_tokens": 20, "temperature": temperature, "top_k": 50}
        mixed = generate(model, idx, task_ids=IDS, generator=torch.Generator().manual_seed(0), **settings)
        for i, task in enumerate(IDS):
            ids = torch.full_like(IDS, task)
            alone = generate(model, idx, task_ids=ids, generator=torch.Generator().manual_seed(0), **settings)
            assert torch.equal(mixed[i], alone[i])
        assert len({tuple(row.tolist()) for row in mixed}) >= 4


@pytest.mark.parametrize("sites", [("k",), ("k", "v", "ff")])
def test_a_stack_stands_on_its_tasks_device_wherever_the_base_is_in_it(make_model, sites):
    """On the device 'meta', which stands in for a GPU: what would be copied from there to the CPU raises."""
    config = make_model().config
    task, part = IA3(config).to("meta"), IA3(config, sites).to("meta")
    for tasks in ([None, task], [task, None], [part, task], [None, part, task]):
        assert {p.device.type for p in stack(tasks).parameters()} == {"meta"}


def test_stacking_what_does_not_belong_together_is_refused(make_model):
    model, other, deeper = make_model(), make_model(seed=1), make_model(n_layer=3)
    task = make_ia3(model)
    unknown = IA3(deeper.config)  # of a base that is not known yet: its shapes tell
    for wrong in ([], [None], [task, make_ia3(other)], [task, unknown], [task, stack([task])]):
        with pytest.raises(ValueError, match="stack takes"):
            stack(wrong)
    with pytest.raises(ValueError, match="another base"):
        attach(other, stack([task, task]))


@pytest.mark.parametrize(
    "ids, message",
    [
        ([0, 1, 2], "from 0 to 1"),
        ([0, -1, 0], "from 0 to 1"),
        ([0.0, 1.0, 0.0], "dtype long"),
        ([True, False, True], "dtype long"),
        ([0, 1], "one id for each row"),
        ([], "one id for each row"),
        ([0], "one id for each row"),  # would broadcast
        (0, "one id per row"),
        ([[0], [1], [0]], "one id per row"),
        (None, "stacked vectors need task_ids"),
    ],
)
def test_task_ids_that_do_not_fit_are_refused(make_model, ids, message):
    model = make_model()
    attach(model, stack([make_ia3(model), None]))
    ids = None if ids is None else torch.tensor(ids, dtype=torch.long if ids == [] else None)
    idx = make_idx(model)
    with pytest.raises(ValueError, match=message):
        model(idx, task_ids=ids)
    with pytest.raises(ValueError, match=message):
        generate(model, idx, 1, task_ids=ids)


def test_task_ids_in_a_list_are_refused(make_model):
    model = make_model()
    attach(model, stack([make_ia3(model), None]))
    idx = make_idx(model)
    with pytest.raises(ValueError, match="a tensor"):
        model(idx, task_ids=[0, 1, 0])
    with pytest.raises(ValueError, match="a tensor"):
        model.ia3.check_task_ids([0, 1, 0])
    assert torch.equal(model(idx, task_ids=torch.tensor([1, 1, 1]))[0], make_model()(idx)[0])


def test_task_ids_without_stacked_vectors_are_refused(make_model):
    model = make_model()
    idx, ids = make_idx(model), torch.tensor([0, 0, 0])
    with pytest.raises(ValueError, match="task_ids need stacked vectors"):
        model(idx, task_ids=ids)
    make_ia3(model)
    with pytest.raises(ValueError, match="vectors of one task take none"):
        model(idx, task_ids=ids)
    with pytest.raises(ValueError, match="vectors of one task take none"):
        generate(model, idx, 1, task_ids=ids)
