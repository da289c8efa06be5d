"""The static site, opened in a browser: whole, without network, sortable, as wide as a phone."""

import base64
import re
from pathlib import Path

import chromium
import nbformat
import pytest

from vitlab.run import notebooks, report, site

ROOT = Path(__file__).parents[2]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
TABLE = """<table><thead><tr style="text-align: right;"><th></th><th></th><th>share</th><th>note</th></tr>
<tr><th>arm</th><th>n</th><th></th><th></th></tr></thead><tbody>
<tr><th rowspan="2">b</th><th>1</th><td>10.5</td><td>{long}</td></tr><tr><th>2</th><td>-9</td><td>x</td></tr>
<tr><th>a</th><th>1</th><td>1,200</td><td></td></tr></tbody></table>""".format(long="a long note " * 40)


@pytest.fixture
def small(make):
    """A project with a notebook that ran, with TeX, a picture and a table, and one that never did."""
    project = make({"01_a": ["1"], "02_b": ["2"]}, cpu={})
    root = project.source
    (root / "README.md").write_text("# R\n\n[a](notebooks/01_a.ipynb) [b](notebooks/02_b.ipynb) [c](CLAIMS.md) "
                                    "[d](RESULTS.md) [e](vitlab) ![p](p.png)\n")  # fmt: skip
    (root / "RESULTS.md").write_text("# Results\n\n| x | y |\n| --- | --- |\n| 2 | b |\n| 10 | a |\n")
    (root / "CLAIMS.md").write_text("# Claims\n")
    (root / "p.png").write_bytes(base64.b64decode(PNG))
    book = nbformat.read(root / "notebooks/01_a.ipynb", 4)
    book.cells += [nbformat.v4.new_markdown_cell("**Why?** For $\\tfrac{a}{b}$ and\n\n$$\\sum_i x_i$$\n")]
    outputs = [nbformat.v4.new_output("display_data", shown)
               for shown in ({"text/html": TABLE}, {"image/png": PNG}, {"text/plain": "w" * 500})]
    book.cells += [nbformat.v4.new_code_cell("show()", outputs=outputs)]
    book.metadata["vitlab"] = {"status": "done", "finished": "2026-11-24T10:00", "device": "a CPU", "rows": 0}
    project.executed("cpu").mkdir(parents=True)
    nbformat.write(book, project.executed("cpu") / "01_a.ipynb")
    return root


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def test_pages_hold_what_the_notebooks_hold(small, tmp_path):
    names = site.write(small, tmp_path / "site")
    assert names == ["index.html", "01_a.html", "02_b.html"] 
    index, ran, never = ((tmp_path / "site" / name).read_text() for name in names)
    links = re.findall(r'<a href="([^"#]\S*)">(\w)</a>', index)
    assert links == [("01_a.html", "a"), ("02_b.html", "b"), ("index.html#Claims", "c"), ("index.html#Results", "d")]
    assert f'src="data:image/png;base64,{PNG}"' in index and " e <img" in index
    assert "Preset cpu, 2026-11-24, a CPU: made by older code" in ran and "Not run yet." in never
    assert ran.count("<math") == 2 and "<mfrac>" in ran and "$" not in ran.split("<main>")[1].split("<script>")[0]
    assert 'alt="Why?"' in ran


@chromium.needed
def test_a_click_on_a_heading_sorts(small, tmp_path, page):
    site.write(small, tmp_path / "site")
    page.open((tmp_path / "site" / "01_a.html").as_uri())

    def column(x):
        return page.value(f"[...document.querySelectorAll('tbody tr')].map(r => r.cells[{x}].textContent)")

    def click(heading):
        page.drag(f"[...document.querySelectorAll('thead button')].find(b => b.textContent === '{heading}')")

    click("share")
    assert column(2) == ["-9", "10.5", "1,200"] and column(0) == ["b", "b", "a"] and column(1) == ["2", "1", "1"]
    click("share")
    assert column(2) == ["1,200", "10.5", "-9"]
    click("arm")
    assert column(0) == ["a", "b", "b"]
    click("note")
    assert column(3)[-1] == "", "what is empty stays last"
    click("note")
    assert column(3)[-1] == ""


LOOK = """({
    missing: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 80)),
    pictures: document.images.length,
    formulas: document.querySelectorAll("math").length,
    outside: performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:")),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    wide: document.documentElement.scrollWidth,
})"""


@chromium.needed
def test_the_whole_site_is_sound_on_a_desktop_and_on_a_phone(tmp_path, page):
    """The committed study: nothing fails to load, no link leads nowhere, nothing sticks out of a phone's screen."""
    names, seen = site.write(ROOT, tmp_path), {}
    for name in names:
        for width in (1280, 390):
            page.open((tmp_path / name).as_uri(), width)
            seen[name] = page.value(LOOK)
            assert page.problems == [] and seen[name]["missing"] == [] and seen[name]["outside"] == [], name
            assert seen[name]["wide"] <= width, f"{name} is wider than {width} pixels"
    for name in names:
        for link in seen[name]["links"]:
            place, _, part = link.partition("#")
            if place.startswith("file:"):
                target = place.rsplit("/", 1)[1]
                assert target in seen and (not part or part in seen[target]["ids"]), f"{name}: {link} leads nowhere"
    executed = {p.stem for p in (ROOT / "executed").glob("*/*.ipynb")}
    for stem in executed:
        nodes = [nbformat.read(p, 4) for preset in report.PRESETS
                 if (p := ROOT / "executed" / preset / f"{stem}.ipynb").exists()][:1]
        outputs = [o.get("data", {}) for c in nodes[0].cells for o in c.get("outputs", ())]
        pictures = sum("image/png" in o and "text/html" not in o for o in outputs)
        assert seen[f"{stem}.html"]["pictures"] == pictures
    assert seen["05_token_pruning.html"]["formulas"] > 5
    assert len(names) == 1 + len(notebooks.find(ROOT))
