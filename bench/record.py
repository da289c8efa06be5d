"""Where a benchmark's last table goes: bench/results/NAME.json, and its section of bench/README.md."""

import os
from pathlib import Path

from vitlab.run.report import fill, markdown
from vitlab.utils import files
from vitlab.utils.provenance import provenance
from vitlab.utils.threads import physical_cores

HERE = Path(__file__).parent
LOAD = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None  # before anything is measured


def record(name, rows, below="", *, device="cpu", **facts):
    """Keep `rows`, dictionaries of one set of columns with strings and numbers, and the `facts` about them.

    below: Markdown that follows the table.
    """
    about = provenance(device)
    found = {"rows": rows, **facts, "cores": physical_cores(), "load_before": LOAD, **about}
    files.write_json(HERE / "results" / f"{name}.json", found)
    versions = ", ".join(f"{p} {about['versions'][p]}" for p in ("torch", "torchvision", "timm"))
    where = f"{about['device']} (of {found['cores']} cores), load before {LOAD}, {versions}, {about['finished'][:10]}"
    table = markdown(list(rows[0]), [map(show, row.values()) for row in rows])
    readme = HERE / "README.md"
    section = "\n\n".join([table.strip(), where, *[below] * bool(below)]) + "\n"
    files.write_text(readme, fill(readme.read_text(encoding="utf-8"), {name: section}))


def show(value):
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
