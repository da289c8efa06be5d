"""A notebook's sentences for readers who do not know the names of its arms."""

import re

from vitlab.study import zoo


def words(text):
    """How many words a Markdown text has."""
    return len(re.findall(r"\S*\w\S*", text))


def titled(text):
    """`text` with the models of vitlab/study/zoo.py called by their titles: "S3/baseline-small" becomes "Token
    pruning's small baseline". Longer names of arms ("S3/baseline-pruned") stay as they are.
    """
    names = "|".join(map(re.escape, sorted(zoo.SPECS | zoo.OTHERS, key=len, reverse=True)))

    def title(found):
        owner, rest = re.fullmatch(r"((?:our|.+?'s) )?(.+)", zoo.get(found["name"]).title).groups("")
        # a shorter word: README holds a finding fewer with "conv-stem baseline"
        said = owner + (f"{found['size']} " if found["size"] else "") + rest.replace("conv-stem baseline", "ViT")
        return said[0].upper() + said[1:] if re.search(r"(^|[.:] |\.\*\* )$", text[: found.start()]) else said

    return re.sub(rf"(?<![\w/-])(?P<name>{names})(?:-(?P<size>small|large|tiny))?(?![\w/-])", title, text)
