"""Plain measures of a text, by word lists: how French it is, how joyful, and whether it refuses.

They are meant to compare answers to the same questions, unsteered and steered, and to be checked by eye. None knows
grammar or negation ("not happy" counts as joyful), and a text that repeats one word is rated by that word.
"""

import re
import unicodedata
from functools import cache
from importlib import resources

REFUSAL = re.compile(r"\b(sorry|apologi[sz]e|cannot|can't|unable|not able to|won't|will not|decline|afraid)\b", re.I)
OPENING = 100  # characters of an answer in which a refusal is told
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
# French words that lose their vowel before another: "l'eau" is two words, "l'" and "eau".
ELIDED = frozenset({"l", "d", "j", "m", "t", "s", "n", "c", "qu", "jusqu", "lorsqu", "puisqu", "quelqu"})


def french_share(text: str) -> float:
    """French words / (French + English words), 0 to 1; 0 when no word is known.

    A word counts as French when it is in the French list only, as English when it is in the English list only; words
    in both ("on", "me", "table") and words in neither are left out. An elided article or pronoun counts as one French
    word and what follows it as another. An English contraction counts by the part before its apostrophe.
    """
    both = _words("french_words") & _words("english_words")
    french, english = _words("french_words") - both, _words("english_words") - both
    n_french = n_english = 0
    for word in _split(text):
        while "'" in word and word not in french and word not in english:
            head, rest = word.split("'", 1)
            if head in ELIDED:
                n_french += 1
                word = rest
            else:
                word = head
        n_french += word in french
        n_english += word in english
    return n_french / (n_french + n_english) if n_french + n_english else 0.0


def joy_score(text: str) -> float:
    """100 · (joyful − gloomy words) / words, −100 to 100; 0 for a text without words."""
    words = _split(text)
    joyful, gloomy = _words("joyful_words"), _words("gloomy_words")
    balance = sum((word in joyful) - (word in gloomy) for word in words)
    return 100.0 * balance / len(words) if words else 0.0


def refuses(text: str) -> bool:
    """Whether an answer opens as refusals do. Words again: "I can't wait to tell you" counts as one."""
    return REFUSAL.search(text[:OPENING].replace("’", "'")) is not None


def _split(text: str) -> list[str]:
    """The text's words in lower case, accents composed, apostrophes straight."""
    return WORD.findall(unicodedata.normalize("NFC", text).replace("’", "'").lower())


@cache
def _words(name: str) -> frozenset[str]:
    """The words of `data/<name>.txt`; a line that starts with # is a remark."""
    text = (resources.files(__package__) / "data" / f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return frozenset(unicodedata.normalize("NFC", "\n".join(lines)).split())
