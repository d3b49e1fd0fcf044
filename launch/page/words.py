"""The words that two texts share, and where they stand."""

import re

WORD = re.compile(r"\w+(?:['’]\w+)*")
# Too common to say anything about two texts; words of one or two letters are left out too.
COMMON_WORDS = """
about all also and any are because been but can could did does for from had has have her here him his how
into its it's just more most not now off one only other our out over she should some such than that the
their them then there these they this those too very was were what when where which while who will with
would you your
"""
COMMON = frozenset(COMMON_WORDS.split())


def telling_words(text: str) -> set[str]:
    """Return the words of a text that tell something, in lower case."""
    found = {word.casefold() for word in WORD.findall(text)}
    return {word for word in found if word not in COMMON and (len(word) > 2 or not word.isascii())}


def marked(text: str, shared: set[str]) -> list[tuple[str, bool]]:
    """Return the text in pieces, each with whether it is a shared word; joined they are the text again."""
    pieces: list[tuple[str, bool]] = []
    end = 0
    for match in WORD.finditer(text):
        if match.group().casefold() in shared:
            pieces += [(text[end : match.start()], False), (match.group(), True)]
            end = match.end()
    return [piece for piece in [*pieces, (text[end:], False)] if piece[0]]
