"""What a run keeps in its folder: last.pt, from which it is resumed; metrics.csv, its history; and run.json.

load() refuses a damaged last.pt, and one of another run: of other settings, another base, other training data or
other first vectors.
"""

import csv
import hashlib
import json
import os
import platform
import subprocess
from dataclasses import asdict

import numpy as np
import torch

import disk
from ia3 import fingerprint

COLUMNS = ("step", "train_loss", "val_loss", "lr", "tokens_per_second")


class RunFolder:
    """What train() keeps in config.out. Raises ValueError if a run is there, unless config.resume is set.

    trained: {name: parameter}.
    """

    def __init__(self, config, model, data, trained, optimizer):
        self.out = config.out
        self.trained = trained
        self.optimizer = optimizer
        # a run is resumed only under the settings that it was started with, all but these two
        self.settings = {name: value for name, value in asdict(config).items() if name not in ("out", "resume")}
        self.settings |= {"fingerprint": fingerprint(model), "data_hash": data["train"].data_hash()}
        self.settings["first_vectors"] = hash_vectors(trained)  # what --ia3 gave, or ones
        if self.holds_a_run() and not config.resume:
            raise ValueError(f"{self.out} holds a run: resume it, remove it, or choose another folder")

    def holds_a_run(self):
        return os.path.exists(f"{self.out}/last.pt")

    def save(self, step, history, losses):
        state = {
            "step": step,
            "history": history,
            "losses": losses,
            "settings": self.settings,
            "trained": self.trained,
            "optimizer": self.optimizer.state_dict(),
        }
        with disk.replace_file(f"{self.out}/last.pt") as f:
            torch.save(state, f)
        self.write_metrics(history)

    def write_metrics(self, history):
        with disk.replace_file(f"{self.out}/metrics.csv", text=True) as f:
            writer = csv.DictWriter(f, COLUMNS)
            writer.writeheader()
            writer.writerows(history)

    def load(self):
        """Put the trained values and the optimizer's state back. Returns step, history, losses.

        Raises ValueError if last.pt is damaged or another run's.
        """
        path = f"{self.out}/last.pt"
        state = disk.load_file(path)
        try:
            if state["trained"].keys() != self.trained.keys():
                raise ValueError(f"it trained {', '.join(state['trained'])}, not {', '.join(self.trained)}")
            self.check_settings(state["settings"])
            step = state["step"]
            history = [{name: row[name] for name in COLUMNS} for row in state["history"]]
            losses = [float(loss) for loss in state["losses"]]
            if type(step) is not int or not 0 <= step <= self.settings["steps"] or not history:
                raise ValueError(f"its step is {step}, of {self.settings['steps']}, after {len(history)} evaluations")
            for name, p in self.trained.items():
                p.data.copy_(disk.check_weight(state["trained"][name], name, p.shape))
            self.load_optimizer(state["optimizer"]["state"], step)
        except Exception as e:  # a damaged or older file may lack anything
            why = str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
            raise ValueError(f"{path} cannot be resumed: {why[:200]}; remove the folder to start anew") from None
        return step, history, losses

    def check_settings(self, theirs):
        for name, ours in self.settings.items():
            if name not in theirs or theirs[name] != ours:
                what = f"it is another run's: its {name} is {theirs.get(name)}, not {ours}"
                if name == "steps":
                    what += " (to train it further, give its ia3.npz as --ia3, and a new --out)"
                raise ValueError(what)

    def load_optimizer(self, states, step):
        """Put back AdamW's state of every trained tensor, once it is checked. The file's rates are ignored."""
        groups = self.optimizer.state_dict()["param_groups"]
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        n_states = len(params) if step > 0 else 0  # AdamW makes them in its first step, numbered in params' order
        if states.keys() != set(range(n_states)):
            raise ValueError(f"its optimizer has {len(states)} states after {step} steps, for {len(params)} tensors")
        for i, state in states.items():
            if state.keys() != {"step", "exp_avg", "exp_avg_sq"} or float(state["step"]) != step:
                raise ValueError(f"its optimizer's state {i} is not AdamW's after {step} steps")
            for name in ("exp_avg", "exp_avg_sq"):
                disk.check_weight(state[name], f"its optimizer's {name}", params[i].shape)
            if (state["exp_avg_sq"] < 0).any():
                raise ValueError("its optimizer's exp_avg_sq is negative")
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})


def hash_vectors(parameters):
    """SHA-256, in hexadecimal, of the vectors in {name: parameter}. (The fingerprint is of the base alone.)"""
    digest = hashlib.sha256()
    for name, p in parameters.items():
        if name.startswith("ia3."):
            digest.update(p.detach().cpu().numpy())
    return digest.hexdigest()


def write_run_json(path, script, arguments, model, data_hash, figures):
    """Write a run.json: what was run, on what, and what came out, as docs/authors.md describes it.

    arguments, figures: dicts of plain values. data_hash: of the training data, or None. Raises OSError if it cannot be
    written.
    """
    # the commit of our own repository, not of one that holds a copy of these files; with -dirty if a file was changed
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "--git-dir", ".git"]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run([*git, *describe], capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    device = model.lm_head.weight.device
    about = {
        "script": script,
        "arguments": arguments,
        "fingerprint": fingerprint(model),
        "data_hash": data_hash,
        "figures": figures,
        "commit": commit,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "machine": {
            "system": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
        },
    }
    text = json.dumps(about, default=str)
    finite = json.loads(text, parse_constant=lambda _: None)  # JSON has no NaN and no Infinity: they become null
    with disk.replace_file(path, text=True) as f:
        json.dump(finite, f, indent=1)
