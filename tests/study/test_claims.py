"""The published claims: every printed figure is one, with its digits, and mistakes in the file are named."""

import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from vitlab.study import claims
from vitlab.study.claims import PROJECTS, get, load, select

# The published tables once more, as printed; a dash is an empty cell.
PRINTED = {
    "S0": """
              parameters macs   accuracy
        dense  5.53      912.7  50.21
        sparse 2.86      557.31 53.30""",
    "S1": """
           parameters macs accuracy
        B0  3.17      -    -
        B1 12.45      2.35 86.16
        B2 24.41      -    -
        B3 47.99      -    96""",
    "S2": """
                     accuracy latency throughput size  memory  macs parameters power
        baseline     78.33    2.17    461.39     39.20 1546.10 0.62 9.75       28.46
        pruned-20    71.50    1.99    501.33     34.15 1546.28 0.54 8.50       26.83
        pruned-30    70.93    1.95    511.57     31.49 1559.09 0.49 7.83       25.18
        pruned-40    69.25    1.94    516.20     28.24 1625.50 0.44 7.02       22.68
        pruned-40-kd 80.67    1.88    531.63     28.27 1627.34 0.44 7.02       18.94
        tiny-kd      77.64    1.32    755.03     6.75  1290.65 0.10 1.66       7.82""",
    "S3": """
                           accuracy best-accuracy evaluation-time training-time training-time-saved speed-up
        baseline           71.68    -             38.12           59.45         -                   -
        trained-pruned     69.97    70.26         -               43.43         27                  -
        pruned-off         70.79    -             39.33           -             -                   -
        pruned-on          70.65    -             27.71           -             -                   =
        baseline-on        71.68    -             27.98           -             -                   =
        baseline-alpha-1.5 71.80    -             26.93           -             -                   1.8
        pruned-alpha-1.2   70.78    -             20.66           -             -                   1.85""",
    "S4": """
                 cifar100-accuracy tiny-imagenet-accuracy training-speed-up parameters macs
        baseline 72.3              65.2                   1.0               21.36      1.423
        ripple   85.3              75.2                   2.1               21.67      1.487
        hydra    84.8              74.6                   2.0               33.97      2.583""",
}
OTHERS = {
    "S0/dense/true-macs": 1253.5,
    "S0/dense-6/true-macs": 641.2,
    "S0/sparse/true-macs": 686,
    "S0/dense-6/true-parameters": 2.857162,
    "S0/sparse/true-parameters": 2.857396,
    "S1/favit/memory-saved": 98,
    "S1/favit/top-queries": (40, 33, 26, 19),
    "S1/B1/branch-channels": (8, 28, 28),
    "S1/favit/macs-saved": 0.33,
    "S1/favit/key-memory-ratio": 4,
    "S2/baseline/input-tokens": 65,
    "S2/pruned-20/masked-accuracy": 79.23,
    "S2/pruned-30/masked-accuracy": 77.96,
    "S2/pruned-40/masked-accuracy": 75.85,
    "S3/pruned-alpha-1.2/accuracy-drop": 0.90,
    "S3/pruned-alpha-1.2/last-tokens": 5,
    "S3/baseline-alpha-1.5/own-speed-up": 1.42,
    "S3/baseline/parameters": 25.3,
    "S3/baseline/macs": 3.82,
    "S3/baseline/input-tokens": 145,
    "S3/alpha-2.0/tokens": (143, 137, 125, 106, 81, 54, 29, 12),
    "S3/alpha-1.5/tokens": (141, 130, 112, 88, 62, 38, 19, 8),
    "S3/alpha-1.2/tokens": (137, 121, 98, 72, 47, 27, 13, 5),
    "S3/alpha-1.0/tokens": (134, 114, 88, 61, 38, 21, 10, 4),
    "S4/baseline/complexity": "O(n^2)",
    "S4/ripple/complexity": "O(n)",
    "S4/hydra/complexity": "O(n)",
    "S4/kernel-before/kernel-time": 12.5,
    "S4/kernel/kernel-time": 6.2,
    "S4/kernel/kernel-speed-up": 2.02,
    "S4/kernel/training-speed-up": 2,
}
STATEMENTS = (
    "Gumbel",
    "head importance",
    "progressive",
    "higher accuracy",
    "49 neighbours",
    "beats a plain ViT",
    "3 are best",
    "4 are best",
    "by 30 % better than by 40 %",
    "set to zero better than the same channels cut out",
    "a smaller alpha better than 2.0",
    "Ripple better than Hydra",
)


