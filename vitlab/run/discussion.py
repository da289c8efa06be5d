"""What paid and what did not, told from the committed rows; `vitlab readme` puts it into README.md.

Each notebook has a function from its rows (a DataFrame), its special rows (what it wrote beside the arms, by
name) and its seeds to sentences in Markdown; it says nothing where a row it needs is missing.
"""

import math
import re
from pathlib import Path

from vitlab.study import claims
from vitlab.study.noise import word
from vitlab.study.study import read_rows
from vitlab.utils.files import read_json

RIVALS = {"attention": "drop, cls", "random": "drop, random", "ToMe": "merge pairs (ToMe)",
          "Ward": "Ward, lengths kept", "Ward with calibrated counts": "Ward, calibrated counts"}  # fmt: skip
ALLOWED = 0.5  # points that a setting may lose on validation, as in notebook 05
MODELS = {"S3": ("the plain ViT with a class token", "S3/baseline"), "ours": ("our convolutional ViT", "ours")}


def discuss(root, preset_of):
    """Markdown for all notebooks; preset_of: {notebook: the preset whose rows are shown}."""
    parts = []
    for notebook, preset in preset_of.items():
        tell = TELLERS.get(notebook.split("_")[0])
        rows = read_rows(root, preset, notebook)
        if tell and "accuracy_top1" in rows:
            where = Path(root, "results", preset, notebook)
            special = {f.stem: read_json(f) for f in sorted(where.glob("*.json"))}
            parts += [f"- {line}\n" for line in tell(rows[rows.accuracy_top1.notna()], special)]
    return "".join(parts) or "Nothing yet: there are no rows.\n"


def text(claim):
    return claims.get(claim).text


def means(rows, column="accuracy_top1"):
    """{arm: mean over its seeds}, on the data set of the most arms."""
    data = rows.dataset.mode()[0]
    return rows[rows.dataset == data].groupby("arm", sort=False)[column].mean().to_dict()


def baselines(rows, special):
    accuracy, macs = means(rows), means(rows, "macs")
    if "ours" in accuracy:
        yield (f"**The baseline.** Ours reaches {accuracy['ours']:.2f} % on CIFAR-10 with {macs['ours'] / 1e6:.0f} "
               "million MACs at the scale shown. The published operation counts are artefacts of the counter: "
               f"{text('S0/dense/macs')} are really {text('S0/dense/true-macs')}.")  # fmt: skip


def pruning(rows, special):
    accuracy, macs, latency = means(rows), means(rows, "macs"), means(rows, "latency_ms")
    cuts = sorted((name for name in accuracy if re.fullmatch(r"S2/pruned-\d+", name)), key=lambda n: int(n[10:]))
    deep = cuts[-1] if cuts else None
    even = f"{deep}-even"
    if deep and f"{deep}-kd" in accuracy:
        gone = accuracy[deep] - accuracy["S2/baseline"]
        back = accuracy[f"{deep}-tuned"] - accuracy[deep]
        behind = accuracy[f"{deep}-tuned"] - accuracy.get("S2/baseline-tuned", math.nan)
        more = accuracy[f"{deep}-kd"] - accuracy[f"{deep}-tuned"]
        by_even = latency["S2/baseline"] / latency[even] if even in latency else None
        by_even = f", with heads of equal width {by_even:.2f}x" if by_even else ""
        yield (f"**Pruning and distillation.** The claim: a model pruned by {deep[10:]} % and distilled "
               f"({text('S2/pruned-40-kd/accuracy')}) is better than its baseline ({text('S2/baseline/accuracy')}). "
               f"Here the cut itself moves accuracy by {gone:+.2f} points, training on without a teacher gives "
               f"{back:+.2f} back ({behind:+.2f} from the uncut model trained on as long), and the teacher adds "
               f"{word(more)} to that: most of what was credited to distillation "
               f"{'was' if back > more else 'was not'} the epochs. With "
               f"{macs['S2/baseline'] / macs[deep]:.2f} times fewer MACs one image is "
               f"{latency['S2/baseline'] / latency[deep]:.2f}x as fast{by_even}.")  # fmt: skip
    if "S2/tiny-kd" in accuracy:
        yield (f"A small student gains {word(accuracy['S2/tiny-kd'] - accuracy['S2/tiny'])} from that teacher.")
    mine = {n.removeprefix("ours/"): a for n, a in accuracy.items() if n.startswith("ours/")}
    if "control" in mine:
        uncut, share = mine.pop("uncut", math.nan), macs["ours/control"] / macs["ours"]
        best = max(mine, key=mine.get)
        yield (f"Our own baseline, cut to {100 * share:.0f} % of its MACs and trained on, "
               f"reaches {mine['control']:.2f} %, with random channels {mine['random']:.2f}; uncut it had "
               f"{accuracy['ours']:.2f} and, trained on as long, reaches {uncut:.2f}. Best cut is *{best}*, "
               f"{word(mine[best] - mine['control'])} against the first.")


