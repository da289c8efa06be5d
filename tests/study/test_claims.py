import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from vitlab.study import claims, published
from vitlab.study.claims import Verdict, get, load, projects, select, settle, summary, table

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
        assert settle(claim, [claim.value + 0.9 * worst], as_published=True).status == "confirmed"


def test_ids_notebooks_and_sources():
    ids = [c.id for c in load()]
    assert len(set(ids)) == len(ids)
    for claim in load():
        baseline = claim.model == "baseline" or claim.id.startswith("S0/dense/")
        here = {"S0": "02", "S1": "03", "S2": "04", "S3": "05", "S4": "06"}[claim.project]
        if claim.id not in ("S4/baseline/complexity", "S4/baseline/training-speed-up"):
            assert claim.notebook == ("01" if baseline else here), claim.id
    assert {c.source for c in select(project="S4", metric=("parameters", "macs"))} == {"verified"}
    assert {c.source for c in select(project="S2", model="baseline")} == {"published"}
    assert get("S2/baseline/accuracy").conditions["epochs"] == 100
    assert get("S4/ripple/tiny-imagenet-accuracy").conditions["dataset"] == "tiny-imagenet"
    assert list(projects()) == ["S0", "S1", "S2", "S3", "S4"] and projects()["S3"]["name"] == "Token pruning"
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
        settle("S2/nobody/accuracy", [1.0], as_published=True)


# ---------------------------------------------------------------- verdicts

ACCURACY = "S2/baseline/accuracy"  # 78.33 %, band of 0.7833


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ([78.2, 78.4, 78.5], "confirmed"),
        ([77.0, 78.4, 79.8], "within noise"),  # centred, but too noisy to say more
        ([77.3, 77.6, 77.5], "within noise"),  # the interval crosses the edge of the band
        ([75.0, 75.3, 75.1], "refuted"),
        ([81.0, 81.2, 81.1], "exceeded"),
        ([78.33], "within noise"),  # one run does not confirm an accuracy
        ([76.60], "within noise"),  # 1.73 away; band + 1.96 x 0.5 = 1.76
        ([76.50], "refuted"),
        ([80.20], "exceeded"),
        ([60.0, 80.0], "within noise"),  # two seeds far apart
    ],
)
def test_accuracy_with_seed_noise(values, status):
    assert settle(ACCURACY, values, as_published=True).status == status
    assert settle(ACCURACY, values, as_published=False).status == "not comparable"


def test_margin_is_the_t_interval_of_the_mean():
    values = [78.2, 78.9, 78.4, 78.0]
    verdict = settle(ACCURACY, values, as_published=True)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    ends = (verdict.mean - verdict.margin, verdict.mean + verdict.margin)
    assert ends == pytest.approx((low, high), rel=1e-4)
    assert verdict.std == pytest.approx(np.std(values, ddof=1))
    for degrees in (*range(1, 31), 60, 1000):
        assert claims._t(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-3)


def test_structural_claims_are_judged_to_the_printed_digits_at_any_scale():
    for published_ in (True, False):
        verdict = settle("S0/sparse/parameters", [2.857396], as_published=published_)
        assert verdict.status == "confirmed" and verdict.margin == 0
    assert settle("S0/sparse/parameters", 2.85, as_published=False).status == "refuted"
    assert settle("S0/dense/macs", 1253.5, as_published=False).status == "refuted"
    fewer = settle("S0/dense/macs", 800.0, as_published=False)
    assert fewer.status == "refuted"  # a count is right or wrong, never "exceeded"
    for exact in ("S0/dense-6/true-parameters", "S0/sparse/true-parameters"):
        assert settle(exact, get(exact).value + 1e-6, as_published=False).status == "refuted"
    at_edge = get("S3/baseline/parameters")
    assert settle(at_edge, 25.35, as_published=False).status == "confirmed"
    # which channels survive is learned, so the size of a pruned model needs the published training
    assert settle("S2/pruned-40/parameters", 5.0, as_published=False).status == "not comparable"
    assert settle("S2/pruned-40/parameters", 5.0, as_published=True).status == "refuted"


def test_absolute_speed_memory_and_power_are_never_judged():
    absolute = [c for c in load() if c.unit in ("ms", "s", "min", "samples/s", "W")]
    absolute += [c for c in load() if c.metric == "memory"]
    assert len(absolute) > 20
    for claim in absolute:
        verdict = settle(claim, [claim.value, claim.value * 1.01], as_published=True)
        assert verdict.status == "not comparable" and verdict.mean, claim.id
        assert "hardware" in verdict.reason


