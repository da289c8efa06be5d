"""README's numbers, each traced to what it came from, by other arithmetic than that of the code that wrote them."""

import base64
import csv
import json
import re
from pathlib import Path
from statistics import mean, median, pvariance, variance

import pytest
from scipy import stats

from vitlab.run.prose import titled

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = r"\d+(?:\.\d+)?"
# row of the table -> project, number of the notebook, the arm, its control
TRACED = {
    "Sparse-ViT": ("S0", "02", "S0/sparse", "S0/dense-6"),
    "FaViT": ("S1", "03", "S1/B1", "plain ViT"),
    "Structured pruning": ("S2", "04", "S2/pruned-40-kd", "S2/baseline-tuned"),
    "Token pruning": ("S3", "05", "S3/pruned-alpha-1.2", "S3/baseline"),
    "Linear-ViT": ("S4", "06", "S4/ripple", "S4/baseline"),
}


def part(name):
    return README.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]


def table(name):
    """The cells of each line of a table, without its headings."""
    lines = [line for line in part(name).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def stored(notebook):
    """Rows of the best preset that has any: what lies in results/, read as it is."""
    found = {}
    for path in sorted(ROOT.glob(f"results/*/{notebook}*/*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(row.get("accuracy_top1"), float):
            found.setdefault(path.parts[-3], []).append(row)
    return found.get("gpu") or found.get("cpu", [])


def by_hand(rows, arm, control):
    """(change, 95 % margin, times the throughput, seeds) of the arm against its control, as README prints them."""
    mine, other = ({r["seed"]: r for r in rows if r["arm"].replace("-small", "") == name} for name in (arm, control))
    seeds = sorted(set(mine) & set(other))
    if not seeds:
        return None
    apart = [mine[s]["accuracy_top1"] - other[s]["accuracy_top1"] for s in seeds]
    speed = median(mine[s]["images_per_s"] for s in seeds) / median(other[s]["images_per_s"] for s in seeds)
    # two runs of half a point's noise each, with ten degrees of freedom, pooled with the seeds' own spread
    own = (len(apart) - 1) * variance(apart) if len(apart) > 1 else 0.0
    freedom = 10 + len(apart) - 1
    # and the test images, the same for all seeds: the binomial variance of their accuracy, for two models
    right = mean(r["accuracy_top1"] for r in rows) / 100
    images = 2 * 100**2 * right * (1 - right) / min(r["n"] for r in rows)
    if all("right" in r for s in seeds for r in (mine[s], other[s])):  # or by those on which the two disagree
        bits = [[bit for byte in base64.b64decode(r["right"]) for bit in f"{byte:08b}"] for r in
                (of[s] for s in seeds for of in (mine, other))]  # fmt: skip
        n = mine[seeds[0]]["n"]
        of_images = [mean(int(a) - int(b) for a, b in zip(at[::2], at[1::2])) for at in list(zip(*bits))[:n]]
        images = 100**2 * pvariance(of_images) / n
    margin = stats.t.ppf(0.975, freedom) * ((10 * 0.5 + own) / freedom / len(apart) + images) ** 0.5
    margin = min(margin, stats.t.ppf(0.975, 10) * (0.5 + images) ** 0.5)
    unclear = " (unclear)" if abs(mean(apart)) <= margin else ""
    return f"{mean(apart):+.2f}", f"{margin:.2f}", unclear, f"{speed:.2f}", f"{len(apart)}"


@pytest.mark.parametrize("title", TRACED)
def test_what_was_found_is_what_the_rows_give(title):
    _, notebook, arm, control = TRACED[title]
    ((_, _, found, evidence),) = [line for line in table("projects") if line[0].startswith(title)]
    rows = stored(notebook)
    stamps = {row.get("stamp") for row in rows}
    given = [by_hand(r, arm, control) for r in (rows, *([x for x in rows if x.get("stamp") == s] for s in stamps))]
    if found == "nothing yet":
        assert not any(given)
        return
    change = rf"([+-]{NUMBER}) ± ({NUMBER}) points( \(unclear\))?"
    seeds = re.search(r"n = (\d+)", evidence)[1]
    found, *stricter = found.split("; ")
    said = re.fullmatch(rf"{change}, ({NUMBER})x the throughput", found).groups("")
    assert (*said, seeds) in given
    assert len(stricter) == (title == "Linear-ViT")
    for line in stricter:
        *said, other = re.fullmatch(rf"{change}, ({NUMBER})x the throughput against (.+)", line).groups("")
        assert other == "softmax with ripple's convolutions" and (*said, seeds) == by_hand(rows, arm, other)
    own = [row for row in rows if row["arm"].replace("-small", "") == arm]
    sized = {row["as_published"] or " instead of " not in row["changes"] for row in own}
    assert ("published size" in evidence) in sized and ("scaled down" in evidence) != ("published size" in evidence)


def test_what_was_claimed_is_what_was_printed():
    with open(ROOT / "vitlab/study/claims.csv", newline="", encoding="utf-8") as file:
        printed = list(csv.DictReader(file))
    traced = 0
    for title, headline, *_ in table("projects"):
        project = next(p for words, (p, *_) in TRACED.items() if title.startswith(words))
        known = {word for row in printed if row["project"] == project for word in (row["value"], row["model"][-2:])}
        for number in re.findall(NUMBER, headline):
            assert number in known, f"{title}: {number}"
            traced += 1
    assert traced >= 10


def test_the_rows_behind_the_picture_are_those_on_it():
    said = re.search(r"(\d+) of the (\d+) rows behind it", part("hero"))
    if said:
        preset = re.search(r"figures/(\w+)/", part("hero"))[1]
        rows = [r for n in ("01", "02", "03", "04", "05", "06") for r in stored(n) if r["preset"] == preset]
        assert int(said[1]) <= int(said[2]) == len(rows)


def test_findings_are_sentences_that_a_notebook_wrote():
    wrote = [titled(c["text"]) for path in ROOT.glob("results/*/*/conclusions.json")
             for c in json.loads(path.read_text(encoding="utf-8"))["conclusions"]]  # fmt: skip
    for line in re.findall(r"^- (.+?)(?: \*\(made .+\)\*)?$", part("findings"), flags=re.M):
        assert line in wrote


def test_dates_and_devices_are_those_of_the_executed_notebooks():
    for name, *cells in table("status"):
        stem = re.search(r"\[(\w+)\]", name)[1]
        for preset, cell in zip(("gpu", "cpu"), cells):
            if date := re.match(r"\d{4}-\d\d-\d\d", cell):
                marks = json.loads((ROOT / f"executed/{preset}/{stem}.ipynb").read_text(encoding="utf-8"))["metadata"]
                assert marks["vitlab"]["finished"].startswith(date[0]) and marks["vitlab"]["device"] in cell
