"""README, RESULTS.md and CLAIMS.md: what they say of rows, by hand, and of rows from older code."""

import shutil

import pytest
from small_projects import write

from vitlab.run import notebooks, report, runner
from vitlab.utils.files import write_json

STEM = "05_tokens"
README = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("hero", "projects", "findings", "status"))


@pytest.fixture
def study(make):
    """A project with one notebook and its rows: two arms of two seeds, a conclusion, a verdict."""
    project = make({STEM: ["1"]}, cpu={})
    (project.source / "README.md").write_text(README)
    job, = runner.plan(project, "cpu")
    said = {"stamp": job.stamp(project), "device": "a CPU"}
    arms = {"S3/baseline": ((60.0, 62.0), 100.0), "S3/pruned-alpha-1.2-small": ((59.0, 60.0), 150.0)}
    for arm, (accuracies, speed) in arms.items():
        for seed, accuracy in enumerate(accuracies):
            row = {"arm": arm, "dataset": "cifar10", "seed": seed, "accuracy_top1": accuracy, "images_per_s": speed,
                   "n": 10_000, "macs": 2e6, "epochs": 3, "train_s": 60.0, "as_published": False}  # fmt: skip
            put(project, f"{arm.replace('/', '-')}-{seed}", row | said)
    put(project, "conclusions", {"conclusions": [{"about": None, "text": "It costs a point."}]} | said)
    verdict = {"claim": "S3/baseline/input-tokens", "status": "confirmed", "values": [145], "as_published": True}
    put(project, "claims", {"verdicts": [verdict]} | said)
    node = notebooks.nbformat.read(job.notebook.path, 4)
    node.metadata["vitlab"] = {"status": "done", "finished": "2026-11-24T10:00", "rows": 1} | said
    project.executed("cpu").mkdir(parents=True)
    notebooks.nbformat.write(node, project.executed("cpu") / f"{STEM}.ipynb")
    return project


def put(project, name, row):
    write_json(project.root / "results" / "cpu" / STEM / f"{name}.json", row)


def test_what_is_said_is_worked_out_from_rows(study):
    assert list(report.stale(study.source)) == ["README.md", "RESULTS.md", "CLAIMS.md"]
    assert report.refresh(study.source) == ["README.md", "RESULTS.md", "CLAIMS.md"]
    assert report.stale(study.source) == {}
    readme, results, claims = ((study.source / f"{n}.md").read_text() for n in ("README", "RESULTS", "CLAIMS"))
    # -1 and -2 points: (10 x 0.5 + 0.5) / 11 / 2 of the seeds, 2 x 0.6025 x 0.3975 of the images, t's 2.20
    found = "-1.50 ± 1.88 points (unclear), 1.50x the throughput"
    assert f"| 1.85x for 0.90 points | {found} | n = 2, scaled down |" in readme
    assert "| nothing yet | notebook 04 has not run |" in readme
    assert "- It costs a point.\n" in readme and "old" not in readme
    assert f"| [{STEM}](notebooks/{STEM}.ipynb) | never run | 2026-11-24, a CPU |" in readme
    assert "| S3/baseline | cifar10 | 3 | 61.00 ± 1.41 | 2.0 | 100.0 | 1.0 min | 2 |" in results
    assert "| S3/baseline/input-tokens | 145 tokens | 145 tokens (n = 1) | confirmed |" in claims
    assert "older" not in readme + claims and "baseline †" not in results


def test_a_disturbed_seed_does_not_move_a_time_in_the_table(study):
    for seed, speed in enumerate((90.0, 100.0, 20.0)):
        row = {"arm": "S3/late", "dataset": "cifar10", "seed": seed, "accuracy_top1": 50.0, "images_per_s": speed,
               "n": 10_000, "macs": 2e6, "epochs": 3, "device": "a CPU"}  # fmt: skip
        put(study, f"late-{seed}", row)
    line = next(line for line in report.render(study.source)["RESULTS.md"].splitlines() if "| S3/late" in line)
    assert "| 50.00 | 2.0 | 90.0 (20.0 to 100.0) |" in line


