"""Many tasks on one frozen base: stacked vectors, batches that mix tasks, their gradients and texts, and choices."""

import json

import pytest
import torch
from conftest import make_gpt, make_ia3, make_idx
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import train
from ia3 import IA3, attach, stack

IDS = torch.tensor([2, 0, 1, 3, 0, 2])  # row by row; task 3 is the base


def make_tasks(model):
    """Three tasks with different targets, and the base."""
    targets = [("k", "v", "ff"), ("ff",), ("k", "v")]
    return [*[make_ia3(model, seed, t) for seed, t in enumerate(targets)], None]


def test_a_row_of_a_mixed_batch_is_that_row_of_the_batch_under_its_task_bit_for_bit():
    """Same shapes, so the same matmul kernels; only the scales of other rows differ."""
    model = make_gpt()
    tasks, idx = make_tasks(model), make_idx(model, rows=len(IDS))
    attach(model, stack(tasks))
    mixed, loss = model(idx, idx, IDS)
    assert loss.isfinite()
    for i, task in enumerate(IDS):
        model.ia3 = attached = stack(tasks)
        assert torch.equal(mixed[i], model(idx, tasks=torch.full_like(IDS, task))[0][i])
        model.ia3 = tasks[task]  # and not only the same as when stacked
        assert torch.equal(mixed[i], model(idx)[0][i])
    assert attached.l_k.shape == (4, 2, 16) and attached.l_ff.shape == (4, 2, 64)
    assert not torch.equal(mixed[1], mixed[4])  # one task, two texts
    same = idx[:1].expand(4, -1)
    model.ia3 = attached
    rows = model(same, tasks=torch.arange(4))[0]
    assert all(not torch.equal(rows[i], rows[j]) for i in range(4) for j in range(i))  # four tasks, one text


def test_what_a_task_leaves_out_is_ones_and_what_all_leave_out_is_none():
    model = make_gpt()
    k, v = make_ia3(model, targets=("k",)), make_ia3(model, targets=("v",))
    stacked = stack([k, v, None])
    assert stacked.l_ff is None and stacked.count() == 3 * (k.count() + v.count())
    assert torch.equal(stacked.l_k[0], k.l_k) and (stacked.l_k[1:] == 1).all()
    assert torch.equal(stacked.l_v[1], v.l_v) and (stacked.l_v[::2] == 1).all()
    with torch.no_grad():
        stacked.l_k.zero_()
    assert (k.l_k != 0).any()  # a copy


def test_joint_training_gives_each_task_the_gradients_that_it_gets_alone():
    """The joint loss is a mean over 6 rows, a task's own over its 2. Float64; sums in another order differ by 1e-12."""
    model = make_gpt().double()
    tasks = [make_ia3(model, seed) for seed in range(3)]
    idx, targets, ids = make_idx(model, 6), make_idx(model, 6, seed=1), torch.tensor([1, 0, 2, 2, 0, 1])
    joint = attach(model, stack(tasks)).double()
    model(idx, targets, ids)[1].backward()
    assert all(p.grad is None for p in model.transformer.parameters())
    for i, task in enumerate(tasks):
        model.ia3 = task.double()
        model(idx[ids == i], targets[ids == i])[1].backward()
        for name, p in task.matrices().items():
            found = 3 * joint.matrices()[name].grad[i]
            assert found.abs().max() > 1e-6
            assert torch.allclose(found, p.grad, rtol=1e-10, atol=1e-12 * p.grad.abs().max().item()), name


def test_three_tasks_learn_in_one_batch_by_the_one_training_loop():
    model = make_gpt()
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


