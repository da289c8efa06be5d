"""The study as a static site: an index of README, results and claims, and a page for each notebook.

Every page is one file that needs no network and no server: pictures are inside it, TeX is written as MathML, and tables
are sorted by a few lines of script.
"""

import re
from pathlib import Path

import jinja2
import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from vitlab.run import report
from vitlab.utils.files import write_text

PAGE = Path(__file__).with_name("page.html")
# around nbconvert's own cells: the code is folded away, as a reader of the study comes for its answers
NOTEBOOK = """{% extends 'basic/index.html.j2' %}
{% block input %}<details class="code"><summary>code</summary>{{ super() }}</details>{% endblock %}"""


def write(root, folder):
    """Write index.html and NOTEBOOK.html for each notebook of the project `root` into `folder`; their names.

    README.md, RESULTS.md and CLAIMS.md are taken as they stand: `report.refresh` comes first.
    """
    evidence, root = report.Evidence(root), Path(root)
    addresses = {n.path.name: f"{n.stem}.html" for n in evidence.notebooks}
    addresses |= {"README.md": "index.html", "RESULTS.md": "index.html#Results", "CLAIMS.md": "index.html#Claims"}
    menu = [("index.html", "vitlab"), ("index.html#Results", "Results"), ("index.html#Claims", "Claims"),
            *((f"{n.stem}.html", n.stem.replace("_", " ")) for n in evidence.notebooks)]  # fmt: skip
    render = MarkdownWithMath(renderer=Renderer(root, addresses)).render

    def markdown(text):
        return render(text).replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")

    # nbconvert's own clean_html takes seconds, and is for the notebooks of strangers
    exporter = HTMLExporter(raw_template=NOTEBOOK, exclude_input_prompt=True, exclude_output_prompt=True,
                            filters={"markdown2html": markdown, "clean_html": lambda html: html})  # fmt: skip
    texts = [(root / name).read_text(encoding="utf-8") for name in report.FILES]
    bodies = {"index.html": ("vitlab", "".join(map(markdown, texts)))}
    for notebook in evidence.notebooks:
        bodies[f"{notebook.stem}.html"] = notebook.title, _page(evidence, notebook, exporter)
    page = jinja2.Template(PAGE.read_text(encoding="utf-8"))
    highlight = HtmlFormatter().get_style_defs(".highlight")
    for name, (title, body) in bodies.items():
        text = page.render(title=title, body=body, pages=menu, here=name, highlight=highlight)
        write_text(Path(folder) / name, text)
    return list(bodies)


class Renderer(IPythonRenderer):
    """Markdown as HTML, with MathML, embedded pictures, and links that stay within the site.

    addresses: {name of a file of the project: its page}; a link to any other file of the project becomes plain text.
    """

    def __init__(self, root, addresses):
        super().__init__(escape=False, embed_images=True, path=str(root))
        self.addresses = addresses

    def link(self, text, url, title=None):
        if "://" in url or url.startswith("#"):
            return super().link(text, url, title)
        address = self.addresses.get(Path(url).name)
        return super().link(text, address, title) if address else text

    def inline_math(self, body):
        return convert(body)

    def block_math(self, body):
        return convert(body, display="block")

    def latex_environment(self, name, body):
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")


def _page(evidence, notebook, exporter):
    """The best executed copy of a notebook under a line on its run, or its source where it never ran, as HTML."""
    copies = {p: evidence.root / "executed" / p / notebook.path.name for p in report.PRESETS}
    preset = next((p for p, path in copies.items() if path.exists()), None)
    node = nbformat.read(copies.get(preset, notebook.path), as_version=4)
    said = f"Preset {preset}, {report.standing(evidence, notebook, preset)}" if preset else "Not run yet."
    question = ""
    for cell in node.cells:
        if cell.cell_type == "markdown":  # a picture's text is the question that it answers
            found = re.findall(r"\*\*(.+?)\*\*|^#+ (.+)", cell.source, flags=re.M)
            question = "".join(found[-1]) if found else question
        else:
            cell.metadata["alt"] = question
    body, _ = exporter.from_notebook_node(node)
    return f'<button id="code">show all code</button><p class="note">{said}</p>{body}'
