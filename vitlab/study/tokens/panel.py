"""A panel to play with: alpha, r_max, score, action and image; kept patches and logits are redrawn live.

Where nobody can move a slider (a headless run, a page on the web) it is a figure of its first state.
"""

import os

import matplotlib.pyplot as plt
import numpy as np
import torch

from vitlab.compress.tokens import reduction as tokens
from vitlab.compress.tokens.merge import ACTIONS, MERGES
from vitlab.compress.tokens.scores import SCORES, SIGNED
from vitlab.study.plots import WIDTH
from vitlab.study.tokens.plots import faded, mosaic, present
from vitlab.utils.device import running


def live():
    """Whether a person sits at this kernel: it was started by a Jupyter server, VS Code or Colab."""
    return any(os.environ.get(name) for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"))


def draw(probe, image=0, *, alpha=1.5, r_max=0.6, score="cls", action="ward"):
    """One image of `probe` (a token_study.Evaluator) after each block, and its probabilities plain and reduced."""
    model = tokens.reduce_tokens(probe.plain, alpha=alpha, r_max=r_max, score=score, action=action)
    with running([model], probe.images.device), model.recording():
        one = probe.images[image : image + 1]
        chances = torch.cat([model.plain(one), model(one)])
    chances = chances.float().softmax(1).cpu()
    raw, grid = probe.raw[image : image + 1], model.adapter.grid
    views = [("image", raw)]
    for block, (kept, owner) in enumerate(zip(model.kept, model.owners), 1):
        view = mosaic(raw, owner.cpu(), grid) if action in MERGES else faded(raw, present(kept, owner.shape[1]), grid)
        views.append((f"{block}: {model.tokens[block - 1]}", view))
    return _figure(views, chances, probe, image, model)


def _figure(views, chances, probe, image, model):
    figure = plt.figure(figsize=(WIDTH * 1.2, 3.4))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1.6))
    for ax, (name, view) in zip(top.subplots(1, len(views), squeeze=False)[0], views):
        ax.imshow(view[0].permute(1, 2, 0).cpu())
        ax.set_title(name, fontsize=7)
        ax.set_axis_off()
    ax = bottom.subplots()
    at, chances = np.arange(len(probe.classes)), chances.numpy()
    for offset, row, label in ((-0.2, chances[0], "plain"), (0.2, chances[1], "fewer tokens")):
        ax.bar(at + offset, row, 0.38, label=label)
    ax.set_xticks(at, probe.classes, rotation=30, fontsize=7)
    ax.set(ylim=(0, 1), ylabel="probability")
    share = 100 * model.macs() / probe.macs
    ax.set_title(f"truth: {probe.classes[int(probe.labels[image])]}; {share:.0f} % of the MACs", fontsize=8)
    ax.legend(fontsize=8)
    plt.close(figure)  # who gets it shows it; pyplot would show it once more
    return figure


def panel(probes, *, interactive=None, **start):
    """The panel for {name: Evaluator}: an ipywidgets box, or a figure (interactive=False; None: as `live` says)."""
    if not (live() if interactive is None else interactive):
        return draw(next(iter(probes.values())), **start)
    import ipywidgets as w
    from IPython.display import display

    wide = {"description_width": "60px"}
    knobs = {
        "model": w.Dropdown(options=list(probes), description="model", style=wide),
        "alpha": w.FloatSlider(start.get("alpha", 1.5), min=0.5, max=3, step=0.1, description="alpha", style=wide,
                               continuous_update=False),
        "r_max": w.FloatSlider(start.get("r_max", 0.6), min=0, max=0.95, step=0.05, description="r_max", style=wide,
                               continuous_update=False),
        "score": w.Dropdown(options=list(SCORES), value=start.get("score", "cls"), description="score", style=wide),
        "action": w.Dropdown(options=list(ACTIONS), value=start.get("action", "ward"), description="action",
                             style=wide),
        "image": w.IntSlider(start.get("image", 0), min=0, max=min(len(p.labels) for p in probes.values()) - 1,
                             description="image", style=wide, continuous_update=False),
    }  # fmt: skip

    def show(model, image, **options):
        if options["action"] in ("fuse", "edge") and options["score"] in SIGNED:
            print(f"{options['action']} weighs tokens by their score, and {options['score']} can be negative")
            return
        display(draw(probes[model], image, **options))

    out = w.interactive_output(show, knobs)
    return w.VBox([w.HBox(list(knobs.values())[:3]), w.HBox(list(knobs.values())[3:]), out])
