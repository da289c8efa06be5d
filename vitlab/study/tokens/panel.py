"""A panel to play with: alpha, r_max, score, action and image; kept patches and logits are redrawn live.

Where nobody can move a slider (a headless run, a page on the web) it is a figure of its first state.
"""

import os

import matplotlib.pyplot as plt
import pandas as pd
import torch

from vitlab.compress.tokens.merge import ACTIONS
from vitlab.compress.tokens.reduction import TokenConfig, reduce_tokens
from vitlab.compress.tokens.scores import SCORES
from vitlab.study.plots import WIDTH
from vitlab.study.tokens.plots import views
from vitlab.utils.device import running


def live():
    """Whether a person sits at this kernel: it was started by a Jupyter server, VS Code or Colab."""
    return any(os.environ.get(name) for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"))


def draw(evaluator, image=0, *, alpha=1.5, r_max=0.6, score="cls", action="size-priced"):
    """One image of an `Evaluator` after each block, and its probabilities plain and reduced."""
    model = reduce_tokens(evaluator.plain, alpha=alpha, r_max=r_max, score=score, action=action)
    one = evaluator.images[image : image + 1]
    with running([model], one.device):
        logits, seen = model(one, intermediates=True)
        chances = torch.cat([model.plain(one), logits]).float().softmax(1).cpu()
    figure = plt.figure(figsize=(WIDTH * 1.2, 3.4))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1.6))
    shown = views(evaluator.raw[image : image + 1], model, seen)
    for ax, (name, view) in zip(top.subplots(1, len(shown), squeeze=False)[0], shown):
        ax.imshow(view[0].permute(1, 2, 0))
        ax.set_title(name, fontsize=7)
        ax.set_axis_off()
    table = pd.DataFrame(chances.T.numpy(), index=evaluator.classes, columns=["plain", "fewer tokens"])
    truth, share = evaluator.classes[int(evaluator.labels[image])], 100 * model.macs() / evaluator.macs
    ax = table.plot.bar(ax=bottom.subplots(), rot=30, ylim=(0, 1), ylabel="probability", fontsize=7, width=0.8)
    ax.set_title(f"truth: {truth}; {share:.0f} % of the MACs", fontsize=8)
    plt.close(figure)  # who gets it shows it; pyplot would show it once more
    return figure


def panel(evaluators, *, interactive=None, **start):
    """The panel for {name: Evaluator}: an ipywidgets box, or a figure (interactive=False; None: as `live` says)."""
    if not (live() if interactive is None else interactive):
        return draw(next(iter(evaluators.values())), **start)
    import ipywidgets as w
    from IPython.display import display

    start = {"alpha": 1.5, "r_max": 0.6, "score": "cls", "action": "size-priced", "image": 0} | start
    last = min(len(e.labels) for e in evaluators.values()) - 1
    knobs = {
        "model": w.Dropdown(options=list(evaluators)),
        "alpha": w.FloatSlider(min=0.5, max=3, step=0.1, continuous_update=False),
        "r_max": w.FloatSlider(min=0, max=0.95, step=0.05, continuous_update=False),
        "score": w.Dropdown(options=list(SCORES)),
        "action": w.Dropdown(options=list(ACTIONS)),
        "image": w.IntSlider(min=0, max=last, continuous_update=False),
    }
    for name, knob in knobs.items():
        knob.description, knob.value = name, start.get(name, knob.value)
    note = w.Label()

    def show(model, image, **options):
        try:
            scored = TokenConfig(**options).scored
        except ValueError as error:  # a score below zero cannot weigh
            note.value = str(error)
            return
        knobs["score"].disabled = not scored
        note.value = "" if scored else f"{options['action']!r} goes by likeness: the score changes nothing"
        display(draw(evaluators[model], image, **options))

    out = w.interactive_output(show, knobs)
    return w.VBox([w.HBox(list(knobs.values())[:3]), w.HBox(list(knobs.values())[3:]), note, out])
