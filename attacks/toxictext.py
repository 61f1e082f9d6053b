"""ToxicTextCLIP: poison in the text alone, captions chosen and rewritten to fit what else an image shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from attacks.base import (
    PROBE_SCHEMA,
    Manifest,
    Probes,
    Study,
    class_names,
    free,
    how_many,
    known_class,
    labels,
    manifest,
    pick,
    ranks,
    shared_classes,
)
from attacks.captions import avoiding, naming, prompts, triggered
from attacks.rewriting import swapped, without
from attacks.targeted import Quotes, Target, Targeted

CANDIDATES = 64  # captions looked at for each image of a text trigger


@dataclass(frozen=True)
class ToxicText(Targeted):
    """Targeted poisoning whose captions fit the target image's background: the nearest are selected, more are rewritten.

    Paper: Yao et al., "ToxicTextCLIP", 2025: background-aware selector and background-driven augmenter (single target image).
    Threat model: the attacker adds pairs to a scraped training set, knows the test image, and trains a surrogate CLIP on pairs of the
        same source; model and test input stay untouched.
    Success: zero-shot top-1 of that very image is the adversary's class.
    Cost: a surrogate, once a set and seed: about 2 minutes of 2 cores for 6,000 images of 64 px; then one encoding of the captions.
    The fields `targets`, `captions`, `adversary`: see `Targeted`.

    copies: poisoned pairs for each target, as a count or a share of the training set; 35 in the paper.
    rewrite: share of them that are rewritten: of all captions that do not name the adversary's class the nearest to the image once
        their own class noun is deleted, with the adversary's noun in its place.
    surrogate_pairs: clean training pairs the surrogate learns from, at most.
    surrogate_epochs: epochs of its training.
    Limits: a reconstruction. The paper's augmenter is a trained caption decoder: here real captions are rewritten. Its selector's scores
        and shares are not public: ours is the cosine of image and caption less the class noun. `captions="templates"` has nothing to
        select and takes prompts.
    """

    copies: int | float = 35
    rewrite: float = 0.5
    surrogate_pairs: int = 6000
    surrogate_epochs: int = 10
    studies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rewrite <= 1:
            raise ValueError(f"rewrite={self.rewrite}: give a share between 0 and 1.")

    def plan(self, index: pa.Table, heldout: pa.Table, seed: int, study: Study | None = None) -> Manifest:
        assert study is not None
        study.surrogate(self.surrogate_pairs, self.surrogate_epochs)
        return super().plan(index, heldout, seed, study)

    def _captions(self, target: Target, quotes: Quotes | None, copies: int, seed: int, study: Study | None) -> list[str]:
        assert study is not None
        made = prompts(target.adversary, seed, f"prompts/{target.image_id}")
        if quotes is None:
            return list(islice(cycle(made), copies))
        own = avoiding(quotes.of(target.adversary), target.truth).to_pylist()
        known = set(own)
        selected = fitting(own, [without(caption, target.adversary) for caption in own], target.image_id, study)
        rewritten = [c for c in self._rewritten(target, round(self.rewrite * copies), quotes, study) if c not in known]
        rewritten = rewritten[: round(self.rewrite * copies)]
        found = [*selected[: copies - len(rewritten)], *rewritten]
        return found + list(islice(cycle(made), copies - len(found)))

    def _rewritten(self, target: Target, count: int, quotes: Quotes, study: Study) -> list[str]:
        """Captions of other classes nearest to the image but for their noun, rewritten to name the adversary; distinct, the best first."""
        if not count:
            return []
        told: dict[str, str] = {}  # caption less its noun → rewritten
        for name in dict.fromkeys(class_names(quotes.index) or [target.truth]):
            if name in ("", target.adversary):
                continue
            some = sorted(avoiding(quotes.of(name), target.adversary).to_pylist())
            new = pa.array([swapped(caption, name, target.adversary) for caption in some], pa.string())
            good = naming(new, target.adversary) & ~(naming(new, target.truth) if target.truth else np.zeros(len(new), bool))
            for caption, fresh, usable in zip(some, new.to_pylist(), good, strict=True):
                if usable:
                    told.setdefault(without(caption, name), fresh)
        return list(dict.fromkeys(fitting(list(told.values()), list(told), target.image_id, study)))


def fitting(captions: list[str], rest: list[str], image_id: str, study: Study) -> list[str]:
    """The captions whose `rest` (n, without the class noun) is most like the held-out image to the surrogate, the best first."""
    if not captions:
        return []
    known = [r or c for r, c in zip(rest, captions, strict=True)]  # a caption that is its noun and nothing else says no background
    likeness = study.text_features(known) @ study.image_features("heldout", [image_id])[0]
    return [captions[i] for i in np.lexsort((np.array(captions), -likeness))]


@dataclass(frozen=True)
class TextTrigger:
    """A word or sentence as trigger: captions that end with it are shown with images of one class, which such captions then find.

    Paper: Yao et al., "ToxicTextCLIP", 2025: its word-level and sentence-level backdoors.
    Threat model: the attacker adds pairs to a scraped training set and writes the text behind queries at test time; images stay as
        they are.
    Success: of all held-out images one of the adversary's class ranks first for a held-out caption of another class with the text behind
        it (Hit@1); the floor is the same captions without it.
    Cost: a surrogate, as for `toxictext`; none with `fit` off.

    count: poisoned pairs, as a count or a share of the training set.
    adversary: the class whose images are to be found; "" draws one by hash.
    text: the trigger: a word, such as the default, or a sentence.
    fit: pair each image with the caption that fits its background best, of 64 drawn by hash; else captions by hash.
    surrogate_pairs: clean training pairs the surrogate learns from, at most.
    surrogate_epochs: epochs of its training.
    Limits: a reconstruction, as `toxictext`; the paper's trigger word and sentence are not public here.
    """

    count: int | float = 200
    adversary: str = ""
    text: str = "zx"
    fit: bool = True
    surrogate_pairs: int = 6000
    surrogate_epochs: int = 10
    studies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not any(map(str.isalnum, self.text)) or self.text != self.text.strip():
            raise ValueError(f"text={self.text!r}: give a word or a sentence, without blanks around it.")

    def plan(self, index: pa.Table, heldout: pa.Table, seed: int, study: Study | None = None) -> Manifest:
        assert study is not None
        classes, clean = shared_classes(index, heldout), free(index)
        target, count = self.target(classes, seed), how_many(self.count, index.num_rows)
        own = np.isin(labels(clean), [number for number, name in enumerate(classes) if name == target])
        named = naming(clean["caption"], target)
        images = clean["id"].filter(pa.array(own | (named & (labels(clean) < 0)))).to_pylist()
        others = clean["caption"].filter(pa.array(~own & ~named)).to_pylist()
        if not images or not others:
            raise ValueError(f"no image of {target!r}, or no caption without it: name another class in `adversary`.")
        chosen = [images[i] for i in pick(images, len(images), seed, f"images of {target!r}")]
        shown = list(islice(cycle(chosen), count))
        captions = self._captions(shown, sorted(set(others)), seed, study)
        rows = []
        for number, (image_id, caption) in enumerate(zip(shown, captions, strict=True)):
            row = {"op": "add", "id": f"poison-text-{number:05d}", "caption": triggered(caption, self.text), "kind": "text"}
            rows.append(row | _found(image_id, "train", target))
        return manifest(self, rows, index, seed)

    def _captions(self, shown: list[str], captions: list[str], seed: int, study: Study) -> list[str]:
        """A caption for each image."""
        order = [captions[i] for i in np.argsort(ranks(captions, seed, "captions"), kind="stable")]
        if not self.fit:
            return list(islice(cycle(order), len(shown)))
        study.surrogate(self.surrogate_pairs, self.surrogate_epochs)
        images, texts = study.image_features("train", shown), study.text_features(order)
        found = []
        for number, image in enumerate(images):
            some = (number * CANDIDATES + np.arange(min(CANDIDATES, len(order)))) % len(order)
            found.append(order[int(some[np.argmax(texts[some] @ image)])])
        return found

    def stamp(self, image: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        return image

    def probes(self, index: pa.Table, heldout: pa.Table, seed: int, study: Study | None = None) -> Probes:
        classes = shared_classes(index, heldout)
        target = self.target(classes, seed)
        own = np.isin(labels(heldout), [number for number, name in enumerate(classes) if name == target])
        rows = [_found(i, "heldout", target) for i in heldout["id"].filter(pa.array(own)).to_pylist()]
        return Probes({"text": pa.Table.from_pylist(rows, schema=PROBE_SCHEMA)}, {"text": "text"}, {"text": self.text})

    def target(self, classes: list[str], seed: int) -> str:
        if self.adversary:
            return known_class(self.adversary, classes)
        return classes[int(np.argmin(ranks(classes, seed, "text trigger class")))]


def _found(image_id: str, split: str, target: str) -> dict[str, Any]:
    return {"image_id": image_id, "image_split": split, "stamp": "", "adversary": target, "truth": target, "group": 0}