def cells(project):
    head, *lines = PRINTED[project].strip().splitlines()
    for line in lines:
        model, *row = line.split()
        for metric, text in zip(head.split(), row, strict=True):
            if text not in ("-", "="):  # "=" is a quotient that the file derives
                yield f"{project}/{model}/{metric}", text


@pytest.mark.parametrize("project", PRINTED)
def test_every_printed_cell_is_a_claim_with_its_digits(project):
    for key, text in cells(project):
        claim = get(key)
        assert claim.value == float(text), key
        assert claim.digits == len(text.partition(".")[2]), key


def test_figures_outside_the_tables():
    for key, value in OTHERS.items():
        assert get(key).value == value, key
    statements = [c.text for c in select(kind="qualitative")]
    assert len(statements) == len(STATEMENTS)
    for words in STATEMENTS:
        assert sum(words in s for s in statements) == 1, words


def test_nothing_is_claimed_that_this_file_does_not_list():
    listed = {key for project in PRINTED for key, _ in cells(project)} | set(OTHERS)
    listed |= {"S1/favit/reduced-keys", "S1/favit/stage-tokens"}
    assert listed == {c.id for c in load() if not c.derived_from and c.kind != "qualitative"}


def test_an_order_is_that_of_its_figures():
    orders = {c.id: [get(key) for key in c.derived_from] for c in load() if c.derived_from and c.value is True}
    assert set(orders) == {"S2/pruned/accuracy-order", "S2/pruned/masked-above-exported", "S3/alpha/accuracy-order",
                           "S4/ripple/above-hydra"}  # fmt: skip
    values = {key: [c.value for c in figures] for key, figures in orders.items()}
    for key in ("S2/pruned/accuracy-order", "S4/ripple/above-hydra"):
        assert values[key] == sorted(values[key], reverse=True)
    alpha, masked = values["S3/alpha/accuracy-order"], values["S2/pruned/masked-above-exported"]
    assert alpha[0] > alpha[1] and alpha[2] > alpha[3]
    assert all(zero > cut for zero, cut in zip(masked[:3], masked[3:], strict=True))
    assert get("S2/pruned/masked-above-exported").source == "verified" and get("S4/ripple/above-hydra").unrun


def test_changes_from_the_baseline():
    base = {k.split("/")[2]: float(v) for k, v in cells("S2") if "/baseline/" in k}
    others = [(k, float(v)) for k, v in cells("S2") if "/baseline/" not in k]
    assert len(others) == 40
    for key, value in others:
        change, metric = get(f"{key}-change"), key.split("/")[2]
        assert change.value == pytest.approx((value - base[metric]) / base[metric] * 100)
        assert change.unit == "%" and change.derived_from == (key, f"S2/baseline/{metric}")
    assert get("S2/pruned-20/accuracy-change").text == "-8.72 %"
    assert get("S2/tiny-kd/throughput-change").text == "+63.64 %"
    assert get("S3/baseline-on/speed-up").value == pytest.approx(38.12 / 27.98)
    assert get("S3/pruned-on/speed-up").value == pytest.approx(39.33 / 27.71)


def test_rounding_of_a_change_covers_whatever_the_printed_digits_hide():
    for key in ("S2/tiny-kd/parameters-change", "S2/tiny-kd/macs-change"):
        claim = get(key)
        of, over = (get(k) for k in claim.derived_from)
        corners = [
            100 * ((of.value + a * of.rounding) / (over.value + b * over.rounding) - 1)
            for a in (-1, 1)
            for b in (-1, 1)
        ]
        worst = max(abs(c - claim.value) for c in corners)
        assert worst == pytest.approx(claim.rounding, rel=0.01)
        assert 0.9 * worst <= claim.slack


