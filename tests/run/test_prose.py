"""Sentences for readers who do not know the arms' names."""

import pytest

from vitlab.run.prose import titled, words
from vitlab.study import zoo


@pytest.mark.parametrize(
    "said, meant",
    [
        ("above S3/baseline-small, the best", "above Token pruning's small baseline, the best"),
        ("S4/baseline reads 72 %", "Linear-ViT's baseline reads 72 %"),
        ("**The baseline.** ours-small reads", "**The baseline.** Our small ViT reads"),
        ("All but ours-tiny were", "All but our tiny ViT were"),
        ("S1/B1-small learns", "Small FaViT-B1 learns"),
        # longer names of arms, paths and the mere word are no models' names
        ("S3/baseline-pruned, S0/dense-7", "S3/baseline-pruned, S0/dense-7"),
        ("figures/ours-small/x and ours/control", "figures/ours-small/x and ours/control"),
        ("these are yours and hours", "these are yours and hours"),
    ],
)
def test_models_are_called_by_their_titles(said, meant):
    assert titled(said) == meant


@pytest.mark.parametrize("name", zoo.SPECS | zoo.OTHERS)
def test_every_model_of_the_zoo_has_a_title_that_fits(name):
    text = f"as {name}-small does"
    assert name not in titled(text) and "small" in titled(text) and words(titled(text)) >= words(text)
