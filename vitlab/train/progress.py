"""What a person sees of a training run: a line an epoch, a bar in a terminal."""

import math
import sys

from tqdm import tqdm


def progress_bar(total, text):
    """A bar of `total` steps, in a terminal only: in a notebook or a log file it would leave litter."""
    return tqdm(total=total, desc=text, leave=False, disable=not sys.stderr.isatty())


def line(name, row, epochs, history):
    """The line of an epoch's `row`: loss, accuracies, rate, speed, and the time left of `epochs`."""
    left = sum(r["seconds"] for r in history.rows[-5:]) / len(history.rows[-5:]) * (epochs - row["epoch"])
    parts = [f"{name} epoch {row['epoch']:>{len(str(epochs))}}/{epochs}".strip(), f"loss {row['loss']:.3f}"]
    if "accuracy" in row:
        parts.append(f"train {row['accuracy']:.1f} %")
    if "val_accuracy" in row:
        parts.append(f"val {row['val_accuracy']:.2f} %")
    parts += [f"lr {row['lr']:.1e}", f"{row['images_per_s']:,.0f} images/s", f"left {clock(left)}"]
    return "  ".join(parts)


def clock(seconds):
    """"3m05s", "1h02m", rounded up."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
