"""Which rows answer a claim, in its unit, and what they are set beside."""

import pandas as pd
import pytest

from vitlab.study.answers import answers, differences
from vitlab.study.claims import get


def rows(**columns):
    frame = pd.DataFrame(columns)
    return frame.assign(seed=frame.get("seed", 0), as_published=frame.get("as_published", True),
                        changes=frame.get("changes", ""), batch=frame.get("batch", 128),
                        device_type=frame.get("device_type", "cuda"))  # fmt: skip


def test_rows_answer_claims_of_their_arm_in_the_claims_unit():
    measured = rows(arm=["S2/baseline"] * 2 + ["S2/pruned-40"] * 2, seed=[0, 1, 0, 1], macs=[620e6] * 2 + [310e6] * 2,
                    accuracy_top1=[80.0, 82.0, 60.0, 61.5], latency_ms=[2.0, 4.0, 1.0, 3.0],
                    power_w=[None] * 4)  # fmt: skip
    assert answers(get("S2/baseline/accuracy"), measured) == ([80.0, 82.0], True, "")
    assert answers(get("S2/baseline/macs"), measured)[0] == [0.62, 0.62]
    assert answers(get("S2/pruned-40/accuracy-change"), measured)[0] == pytest.approx([-25.0, -25.0])
    assert answers(get("S2/pruned-40/latency-change"), measured)[0] == pytest.approx([-50.0, -25.0])
    for absent in ("S2/baseline/power", "S2/baseline/throughput", "S2/pruned-30/accuracy", "S2/pruned-40/power-change"):
        assert answers(get(absent), measured) == ([], False, "not measured in this run"), absent


def test_relative_figures_are_paired_by_seed():
    arms = ["S3/baseline", "S3/baseline", "S3/baseline-on", "S3/baseline-on", "S3/pruned-alpha-1.2"]
    measured = rows(arm=arms, seed=[0, 1, 1, 0, 1], images_per_s=[100.0, 200.0, 300.0, 120.0, 100.0],
                    accuracy_top1=[70.0, 72.0, 0, 0, 70.5])  # fmt: skip
    assert answers(get("S3/baseline-on/speed-up"), measured)[0] == pytest.approx([1.5, 1.2])
    assert answers(get("S3/pruned-alpha-1.2/accuracy-drop"), measured)[0] == pytest.approx([1.5])
    assert answers(get("S3/baseline/evaluation-time"), measured)[0] == [100.0, 50.0]


def test_a_stand_in_answers_but_not_as_published_and_never_for_a_shape():
    small = rows(arm=["S2/baseline-small"], accuracy_top1=[50.0], macs=[1e6], as_published=[False], changes=["dim 64"])
    assert answers(get("S2/baseline/accuracy"), small) == ([50.0], False, "dim 64")
    assert answers(get("S2/baseline/macs"), small)[0] == []
    on = rows(arm=["S4/baseline", "S4/baseline on tiny-imagenet"], accuracy_top1=[70.0, 60.0])
    assert answers(get("S4/baseline/cifar100-accuracy"), on)[0] == [70.0]
    assert answers(get("S4/baseline/tiny-imagenet-accuracy"), on)[0] == [60.0]


def test_speed_does_not_depend_on_training_and_accuracy_does():
    changes = ["epochs 2 instead of 10; lr 0.1 instead of 0.2"] * 2
    measured = rows(arm=["S3/baseline", "S3/pruned-alpha-1.2"], images_per_s=[100.0, 150.0], changes=changes,
                    accuracy_top1=[50.0, 49.0], as_published=[False] * 2)  # fmt: skip
    assert answers(get("S3/pruned-alpha-1.2/speed-up"), measured) == ([1.5], True, "")
    assert answers(get("S3/pruned-alpha-1.2/accuracy-drop"), measured)[1] is False
    assert not answers(get("S3/pruned-alpha-1.2/speed-up"), measured.assign(changes="dim 64 instead of 512"))[1]
    assert not answers(get("S3/pruned-alpha-1.2/speed-up"), measured.assign(changes=""))[1]


def test_a_speed_is_as_published_only_on_that_kind_of_device_and_at_that_batch():
    measured = rows(arm=["S3/baseline", "S3/baseline-on"], images_per_s=[100.0, 150.0], accuracy_top1=[70.0, 69.0])
    assert answers(get("S3/baseline-on/speed-up"), measured) == ([1.5], True, "")
    for other, why in (({"device_type": "cpu"}, "timed on cpu"), ({"batch": 64}, "timed at batch 64")):
        assert answers(get("S3/baseline-on/speed-up"), measured.assign(**other)) == ([1.5], False, why)
        assert answers(get("S3/baseline-on/accuracy"), measured.assign(**other))[1:] == (True, "")
    untold = measured.drop(columns=["device_type", "batch"])
    assert answers(get("S3/baseline-on/speed-up"), untold)[1] is False
    pruned = rows(arm=["S2/baseline", "S2/pruned-40"], images_per_s=[100.0, 150.0], latency_ms=[2.0, 1.0])
    assert answers(get("S2/pruned-40/latency-change"), pruned)[1:] == (True, "")  # of one image in any row
    assert answers(get("S2/pruned-40/throughput-change"), pruned)[2] == "timed at batch 128"
    assert answers(get("S2/pruned-40/throughput-change"), pruned.assign(batch=1))[1] is True


def test_differences_are_to_the_model_beside_by_seed():
    measured = rows(arm=["S0/dense-small"] * 2 + ["S0/sparse-small"] * 2, seed=[0, 1, 1, 2],
                    accuracy_top1=[50.0, 52.0, 53.0, 60.0])  # fmt: skip
    assert differences(get("S0/sparse/accuracy"), measured) == [1.0]
    assert differences(get("S0/dense/accuracy"), measured) == []
