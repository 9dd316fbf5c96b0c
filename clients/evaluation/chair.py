"""CHAIR (Rohrbach et al. 2018, arXiv 1809.02156): objects in captions that are not in the image.

CHAIRi is the share of hallucinated mentions among all mentions of objects, CHAIRs the share of captions with at least
one; beside them the share of the images' objects that are mentioned. Every mention counts, of one object too.

Objects are the words of a synonyms file, one object a line, its name first and its synonyms after it, separated by
commas (the authors' ``synonyms.txt``). The longest phrase counts, words are taken in the singular, and the authors'
rules for phrases that only look like an object hold: a baby bird is a bird, a passenger train a train, a bow tie a tie,
a toilet seat a toilet. Plurals are undone by rule here, where the authors' script asks a dictionary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steersman.clients.evaluation.asking import Question
from steersman.clients.evaluation.benchmark import Counts, Scores, share

CAPTION = "Please describe this image in detail."
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
READ_AS = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS}
READ_AS |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}
IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose"}
ALIKE = ("bus", "glass", "gas", "tennis", "scissors", "skis", "sheep")  # end in s, or do not change


class Objects:
    """Finds objects in texts. ``synonyms``: of each object its name and its other words."""

    def __init__(self, synonyms: Iterable[Sequence[str]]) -> None:
        self._name: dict[tuple[str, ...], str] = {}
        for first, *others in synonyms:
            for phrase in (first, *others):
                self._name.setdefault(_words(phrase), first)
        for phrase, meant in READ_AS.items():  # what means nothing here hides what it would be taken for
            self._name.setdefault(_words(phrase), self._name.get(_words(meant), ""))
        self._longest = max(map(len, self._name))

    @classmethod
    def read(cls, file: Path) -> Objects:
        lines = [[w.strip() for w in line.split(",") if w.strip()] for line in file.read_text().splitlines()]
        if not any(lines):
            raise ValueError(
                f"{file} names no objects: one a line, its name and then its synonyms, with commas between"
            )
        return cls(line for line in lines if line)

    def mentioned(self, text: str) -> list[str]:
        """The names of the objects, mention by mention."""
        words, found, at = _words(text), [], 0
        while at < len(words):
            for length in range(min(self._longest, len(words) - at), 0, -1):
                name = self._name.get(words[at : at + length])
                if name is not None:
                    found += [name] if name else []
                    at += length
                    break
            else:
                at += 1
        return found

    def named(self, word: str) -> str:
        """An object's name by one of its words, or the word itself."""
        return self._name.get(_words(word)) or word


def _words(text: str) -> tuple[str, ...]:
    return tuple(_singular(word) for word in re.findall(r"[a-z0-9']+", text.lower()))


def _singular(word: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word in ALIKE or len(word) < 4 or not word.endswith("s") or word.endswith("ss"):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith("ves"):
        return {"knives": "knife", "loaves": "loaf", "calves": "calf"}.get(word, word[:-1])
    return word[:-2] if re.search(r"(s|x|z|ch|sh|o)es$", word) and word not in ("shoes", "vases") else word[:-1]


@dataclass(frozen=True)
class Chair:
    questions: Sequence[Question]
    truth: Sequence[frozenset[str]]  # the objects of each image, by name
    objects: Objects
    name: str = "chair"

    @classmethod
    def read(
        cls,
        file: Path,
        images: Path,
        synonyms: Path | None = None,
        captions: Path | None = None,
        text: str = CAPTION,
        limit: int | None = None,
    ) -> Chair:
        """``file``: JSON lines of ``{"image", "objects": [..]}``, or COCO's ``instances_*.json``.

        Without ``synonyms`` the objects named in the file are all there are. ``captions``: COCO's ``captions_*.json``,
        whose objects are in the image too. Of COCO's images those that are in the folder are asked about.
        """
        there = _coco(file, images) if file.suffix == ".json" else _lines(file)
        if not there:
            raise ValueError(f"{file} names no image" + (f" that is in {images}" if file.suffix == ".json" else ""))
        names = sorted(set().union(*there.values()))
        objects = Objects.read(synonyms) if synonyms else Objects([name] for name in names)
        truth = {image: {objects.named(name) for name in named} for image, named in there.items()}
        for image, said in _captions(captions) if captions else ():
            if image in truth:
                truth[image].update(objects.mentioned(said))
        questions = [Question(str(i), images / image, text) for i, image in enumerate(truth)]
        return cls(questions[:limit], [frozenset(each) for each in truth.values()][:limit], objects)

    def counts(self, answers: Sequence[str]) -> Counts:
        """Mentions, hallucinated ones, captions, those with one, objects that are there, those mentioned."""
        rows = []
        for answer, truth in zip(answers, self.truth, strict=True):
            said = self.objects.mentioned(answer)
            wrong = sum(name not in truth for name in said)
            rows.append((len(said), wrong, 1, wrong > 0, len(truth), len(truth & set(said))))
        return np.array(rows, np.int64)

    def scores(self, sums: Counts) -> Scores:
        mentions, wrong, captions, bad, there, told = (sums[..., i] for i in range(6))
        return {
            "chair_i": share(wrong, mentions),
            "chair_s": share(bad, captions),
            "recall": share(told, there),
            "mentions": share(mentions, captions),
        }

    def told(self, index: int) -> dict[str, Any]:
        return {"objects": sorted(self.truth[index])}


def _lines(file: Path) -> dict[str, set[str]]:
    out: dict[str, set[str]] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            image, named = given["image"], given["objects"]
            if not (isinstance(image, str) and isinstance(named, list) and all(isinstance(n, str) for n in named)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{file}, line {number}: must be {{"image", "objects": [names]}}') from None
        out.setdefault(image, set()).update(named)
    return out


def _coco(file: Path, images: Path) -> dict[str, set[str]]:
    given = _json(file, "images", "annotations", "categories")
    category = {each["id"]: each["name"] for each in given["categories"]}
    name = {e["id"]: e["file_name"] for e in given["images"] if (images / e["file_name"]).is_file()}
    out: dict[str, set[str]] = {each: set() for each in name.values()}
    for each in given["annotations"]:
        if each["image_id"] in name:
            out[name[each["image_id"]]].add(category[each["category_id"]])
    return out


def _captions(file: Path) -> list[tuple[str, str]]:
    """Images and what is said of them."""
    given = _json(file, "images", "annotations")
    name = {each["id"]: each["file_name"] for each in given["images"]}
    return [(name[each["image_id"]], each["caption"]) for each in given["annotations"]]


def _json(file: Path, *keys: str) -> Mapping[str, Any]:
    try:
        given = json.loads(file.read_text())
    except ValueError:
        given = None
    if not isinstance(given, dict) or not set(keys) <= set(given):
        raise ValueError(f"{file}: must be one of COCO's files, with {', '.join(keys)}")
    return given