class Count(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


def test_no_loop_over_rows_or_tasks():
    """The forward pass runs the same number of tensor operations for 2 rows of 2 tasks and for 16 rows of 16."""
    model, counts = make_gpt(), []
    task = make_ia3(model)
    for n in (2, 16):
        attach(model, stack([task] * n))
        with Count() as count:
            model(make_idx(model, n), tasks=torch.arange(n))
        counts.append(count.n)
    assert counts[0] == counts[1]


def test_generate_writes_in_every_row_what_it_would_write_under_its_task_alone():
    """The noise of a row does not depend on other rows' predictions, so this holds for drawn text too."""
    model = make_gpt()
    tasks, idx = make_tasks(model), make_idx(model, 1)[:, :5].expand(len(IDS), -1)
    attach(model, stack(tasks))
    for temperature in (0, 1.0):
        settings = {"max_new_tokens": 20, "temperature": temperature, "top_k": 50}
        mixed = model.generate(idx, tasks=IDS, generator=torch.Generator().manual_seed(0), **settings)
        for i, task in enumerate(IDS):
            ids = torch.full_like(IDS, task)
            alone = model.generate(idx, tasks=ids, generator=torch.Generator().manual_seed(0), **settings)
            assert torch.equal(mixed[i], alone[i])
        assert len({tuple(row.tolist()) for row in mixed}) >= 4


def test_stacking_what_does_not_belong_together_is_refused():
    model, other, deeper = make_gpt(), make_gpt(seed=1), make_gpt(n_layer=3)
    task = make_ia3(model)
    for wrong in ([], [None], [task, make_ia3(other)], [task, make_ia3(deeper)], [task, stack([task])]):
        with pytest.raises(ValueError, match="all for one base"):
            stack(wrong)
    with pytest.raises(ValueError, match="another base"):
        attach(other, stack([task, task]))


@pytest.mark.parametrize(
    "ids, message",
    [
        ([0, 1, 2], "from 0 to 1"),
        ([0, -1, 0], "from 0 to 1"),
        ([0.0, 1.0, 0.0], "must be long"),
        ([True, False, True], "must be long"),
        ([0, 1], "one id a row"),
        ([0], "one id a row"),  # would broadcast
        (0, "one id a row"),
        ([[0], [1], [0]], "one id a row"),
        (None, "want tasks"),
    ],
)
def test_task_ids_that_do_not_fit_are_refused(ids, message):
    model = make_gpt()
    attach(model, stack([make_ia3(model), None]))
    ids = None if ids is None else torch.tensor(ids)
    for call in (lambda: model(make_idx(model), tasks=ids), lambda: model.generate(make_idx(model), 1, tasks=ids)):
        with pytest.raises(ValueError, match=message):
            call()


def test_tasks_without_stacked_vectors_are_refused():
    model = make_gpt()
    idx, ids = make_idx(model), torch.tensor([0, 0, 0])
    with pytest.raises(ValueError, match="no vectors"):
        model(idx, tasks=ids)
    make_ia3(model)
    with pytest.raises(ValueError, match="vectors of one task want none"):
        model(idx, tasks=ids)


@pytest.mark.parametrize(
    "paths, names",
    [
        (["data/folio.npz", "data/kjv.npz"], ["folio", "kjv"]),
        (["out/folio/ia3.npz", "out/kjv/ia3.npz"], ["folio", "kjv"]),
        (["out/a/ia3.npz", "data/b.npz"], ["out/a/ia3", "data/b"]),
        (["a/1.npz", "a/b/1.npz"], ["1", "b/1"]),
        (["a.npz", "a.npz"], ["a", "a"]),
    ],
)
def test_columns_have_short_names_that_tell_them_apart(paths, names):
    assert sample.short_names(paths) == names


def test_sample_prints_three_tasks_side_by_side_and_refuses_another_bases(tiny_run, capsys):
    folder, _ = tiny_run
    (folder / "run").mkdir()
    for seed, name in enumerate(("folio", "sonnets", "kjv")):
        make_ia3(make_gpt(), seed).save(folder / f"run/{name}.npz")
    make_ia3(make_gpt(seed=1)).save(folder / "run/other.npz")
    flags = f"--base {folder}/base.pt --prompt A --tokens 5 --device cpu --ia3 {folder}/run/folio.npz".split()
    assert sample.main([*flags, f"{folder}/run/sonnets.npz", f"{folder}/run/kjv.npz"]) == 0
    assert capsys.readouterr().out.split("\n")[0].split() == ["folio", "sonnets", "kjv"]
    assert sample.main([*flags, f"{folder}/run/other.npz"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "another base" in err


INSTRUCTIONS = [
    {"prompt": "Modern: I have seen it.\nFolio: ", "completion": "I haue seene it."},
    {"prompt": "Modern: Go up.\nFolio: ", "completion": "Goe vp."},
    {"prompt": "Modern: He is kind to us.\nFolio: ", "completion": "Hee is kinde to vs."},
]


def read_instructions(folder, rows):
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train.datasets.load(folder, "bytes", 257, 64)["train"]


def test_prompt_targets_carry_no_loss_but_the_prompt_counts(tmp_path):
    """In float64, whose rounding is below 1e-12 of a loss of about 6 nats."""
    model = make_gpt(block_size=64).double()
    split = read_instructions(tmp_path, INSTRUCTIONS)
    x, y = split.windows([0])
    n_prompt = len(INSTRUCTIONS[0]["prompt"])
    assert (y[0, : n_prompt - 1] == -1).all() and bytes(y[0, n_prompt - 1 :].tolist()).decode() == "I haue seene it."
    loss = model(x, y)[1]
    log_p = model(x)[0].log_softmax(-1)[0, n_prompt - 1 :]
    assert torch.allclose(loss, -log_p.gather(1, y[0, n_prompt - 1 :, None]).mean(), rtol=1e-12)
    edited = x.clone()
    edited[0, 3] = ord("X")  # a prompt token: no target of its own, but context
    assert (model(edited, y)[1] - loss).abs() > 1e-6


def test_padding_changes_nothing(tmp_path):
    """The batch's loss is the mean over all completion tokens, as if each example were read alone. Float64."""
    model = make_gpt(block_size=64).double()
    split = read_instructions(tmp_path, INSTRUCTIONS)
    x, y = split.windows([0, 1, 2])
    alone = [split.windows([i]) for i in range(3)]
    n = torch.tensor([(t >= 0).sum() for _, t in alone])
    losses = torch.stack([model(*pair)[1] for pair in alone])
    assert len({t.size(1) for _, t in alone}) == 3
    assert torch.allclose(model(x, y)[1], (losses * n).sum() / n.sum(), rtol=1e-12)
    other = x.clone()
    other[1, alone[1][0].size(1) :] = 7  # what stands in the padding
    assert not torch.equal(other, x)
    assert torch.allclose(model(other, y)[1], model(x, y)[1], rtol=1e-12)


def test_training_on_instructions_lowers_the_completions_loss(tmp_path):
    read_instructions(tmp_path / "text", INSTRUCTIONS)
    make_gpt(block_size=64).save(tmp_path / "base.pt")
    flags = f"--init {tmp_path}/base.pt --data {tmp_path}/text --out {tmp_path}/run --steps 20 --batch-size 3"
    assert train.main([*flags.split(), "--device", "cpu"]) == 0
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()[1:]
    assert float(rows[-1].split(",")[2]) < float(rows[0].split(",")[2])