def test_rows_of_older_code_are_marked_everywhere(study):
    write(study.source / "notebooks" / f"{STEM}.ipynb", ["1 + 1"])
    texts = report.render(study.source)
    assert f"{STEM}.ipynb) | never run | 2026-11-24, a CPU: made by older code |" in texts["README.md"]
    assert "n = 2, scaled down, made by older code" in texts["README.md"]
    assert "- It costs a point. *(made by older code)*" in texts["README.md"]
    assert "| S3/baseline † |" in texts["RESULTS.md"]
    line = next(line for line in texts["CLAIMS.md"].splitlines() if line.startswith("| S3/baseline/input-tokens"))
    assert "confirmed | made by older code" in line


def test_a_notebook_that_only_reads_has_its_sentences_too(study):
    reader = "07_reader"
    write(study.source / "notebooks" / f"{reader}.ipynb", ["1"], ["05"])
    (study.source / "presets" / "cpu.yaml").write_text(f"{STEM}: {{}}\n{reader}: {{}}\n")
    job, = runner.plan(study, "cpu", [reader])
    said = {"conclusions": [{"about": None, "text": "Tokens first."}], "stamp": job.stamp(study)}
    write_json(study.root / "results" / "cpu" / reader / "conclusions.json", said)
    texts = report.render(study.source)
    assert "- Tokens first.\n" in texts["README.md"] and "- Tokens first.\n" in texts["RESULTS.md"]
    write_json(study.root / "results" / "cpu" / reader / "conclusions.json", said | {"stamp": "older"})
    assert "- Tokens first. *(made by older code)*" in report.render(study.source)["README.md"]


def test_a_finding_that_says_how_sure_it_is_goes_first(study):
    texts = ["It costs a point.", "n = 2.", "It costs 1.50 ± 1.10 points.", "It is 2 ± 1."]
    said = {"conclusions": [{"about": None, "text": text} for text in texts]}
    put(study, "conclusions", said | {"stamp": "older"})
    shown = report.render(study.source)["README.md"]
    lines = [line for line in shown.splitlines() if line.startswith("- ")]
    assert lines == ["- It costs 1.50 ± 1.10 points. *(made by older code)*"], "the first with an interval"


def test_findings_keep_readme_short(study):
    path = study.source / "README.md"
    path.write_text(README + "word " * (report.WORDS - 200))
    put(study, "conclusions", {"conclusions": [{"about": None, "text": "too " * 40}], "stamp": "older"})
    short = report.render(study.source)["README.md"]
    assert "too too" in short
    path.write_text(README + "word " * (report.WORDS - 20))
    assert "too too" not in report.render(study.source)["README.md"]


def test_the_rows_behind_the_picture_are_those_on_it(study):
    put(study, "sweep", {"arm": "layer", "rows": [1, 2], "device": "a CPU", "stamp": "older"})
    (study.root / "figures" / "cpu" / "07_scoreboard").mkdir(parents=True)
    (study.root / "figures" / "cpu" / "07_scoreboard" / "hero.png").touch()
    assert "rows behind it" not in report.render(study.source)["README.md"]
    write(study.source / "notebooks" / f"{STEM}.ipynb", ["1 + 1"])
    assert "\n4 of the 4 rows behind it were made by older code.\n" in report.render(study.source)["README.md"]


def test_without_rows_there_are_no_findings(study):
    shutil.rmtree(study.root / "results")
    texts = report.render(study.source)
    assert "None yet" in texts["README.md"] and "##" not in texts["RESULTS.md"]
    assert "notebook 05 has not run" in texts["README.md"]


def test_a_readme_without_its_markers_is_refused(study):
    (study.source / "README.md").write_text("<!-- status -->\n")
    with pytest.raises(ValueError, match="0 pairs of <!-- hero -->"):
        report.render(study.source)


def test_readme_parts_are_filled_between_their_markers_only():
    text = "a\n<!-- results -->\nold\n<!-- /results -->\nb\n<!-- status -->\n<!-- /status -->\n"
    filled = report.fill(text, {"results": "new\n", "status": "ran\n"})
    assert filled == "a\n<!-- results -->\nnew\n<!-- /results -->\nb\n<!-- status -->\nran\n<!-- /status -->\n"