def test_ids_notebooks_and_sources():
    ids = [c.id for c in load()]
    assert len(set(ids)) == len(ids)
    for claim in load():
        # notebook 02 trains the dense model as published, 01 counts it
        baseline = claim.model == "baseline" or (claim.id.startswith("S0/dense/") and claim.kind == "structural")
        here = {"S0": "02", "S1": "03", "S2": "04", "S3": "05", "S4": "06"}[claim.project]
        if claim.id not in ("S4/baseline/complexity", "S4/baseline/training-speed-up"):
            assert claim.notebook == ("01" if baseline else here), claim.id
    assert {c.source for c in select(project="S4", metric=("parameters", "macs"))} == {"verified"}
    assert {c.source for c in select(project="S2", model="baseline")} == {"published"}
    assert "epochs=100" in get("S2/baseline/accuracy").condition
    assert "dataset=tiny-imagenet" in get("S4/ripple/tiny-imagenet-accuracy").condition
    assert list(PROJECTS) == ["S0", "S1", "S2", "S3", "S4"] and PROJECTS["S3"].startswith("Token pruning")
    assert {c.project for c in load()} == set(PROJECTS)
    with pytest.raises(FrozenInstanceError):
        load()[0].value = 1.0
    assert len(set(load())) == len(ids)  # hashable


def test_select_and_get_name_what_is_near():
    assert {c.metric for c in select(project="S0", model="dense", source="published")} == {
        "parameters",
        "macs",
        "accuracy",
    }
    assert select(project="S0", notebook="04") == ()
    both = select(project=("S0", "S1"))
    assert set(both) == set(select(project="S0")) | set(select(project="S1"))
    assert select(claims=both, kind="accuracy") == tuple(c for c in both if c.kind == "accuracy")
    assert select(notebook="01", claims=[]) == ()
    with pytest.raises(ValueError, match=r"unknown claim 'S2/baseline/acuracy'.*S2/baseline/accuracy"):
        get("S2/baseline/acuracy")
    with pytest.raises(ValueError, match=r"acuracy.*did you mean.*accuracy"):
        select(metric="acuracy")
    with pytest.raises(ValueError, match=r"by 'notbook'; did you mean notebook"):
        select(notbook="01")
    with pytest.raises(ValueError, match="S2/nobody/accuracy"):
        get("S2/nobody/accuracy")


def test_units_from_raw_measurements():
    assert get("S0/dense/macs").in_unit(1_253_500_000) == pytest.approx(1253.5)
    assert get("S2/baseline/macs").in_unit(620_000_000) == pytest.approx(0.62)
    assert get("S2/baseline/latency").in_unit(0.00217) == pytest.approx(2.17)
    assert get("S2/baseline/accuracy").in_unit(0.7833) == pytest.approx(78.33)
    assert get("S2/baseline/throughput").in_unit(461.39) == 461.39


# ---------------------------------------------------------------- the file

SOURCE = Path(claims.__file__).with_name("claims.csv").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("S0,dense,macs,912.7", "S0,dense,parameters,912.7", "S0/dense/parameters: its id is given twice"),
        ("condition,note", "condition,notes", "S0/dense/macs: .*'notes'"),
        (",accuracy,higher,as published", ",accuracy,more,as published", "S0/sparse/accuracy: better is 'more'"),
        (",accuracy,higher,as published", ",taste,higher,as published", "S0/sparse/accuracy: kind is 'taste'"),
        ("S2,baseline,power,28.46", "S2,baseline,power,nan", "S2/baseline/power: .* finite"),
        ("S1,favit,memory-saved,98", "S1,favit,memory-saved,", "S1/favit/memory-saved: it has no value"),
        (" S3/pruned-on/", " S3/pruned-onn/", "S3/pruned-on/speed-up: .* did you mean S3/pruned-on/evaluation-time"),
        ("S0,dense,macs,", "S0,dense model,macs,", "'S0/dense model/macs': an id is project/model/metric"),
        (",0.005,", ",much,", "S0/dense/macs: could not convert .*'much'"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, old, new, message):
    assert old in SOURCE
    path = tmp_path / "claims.csv"
    path.write_text(SOURCE.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_claim_refuses_fields_out_of_range():
    claim = get("S2/baseline/accuracy")
    with pytest.raises(ValueError, match="untestable, and yet judged 'as published'"):
        replace(claim, untestable="no reason")
    wrongs = {"metric": "no/accuracy", "kind": "taste", "notebook": "09", "tolerance": -0.1, "value": math.nan}
    for name, wrong in wrongs.items():
        with pytest.raises(ValueError, match=name):
            replace(claim, **{name: wrong})
