"""Several processes train as one does: two over gloo against one, and a run that goes on with another number."""

import dataclasses
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_cases import CONFIG, RECIPE

from vitlab import cli
from vitlab.compress.distill import Distill, Features
from vitlab.models import checkpoint
from vitlab.models.vit import ViT
from vitlab.train import loop, parallel
from vitlab.train.loop import cross_entropy, fit
from vitlab.utils import rng

FOLDERS = [Path(__file__).parents[2], Path(__file__).parent]
SHAPE = dataclasses.replace(CONFIG, num_classes=4, dropout=0.0, drop_path=0.0, stem="residual")
SGD = dataclasses.replace(RECIPE, optimizer="sgd", lr=0.05)
TRAIN = shlex.split("""train --dataset tiny --stem residual --dim 16 --depth 1 --heads 2 --mlp-dim 32 --patch-size 8
    --dropout 0 --drop-path 0 --batch 500 --epochs 2 --optimizer sgd --lr 0.05 --dtype float32 --device cpu""")


def cases(data):
    """{name: (weights, losses)} after three epochs; run in one process and in each of two."""

    def trained(recipe, objective=cross_entropy):
        rng.seed_all(1)
        model = ViT(SHAPE)
        history = fit(model, data, recipe, objective=objective, log=None)
        found = dict(model.state_dict())
        return found | {"loss": torch.tensor(history["loss"]), "accuracy": torch.tensor(history["accuracy"])}

    rng.seed_all(2)
    taught = Distill(ViT(SHAPE), terms=[Features((16, 16), 2)])
    found = {"sgd": trained(SGD), "distilled": trained(SGD, taught)}
    found["distilled"]["projector"] = taught.terms[0].projectors[0].weight.detach()
    found["muon"] = trained(dataclasses.replace(RECIPE, optimizer="muon", lr=0.01, rest_lr=0.001, epochs=2))
    return found


def python(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, FOLDERS))}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_train_what_one_does(data, tmp_path):
    torch.save(data, tmp_path / "data.pt")
    python(__file__, tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in each of the two: threads, too, add in another order
    alone = cases(data)
    torch.set_num_threads(threads)
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"{rank}.pt")
        for name, tensors in alone.items():
            # Muon and its NAdamW divide small gradients by their size, which enlarges what rounding did to them
            near = {"atol": 1e-5, "rtol": 1e-4} if name != "muon" else {"atol": 1e-2, "rtol": 1e-2}
            for key, tensor in tensors.items():
                if (name, key) == ("muon", "accuracy"):
                    near = {"atol": 100 / 64 + 1e-4, "rtol": 0}  # an image of 64 may fall to the other side
                torch.testing.assert_close(shared[name][key], tensor, **near, msg=lambda m: f"{name}, {key}: {m}")  # noqa: B023


def test_a_run_of_one_process_goes_on_with_two(tmp_path, monkeypatch):
    one, both = (tmp_path / f"{name}.safetensors" for name in ("one", "both"))
    assert cli.main([*TRAIN, "--checkpoint", str(one)]) == 0
    check = loop._check_deadline

    def spent(history, *rest):
        if len(history) == 1:
            monkeypatch.setenv("VITLAB_DEADLINE", "1")
        check(history, *rest)

    monkeypatch.setattr(loop, "_check_deadline", spent)
    assert cli.main([*TRAIN, "--checkpoint", str(both)]) == 75
    monkeypatch.delenv("VITLAB_DEADLINE")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said = python(*torchrun, "-m", "vitlab", *TRAIN, "--checkpoint", both, "--resume")
    assert said.count("epoch 2/2") == 1 and "epoch 1/2" not in said, "one process speaks"
    alone, shared = (checkpoint.load(path).state_dict() for path in (one, both))
    for name, weight in alone.items():
        torch.testing.assert_close(shared[name], weight, atol=1e-5, rtol=1e-4)
    losses = [[row["loss"] for row in checkpoint.read(path).about["history"]] for path in (one, both)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".logs"}, "no state is left"


def test_what_cannot_be_shared_is_refused(monkeypatch):
    parallel.check(7)
    monkeypatch.setattr(parallel, "ranks", lambda: 2)
    with pytest.raises(ValueError, match="batch=7 cannot be shared out evenly to 2"):
        parallel.check(7)
    monkeypatch.setattr(parallel, "agreed", lambda value: [])
    with pytest.raises(ValueError, match=r"process 1 of 2 .* process 0: run"):
        monkeypatch.setattr(parallel, "rank", lambda: 1)
        parallel.alike([{"epoch": 1}], "run")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = os.fork()  # the other process, in which torch is not imported once more, as torchrun's would
    os.environ |= {"RANK": "0" if child else "1", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with parallel.joined(torch.device("cpu")):
        torch.save(cases(torch.load(folder / "data.pt", weights_only=False)), folder / f"{parallel.rank()}.pt")
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
