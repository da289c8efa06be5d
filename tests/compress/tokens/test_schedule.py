"""Counts held against the published lists, operations against torch's counter."""

import itertools

import pytest
from vits import BASE, KINDS, operations, pictures, small

from vitlab.compress.tokens.merge import ACTIONS
from vitlab.compress.tokens.reduction import reduce_tokens
from vitlab.compress.tokens.schedule import bipartite_rounds, schedule
from vitlab.compress.tokens.scores import SCORES


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(2.0, [143, 137, 125, 106, 81, 54, 29, 12]), (1.5, [141, 130, 112, 88, 62, 38, 19, 8]),
     (1.2, [137, 121, 98, 72, 47, 27, 13, 5]), (1.0, [134, 114, 88, 61, 38, 21, 10, 4])],
)  # fmt: skip
def test_schedule_reproduces_the_published_lists(alpha, expected):
    assert schedule(145, 8, 0.6, alpha) == expected
    assert schedule(145, 8, 0.6, alpha, rule="exact") == expected


def test_schedule_has_a_floor_and_protected_blocks():
    assert schedule(17, 4, 0.99, 0.1) == [3, 2, 2, 2]
    assert schedule(17, 4, 0.5, 1.0, protect=(0, -1)) == [17, 13, 8, 8]
    assert schedule(10, 1, 0.3, 1.0, prefix=0) == [7]  # 10 * 0.7 is 6.999... in floating point
    for wrong in ({"r_max": 1.0}, {"alpha": 0}, {"rule": "x"}, {"protect": (9,)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            schedule(17, 4, **wrong)


def test_a_constant_schedule_is_tomes():
    assert schedule(197, 12, 13 / 196, kind="constant") == [197 - 13 * (block + 1) for block in range(12)]
    assert schedule(17, 4, 0.125, kind="constant", prefix=1) == [15, 13, 11, 9]
    # 2.4 a block, caught up with after block 0
    assert schedule(17, 4, 0.15, kind="constant", protect=(0,)) == [17, 12, 9, 7]
    assert schedule(17, 4, 0.3, kind="constant") == [12, 7, 2, 2]
    with pytest.raises(ValueError, match="schedule='x'"):
        schedule(17, 4, kind="x")


def test_all_that_go_go_in_the_first_block_that_may_remove():
    assert schedule(17, 4, 0.5, kind="once") == [9, 9, 9, 9]
    assert schedule(17, 4, 0.5, kind="once", protect=(0, 1)) == [17, 17, 9, 9]
    assert schedule(17, 4, 0.5, kind="once", protect=(0, -2)) == [17, 9, 9, 9]
    assert schedule(17, 4, 0.5, kind="once", protect=(0, 1, 2, 3)) == [17] * 4
    assert schedule(17, 4, 0.5, alpha=1.0, kind="once") == schedule(17, 4, 0.5, alpha=3.0, kind="once")


def test_bipartite_rounds_spend_what_one_round_cannot():
    assert bipartite_rounds(28, 11) == [(14, 14, 14), (7, 7, 3)]
    assert bipartite_rounds(5, 5) == []


@pytest.mark.parametrize("kind", KINDS)
def test_counted_macs_equal_the_closed_form(kind):
    model, images = small(image_size=16, depth=3, **kind), pictures(1, side=16)
    cases = [*itertools.product(ACTIONS, ("cls",), ("exact", "published"), (False, True))]
    if kind in ({}, BASE):
        cases += [("drop", score, "exact", False) for score in SCORES]
    for action, score, rule, pooled in cases:
        reduced = reduce_tokens(model, action=action, score=score, rule=rule, pooled_last=pooled, alpha=1.0)
        assert reduced.macs() == operations(reduced, images), (action, score, rule, pooled)
    drop = reduce_tokens(model, alpha=1.0)
    assert drop.macs() < reduce_tokens(model, alpha=1.0, rule="published").macs() < model.config.macs() * 1.1
