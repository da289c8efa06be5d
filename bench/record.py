"""Where a benchmark's last table goes: bench/results/NAME.json, and its section of bench/README.md."""

import os
import re
from pathlib import Path

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
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    versions = ", ".join(f"{p} {about['versions'][p]}" for p in ("torch", "torchvision", "timm"))
    where = f"{about['device']} (of {found['cores']} cores), load before {LOAD}, {versions}, {about['finished'][:10]}"
    section = "\n\n".join([start + markdown(rows), where, *[below] * bool(below)]) + f"\n{end}"
    new, count = re.subn(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: section, text, flags=re.DOTALL)
    if not count:
        raise ValueError(f"bench/README.md has no section {start.strip()}")
    files.write_text(readme, new)


def markdown(rows):
    """The rows as a Markdown table."""
    cells = [[str(k) for k in rows[0]], ["---"] * len(rows[0]), *([show(v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def show(value):
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
