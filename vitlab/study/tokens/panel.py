"""A panel to play with: alpha, r_max, score, action and image; kept patches and logits are redrawn live.

Where nobody can move a slider (a headless run, a page on the web) it is a figure of its first state.
"""

import os

import matplotlib.pyplot as plt
import numpy as np
import torch

from vitlab.compress.tokens.merge import ACTIONS
from vitlab.compress.tokens.reduction import TokenConfig, reduce_tokens
from vitlab.compress.tokens.scores import SCORES, SIGNED
from vitlab.study.plots import WIDTH
from vitlab.study.tokens.plots import views
from vitlab.utils.device import running


def live():
    """Whether a person sits at this kernel: it was started by a Jupyter server, VS Code or Colab."""
    return any(os.environ.get(name) for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"))


def draw(evaluator, image=0, *, alpha=1.5, r_max=0.6, score="cls", action="ward"):
    """One image of an `Evaluator` after each block, and its probabilities plain and reduced."""
    model = reduce_tokens(evaluator.plain, alpha=alpha, r_max=r_max, score=score, action=action)
    one = evaluator.images[image : image + 1]
    with running([model], one.device), model.recording():
        chances = torch.cat([model.plain(one), model(one)]).float().softmax(1).cpu().numpy()
    figure = plt.figure(figsize=(WIDTH * 1.2, 3.4))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1.6))
    shown = views(evaluator.raw[image : image + 1], model)
    for ax, (name, view) in zip(top.subplots(1, len(shown), squeeze=False)[0], shown):
        ax.imshow(view[0].permute(1, 2, 0))
        ax.set_title(name, fontsize=7)
        ax.set_axis_off()
    ax, at = bottom.subplots(), np.arange(len(evaluator.classes))
    for offset, row, label in zip((-0.2, 0.2), chances, ("plain", "fewer tokens")):
        ax.bar(at + offset, row, 0.38, label=label)
    ax.set_xticks(at, evaluator.classes, rotation=30, fontsize=7)
    ax.set(ylim=(0, 1), ylabel="probability")
    truth, share = evaluator.classes[int(evaluator.labels[image])], 100 * model.macs() / evaluator.macs
    ax.set_title(f"truth: {truth}; {share:.0f} % of the MACs", fontsize=8)
    ax.legend(fontsize=8)
    plt.close(figure)  # who gets it shows it; pyplot would show it once more
    return figure


def panel(evaluators, *, interactive=None, **start):
    """The panel for {name: Evaluator}: an ipywidgets box, or a figure (interactive=False; None: as `live` says)."""
    if not (live() if interactive is None else interactive):
        return draw(next(iter(evaluators.values())), **start)
    import ipywidgets as w
    from IPython.display import display

    def knob(kind, name, value=None, **options):
        value = {} if value is None else {"value": start.get(name, value)}
        return kind(description=name, style={"description_width": "60px"}, **value, **options)

    still = {"continuous_update": False}
    last = min(len(e.labels) for e in evaluators.values()) - 1
    knobs = {k.description: k for k in (
        knob(w.Dropdown, "model", options=list(evaluators)),
        knob(w.FloatSlider, "alpha", 1.5, min=0.5, max=3, step=0.1, **still),
        knob(w.FloatSlider, "r_max", 0.6, min=0, max=0.95, step=0.05, **still),
        knob(w.Dropdown, "score", "cls", options=list(SCORES)),
        knob(w.Dropdown, "action", "ward", options=list(ACTIONS)),
        knob(w.IntSlider, "image", 0, min=0, max=last, **still),
    )}  # fmt: skip
    note = w.Label()

    def show(model, image, **options):
        scored = TokenConfig(action=options["action"]).scored
        knobs["score"].disabled = not scored
        note.value = "" if scored else f"{options['action']!r} goes by likeness: the score changes nothing"
        if options["action"] in ("fuse", "edge") and options["score"] in SIGNED:
            note.value = f"{options['action']!r} weighs tokens by their score, and {options['score']!r} can be negative"
            return
        display(draw(evaluators[model], image, **options))

    out = w.interactive_output(show, knobs)
    return w.VBox([w.HBox(list(knobs.values())[:3]), w.HBox([*list(knobs.values())[3:], note]), out])