def tokens(rows, special):
    accuracy = means(rows)
    if "S3/pruned-on" in accuracy:
        yield (f"**Token pruning.** The claim: {text('S3/pruned-alpha-1.2/speed-up')} for "
               f"{text('S3/pruned-alpha-1.2/accuracy-drop')}. Its rule, dropping what gets least attention, "
               f"done per image and without retraining moves the plain model by "
               f"{accuracy['S3/baseline-on'] - accuracy['S3/baseline']:+.2f} points; the model that was trained with "
               f"it and runs with it is at {accuracy['S3/pruned-on'] - accuracy['S3/baseline']:+.2f}.")  # fmt: skip
    for name, (model, arm) in MODELS.items():
        yield from _divergence(special.get(f"rivals-{name}", {}), model)
        yield from _at_the_factor(accuracy, model, arm)
        yield from _at_the_edge(special.get(f"speed-{name}", {}), accuracy, model, arm)
        yield from _payoff(special.get(f"payoff-{name}", {}), model)


def _divergence(row, model):
    found = {(r["at"], r["rival"]): r["kl"] for r in row.get("rivals", [])}
    if found:
        least = min(at for at, _ in found)
        here = {label: found[least, rival] for label, rival in RIVALS.items()}
        said = "; ".join(f"{label} {kl:.3f}" for label, kl in here.items())
        blind = "worse" if here["attention"] > here["random"] else "better"
        yield (f"In {model}, at {100 * least:.0f} % of the MACs, divergence from the plain model's predictions (nats): "
               f"{said}. Dropping by attention is {blind} than dropping at random; the divergence of Ward merging is "
               f"{here['ToMe'] / here['Ward']:.1f} times smaller than ToMe's.")  # fmt: skip


def _at_the_factor(accuracy, model, arm):
    named = re.compile(re.escape(arm) + r", (.+) at [\d.]+x")
    lost = {found[1]: accuracy[arm] - value for name, value in accuracy.items() if (found := named.fullmatch(name))}
    if lost:
        said = "; ".join(f"{rival} {lost[rival]:+.2f}" for rival in sorted(lost, key=lost.get, reverse=True))
        yield (f"At the claimed factor, {text('S3/pruned-alpha-1.2/speed-up')} by the operations, nothing retrained, "
               f"{model} loses on all test images (points): {said}.")  # fmt: skip


def _at_the_edge(row, accuracy, model, arm):
    edge = [s for s in row.get("speed", []) if s["rival"].startswith("Ward at")]
    if edge:
        told = ", ".join(f"{s['measured']:.2f}x at batch {s['batch']}" for s in edge)
        lost = accuracy.get(f"{arm}, Ward at the edge", math.nan) - accuracy[arm]
        yield (f"The cheapest setting for {model} that validation allows moves it by {lost:+.2f} points on test "
               f"and promises {edge[0]['limit']:.2f}x by its MACs; measured on {row['device']}: {told}.")  # fmt: skip


def _payoff(row, model):
    reached = [r for r in row.get("payoff", []) if r["lost"] is not None]
    for batch in dict.fromkeys(r["batch"] for r in row.get("payoff", [])):
        good = [r for r in reached if r["batch"] == batch and r["lost"] <= ALLOWED and r["speed_up"] > 1]
        best = max(good, key=lambda r: r["speed_up"], default=None)
        told = f"{best['speed_up']:.2f}x for {best['lost']:+.2f} points lost on validation" if best else "nothing"
        yield (f"Ward merging calibrated to the clock of {row['device']} buys {model} at batch {batch} within "
               f"{ALLOWED} points: {told}.")  # fmt: skip


def linear(rows, special):
    accuracy = means(rows)
    if "scaling" in special:
        found = special["scaling"]["found"]["crossover n"]["training"]
        said = ", ".join(f"{arm} {f'from {n} tokens' if n else 'not at all'}" for arm, n in found.items())
        where = special["scaling"]["device"]
        yield (f"**Linear attention.** The claim: {text('S4/ripple/training-speed-up')} training speed at 64 tokens. "
               f"On {where}, a layer trains faster than fused softmax: {said}.")  # fmt: skip
    if "training-speed" in special:
        ratio = special["training-speed"]["ratio"]
        said = ", ".join(f"{name[3:]} {value:.2f}x" for name, value in ratio.items() if name != "S4/baseline")
        yield f"Whole models at the scale shown train at {said} the baseline's speed."
    if "S4/ripple" in accuracy:
        parts = [f"{name} {word(accuracy[f'S4/{name}'] - accuracy['S4/baseline'])} against the baseline and "
                 f"{word(accuracy[f'S4/{name}'] - accuracy[control])} against softmax at its MACs"
                 for name in ("ripple", "hydra") if (control := f"softmax at {name}'s MACs") in accuracy]  # fmt: skip
        yield (f"Accuracy on CIFAR-100 at the scale shown: {'; '.join(parts)}. The claimed "
               f"{text('S4/ripple/cifar100-accuracy')} needs the `gpu` preset to be judged.")  # fmt: skip


TELLERS = {"01": baselines, "04": pruning, "05": tokens, "06": linear}