@pytest.mark.parametrize(
    ("key", "value", "status"),
    [
        ("S3/pruned-alpha-1.2/speed-up", 1.85, "confirmed"),
        ("S3/pruned-alpha-1.2/speed-up", 1.3, "refuted"),
        ("S3/pruned-alpha-1.2/speed-up", 2.6, "exceeded"),
        ("S3/pruned-alpha-1.2/accuracy-drop", 0.0, "within noise"),
        ("S3/pruned-alpha-1.2/accuracy-drop", -2.0, "exceeded"),  # lower is better
        ("S3/pruned-alpha-1.2/accuracy-drop", 4.0, "refuted"),
        ("S1/favit/memory-saved", 98.2, "confirmed"),
        ("S1/favit/memory-saved", 60.0, "refuted"),
        ("S2/pruned-40/latency-change", -30.0, "exceeded"),
        ("S2/pruned-40/latency-change", 0.0, "refuted"),
        ("S2/pruned-40/power-change", -19.9, "confirmed"),
        ("S4/kernel/kernel-speed-up", 4.0, "exceeded"),
    ],
)
def test_quotients_are_judged_only_at_the_published_scale(key, value, status):
    assert settle(key, value, as_published=True).status == status
    assert settle(key, value, as_published=False, why="dim 64").reason == "dim 64"
    assert settle(key, value, as_published=False).status == "not comparable"


def test_lists_words_and_statements():
    tokens = get("S3/alpha-1.0/tokens")
    good, bad = [134, 114, 88, 61, 38, 21, 10, 4], [134, 114, 88, 61, 38, 21, 10, 5]
    assert settle(tokens, good, as_published=False).status == "confirmed"
    assert settle(tokens, [good, good], as_published=False).values == (tuple(good),) * 2
    assert settle(tokens, torch.tensor(good), as_published=False).status == "confirmed"
    assert settle(tokens, [bad], as_published=False).status == "refuted"
    assert settle("S4/baseline/complexity", "O(n ^ 2)", as_published=False).status == "confirmed"
    assert settle("S4/ripple/complexity", ["O(n^2)"], as_published=False).status == "refuted"
    for key in ("S1/favit/49-neighbours", "S4/ripple/3-stages-best"):
        assert settle(key, True, as_published=True).status == "confirmed"
        assert settle(key, [False, np.bool_(False)], as_published=True).status == "refuted"
        assert settle(key, [True, False, True], as_published=True).status == "within noise"
    # what a mechanism does shows at any scale, which of two is more accurate does not
    assert settle("S1/favit/49-neighbours", False, as_published=False).status == "refuted"
    assert settle("S4/ripple/3-stages-best", False, as_published=False).status == "not comparable"


@pytest.mark.parametrize("nothing", [None, [], (), np.array([])])
def test_nothing_measured_is_pending(nothing):
    for claim in load():
        verdict = settle(claim, nothing, as_published=True, why="no sensor")
        assert (verdict.status, verdict.reason, verdict.mean) == ("pending", "no sensor", None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "78", True, None])
def test_what_is_not_a_finite_number_is_refused(value):
    for as_published in (True, False):
        with pytest.raises(ValueError, match=ACCURACY):
            settle(ACCURACY, [78.0, value], as_published=as_published)
    with pytest.raises(ValueError, match="49-neighbours"):
        settle("S1/favit/49-neighbours", [0.5], as_published=True)


def test_units_from_raw_measurements():
    assert get("S0/dense/macs").in_unit(1_253_500_000) == pytest.approx(1253.5)
    assert get("S2/baseline/macs").in_unit(620_000_000) == pytest.approx(0.62)
    assert get("S2/baseline/latency").in_unit(0.00217) == pytest.approx(2.17)
    assert get("S2/baseline/accuracy").in_unit(0.7833) == pytest.approx(78.33)
    assert get("S2/baseline/throughput").in_unit(461.39) == 461.39


def test_verdicts_survive_json():
    samples = [
        settle(ACCURACY, np.array([78.0, 78.5], dtype=np.float32), as_published=True),
        settle(ACCURACY, [torch.tensor(78.0)], as_published=False, why="3 epochs"),
        settle("S3/alpha-1.0/tokens", [[134, 114]], as_published=False),
        settle("S1/favit/beats-plain-vit", [True, False], as_published=True),
        settle("S4/ripple/complexity", "O(n)", as_published=True),
        settle(ACCURACY, None, as_published=True),
    ]
    for verdict in samples:
        assert Verdict.from_row(json.loads(json.dumps(verdict.to_row(), allow_nan=False))) == verdict
    row = samples[0].to_row()
    with pytest.raises(ValueError, match="colour"):
        Verdict.from_row(row | {"colour": 1})
    with pytest.raises(ValueError, match="status"):
        Verdict.from_row({"claim": ACCURACY})
    with pytest.raises(ValueError, match="'proven'"):
        Verdict.from_row(row | {"status": "proven"})


