"""The README's discussion says what rows say: differences worked out by hand, nothing where rows are missing."""

import pytest

from vitlab.run import discussion
from vitlab.utils.files import write_json


def arms(root, notebook, accuracies, **extra):
    for name, value in accuracies.items():
        row = {"arm": name, "dataset": "cifar10", "seed": 0, "accuracy_top1": value, "macs": 2e6, "latency_ms": 1.0}
        write_json(root / "results" / "cpu" / notebook / f"{name.replace('/', '-')}.json", row | extra.get(name, {}))


def tell(root, notebook):
    return discussion.discuss(root, {notebook: "cpu"})


def test_pruning_tells_the_epochs_from_the_teacher(tmp_path):
    accuracies = {"S2/baseline": 70.0, "S2/pruned-20": 60.0, "S2/pruned-40": 40.0, "S2/pruned-40-tuned": 68.0,
                  "S2/pruned-40-kd": 69.0, "S2/baseline-tuned": 71.0, "S2/pruned-40-even": 10.0}  # fmt: skip
    arms(tmp_path, "04_x", accuracies, **{
        "S2/pruned-40": {"macs": 1e6, "latency_ms": 0.8}, "S2/pruned-40-even": {"latency_ms": 0.5}})  # fmt: skip
    text = tell(tmp_path, "04_x")
    assert "the cut itself moves accuracy by -30.00 points" in text
    assert "gives +28.00 back (-3.00 from the uncut model" in text
    assert "+1.00 points (within the noise of two runs)" in text and "was the epochs" in text
    assert "2.00 times fewer MACs one image is 1.25x as fast, with heads of equal width 2.00x." in text
    assert "80.67 %" in text and "78.33 %" in text, "the published figures stand beside"
    assert "small student" not in text and "Our own baseline" not in text, "there are no such rows"
    arms(tmp_path, "04_x", {"ours": 80.0, "ours/control": 78.0, "ours/random": 75.0, "ours/kd-cnn": 79.5,
                            "ours/uncut": 82.0})  # fmt: skip
    text = tell(tmp_path, "04_x")
    assert "reaches 78.00 %, with random channels 75.00" in text
    assert "uncut it had 80.00 and, trained on as long, reaches 82.00" in text
    assert "*kd-cnn*, +1.50 points against the first" in text


def test_tokens_name_the_loser_and_the_factor(tmp_path):
    arms(tmp_path, "05_x", {"S3/baseline": 60.0, "S3/baseline-on": 55.0, "S3/pruned-on": 58.0, "ours": 80.0,
                            "ours, Ward at the edge": 79.75, "ours, ToMe at 1.85x": 78.0,
                            "ours, Ward, calibrated at 1.85x": 79.5})  # fmt: skip
    kl = {"attention": 0.5, "random": 0.4, "ToMe": 0.3, "Ward": 0.1, "Ward with calibrated counts": 0.09}
    rivals = [{"at": at, "rival": rival, "lost": 10 * kl[k], "kl": kl[k] if at == 0.5 else 0.0}
              for at in (0.8, 0.5) for k, rival in discussion.RIVALS.items()]  # fmt: skip
    folder = tmp_path / "results" / "cpu" / "05_x"
    write_json(folder / "rivals-ours.json", {"rivals": rivals})
    speed = [{"rival": "Ward at the edge", "limit": 1.5, "measured": m, "batch": b} for m, b in ((0.9, 1), (1.4, 64))]
    write_json(folder / "speed-ours.json", {"speed": speed, "device": "a CPU"})
    payoff = [{"batch": 1, "speed_up": 0.9, "lost": 0.0}, {"batch": 64, "speed_up": 1.2, "lost": 0.1},
              {"batch": 64, "speed_up": 1.4, "lost": 0.4}, {"batch": 64, "speed_up": 1.9, "lost": 0.6},
              {"batch": 64, "speed_up": None, "lost": None}]  # fmt: skip
    write_json(folder / "payoff-ours.json", {"payoff": payoff, "device": "a CPU"})
    text = tell(tmp_path, "05_x")
    assert "buys our convolutional ViT at batch 1 within 0.5 points: nothing." in text
    assert "batch 64 within 0.5 points: 1.40x for +0.40 points lost on validation." in text
    assert "moves the plain model by -5.00 points" in text and "is at -2.00" in text
    assert "1.85x by the operations, nothing retrained, our convolutional ViT loses on all test images (points): " \
           "ToMe +2.00; Ward, calibrated +0.50." in text  # fmt: skip
    assert "at 50 % of the MACs" in text and "worse than dropping at random" in text
    assert "3.0 times smaller than ToMe's" in text
    assert "by -0.25 points on test and promises 1.50x" in text and "0.90x at batch 1, 1.40x at batch 64" in text


def test_linear_says_where_it_pays_or_that_it_does_not(tmp_path):
    arms(tmp_path, "06_x", {"S4/baseline": 10.0, "S4/ripple": 13.0, "softmax at ripple's MACs": 12.5})
    folder = tmp_path / "results" / "cpu" / "06_x"
    crossover = {"training": {"linear": 236, "hydra": None}}
    write_json(folder / "scaling.json", {"found": {"crossover n": crossover}, "device": "a CPU"})
    write_json(folder / "training-speed.json", {"ratio": {"S4/baseline": 1.0, "S4/ripple": 0.5}})
    text = tell(tmp_path, "06_x")
    assert "linear from 236 tokens, hydra not at all" in text and "ripple 0.50x the baseline's speed" in text
    assert "ripple +3.00 points against the baseline and +0.50 points (within the noise" in text
    assert "85.3 %" in text


@pytest.mark.parametrize("notebook", ["01_x", "04_x", "05_x", "06_x", "09_x"])
def test_without_rows_nothing_is_said(tmp_path, notebook):
    assert tell(tmp_path, notebook).startswith("Nothing yet")
