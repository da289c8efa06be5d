"""The README's computed parts."""

import pytest

from vitlab.run import readme
from vitlab.run.notebooks import project


def test_readme_parts_are_filled_between_their_markers_only():
    text = "a\n<!-- results -->\nold\n<!-- /results -->\nb\n<!-- status -->\n<!-- /status -->\n"
    filled = readme.fill(text, {"results": "new\n", "status": "ran\n"})
    assert filled == "a\n<!-- results -->\nnew\n<!-- /results -->\nb\n<!-- status -->\nran\n<!-- /status -->\n"
    with pytest.raises(ValueError, match="0 pairs of <!-- status -->"):
        readme.fill(text.replace("<!-- status -->", ""), {"status": ""})


def test_the_readme_says_what_the_committed_rows_say():
    assert not readme.stale(project().source), "README.md is stale: run `vitlab readme`"