def test_table_and_summary():
    chosen = select(project="S0", model="sparse", source="published")
    verdicts = [
        settle("S0/sparse/accuracy", [55.0, 55.4, 55.2], as_published=True),
        settle("S0/sparse/accuracy", [40.0], as_published=False, why="1 epoch instead of 3"),
        settle("S0/sparse/parameters", [2.857396], as_published=False),
        settle("S0/sparse/gumbel-top-k", False, as_published=False),
        settle("S2/baseline/accuracy", [78.0], as_published=True),  # belongs to another table
    ]
    frame = table(chosen, iter(verdicts))
    assert list(frame.columns) == ["claimed", "measured", "verdict", "note"]
    assert len(frame) == len(chosen) + 1  # the accuracy was tested twice
    exact, scaled = frame.loc["S0/sparse/accuracy"].itertuples()
    assert (exact.claimed, exact.measured, exact.verdict) == ("53.30 %", "55.20 ± 0.20 % (n = 3)", "exceeded")
    assert (scaled.measured, scaled.verdict) == ("40.00 % (n = 1)", "not comparable")
    assert scaled.note.startswith("1 epoch instead of 3; ")
    assert frame.loc["S0/sparse/parameters", "measured"] == "2.86 M (n = 1)"
    assert frame.loc["S0/sparse/gumbel-top-k", "measured"] == "no (n = 1)"
    pending = frame.loc["S0/sparse/macs"]
    assert "batch-mates" in get("S3/pruned-on/accuracy").note and "class token" in get("S2/baseline/parameters").note
    assert get("S0/dense/parameters").note == ""
    assert (pending.measured, pending.verdict) == ("-", "pending") and "ptflops" in pending.note
    odd = table(
        [get("S3/alpha-1.0/tokens"), get("S2/pruned-20/power-change"), get("S3/pruned-alpha-1.2/speed-up")],
        [
            settle("S3/alpha-1.0/tokens", [134, 114], as_published=True),
            settle("S2/pruned-20/power-change", [1.5], as_published=True),
            settle("S3/pruned-alpha-1.2/speed-up", [1.5, 1.6], as_published=True),
        ],
    )
    assert list(odd["measured"]) == ["134, 114 (n = 1)", "+1.50 % (n = 1)", "1.55 ± 0.07x (n = 2)"]
    assert len(table([], verdicts)) == 0
    sentence = summary([*verdicts, settle("S0/sparse/macs", None, as_published=True)])
    judged = "4 of 6 claims judged: 1 confirmed, 1 refuted, 1 within noise, 1 exceeded"
    assert sentence == f"{judged}; 1 not comparable, 1 pending."
    assert summary([]) == "No claims."
    assert summary(verdicts[2:3]) == "1 of 1 claim judged: 1 confirmed."


# ---------------------------------------------------------------- the file

SOURCE = Path(published.__file__).with_name("claims.toml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dense = [5.53,", "densse = [5.53,", r"unknown model of S0 'densse'; did you mean dense"),
        ('columns = ["masked-accuracy"]', 'columns = ["maskd-accuracy"]', "unknown metric 'maskd-accuracy'"),
        ("sparse = [2.86, 557.31, 53.30]", "sparse = [2.86, 557.31]", "sparse has 2 cells for 3 columns"),
        ('"dense/macs" = ', '"dense/mac" = ', r"notes or the like for no cell: \['dense/mac'\]"),
        ('id = "S1/favit/49-neighbours"', 'id = "S1/favit/beats-plain-vit"', "given twice.*beats-plain-vit"),
        ('id = "S1/favit/macs-saved"', 'id = "S1/favit/macs-saved"\ncolour = 1', "macs-saved.*'colour'"),
        ('better = "higher", kind = "accuracy"', 'better = "more", kind = "accuracy"', "better is 'more'"),
        ('name = "Sparse-ViT"\n', 'name = "Sparse-ViT"\n[projects.S9]\n', "lacks the field 'conditions'"),
        ("9.75, 28.46]", "nan, 28.46]", "finite"),
        ('over = "S3/pruned-on/', 'over = "S3/pruned-onn/', "did you mean S3/pruned-on/evaluation-time"),
        ("value = 98\n", "", "lacks the field 'value'"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, old, new, message):
    assert old in SOURCE
    path = tmp_path / "claims.toml"
    path.write_text(SOURCE.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_claim_refuses_fields_out_of_range():
    claim = get(ACCURACY)
    wrongs = {"id": "S2/accuracy", "kind": "taste", "notebook": "09", "tolerance": -0.1, "value": math.nan}
    for name, wrong in wrongs.items():
        with pytest.raises(ValueError, match=name):
            replace(claim, **{name: wrong})
