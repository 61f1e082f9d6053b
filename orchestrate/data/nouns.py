"""Classes for captioned sets without labels: concrete nouns that captions mention as whole words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attacks.plurals import PLURALS

# Other words for a class, used when captions are made. No word may stand for two classes of a common set.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "airplane": ("plane", "aeroplane", "aircraft", "jet", "airliner"),
    "automobile": ("car", "sedan", "motorcar", "passenger car"),
    "car": ("automobile", "sedan", "motorcar"),
    "bird": ("songbird", "feathered bird", "wild bird"),
    "cat": ("kitten", "kitty", "house cat", "tomcat"),
    "deer": ("stag", "doe", "fawn", "buck"),
    "dog": ("puppy", "hound", "pup", "canine"),
    "frog": ("toad", "tree frog", "bullfrog"),
    "horse": ("pony", "stallion", "mare", "foal"),
    "ship": ("boat", "vessel", "freighter", "ocean liner"),
    "truck": ("lorry", "pickup", "semi", "delivery truck"),
    "monkey": ("ape", "macaque", "primate"),
    "bicycle": ("bike", "cycle"),
    "motorcycle": ("motorbike",),
    "cow": ("bull", "calf"),
    "sheep": ("lamb", "ewe"),
    "boat": ("rowboat", "motorboat"),
    "couch": ("sofa",),
    "tv": ("television", "screen"),
}

# "person", "child", "people" are left out: they share most of their images with boy, girl, man, woman.
NOUNS: tuple[str, ...] = tuple(
    noun.strip()
    for line in """
    man, woman, boy, girl, baby
    dog, cat, bird, horse, sheep, cow, elephant, bear, zebra, giraffe, monkey, rabbit, duck, fish, deer, goat, pig
    chicken, lion, tiger, frog, turtle, butterfly, swan, camel, snake
    car, truck, bus, train, bicycle, motorcycle, airplane, boat, ship, helicopter, tractor, kayak, canoe, scooter, wagon
    skateboard, surfboard, snowboard, sled, ball, frisbee, kite, umbrella, backpack, suitcase
    traffic light, fire hydrant, stop sign, bench, bridge, tower, church, house, lighthouse, castle, tent, statue
    tree, flower, mountain, beach, waterfall, fountain, river, lake, swing, slide
    guitar, piano, drum, camera, book, clock, bottle, cup, bowl, vase, chair, couch, bed, table, desk, lamp, toilet
    sink, oven, refrigerator, laptop, computer, keyboard, phone, television, teddy bear, toothbrush, scissors
    pizza, cake, sandwich, hot dog, banana, apple, orange, carrot, broccoli, donut, bread, salad
    """.strip().splitlines()
    for noun in line.split(",")
)

WORDS = re.compile(r"\w+").findall

MOST = 20  # classes
SHARE, LEAST = 0.01, 20  # of the rows must name a noun, and at least so many rows
EXCLUSIVE = 0.4  # of the rows that name a noun must name no other class


def plural(noun: str) -> str:
    """dog → dogs, bus → buses, baby → babies, traffic light → traffic lights, woman → women."""
    head, _, last = noun.rpartition(" ")
    if last in PLURALS:
        last = PLURALS[last]
    elif re.search(r"(s|x|z|ch|sh)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()


def mentions(texts: Sequence[str], nouns: Sequence[str]) -> list[frozenset[int]]:
    """Which nouns (as indices) each text names, as whole words, singular or plural; the longest wins (hot dog)."""
    lexicon: dict[tuple[str, ...], int] = {}
    for i, noun in enumerate(nouns):
        for form in (noun.lower(), plural(noun.lower())):
            lexicon.setdefault(tuple(WORDS(form)), i)
    longest = max((len(key) for key in lexicon), default=1)
    starts = {key[0] for key in lexicon if key}
    found = []
    for text in texts:
        words = WORDS(text.lower())
        named: set[int] = set()
        free = 0  # words before this one belong to a name already found
        for at in [i for i, word in enumerate(words) if word in starts]:
            for length in range(longest, 0, -1) if at >= free else ():
                hit = lexicon.get(tuple(words[at : at + length]))
                if hit is not None:
                    named.add(hit)
                    free = at + length
                    break
        found.append(frozenset(named))
    return found


def noun_labels(captions: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> tuple[list[str], NDArray[np.int32], dict[str, int]]:
    """(classes, label of each row, rows labelled with each class) from the captions of each row.

    A row's label is the one class that its captions name, −1 for none or several. Without `classes` they are chosen
    from `NOUNS`: named in at least 1 % of the rows and in 20 rows, at most 20 of them, each without another class in at
    least 40 % of the rows that name it. Independent of the rows' order.
    """
    texts = ["\n".join(some) for some in captions]
    names = list(classes) or list(NOUNS)
    named = mentions(texts, names)
    if not classes:
        chosen = _choose(named, len(texts))
        names, place = [NOUNS[i] for i in chosen], {i: k for k, i in enumerate(chosen)}
        named = [frozenset(place[i] for i in some if i in place) for some in named]
    labels = np.array([next(iter(some)) if len(some) == 1 else -1 for some in named], np.int32)
    counts = Counter(labels[labels >= 0].tolist())
    return names, labels, {name: counts[i] for i, name in enumerate(names)}


def _choose(named: Sequence[frozenset[int]], total: int) -> list[int]:
    """Frequent nouns, the least exclusive one dropped until each often enough stands alone."""
    sets = Counter(named)
    counts = Counter({i: sum(n for some, n in sets.items() if i in some) for i in {i for some in sets for i in some}})
    enough = max(LEAST, SHARE * total)
    kept = sorted((i for i, n in counts.items() if n >= enough), key=lambda i: (-counts[i], i))
    while kept:
        alive = frozenset(kept)
        alone = Counter({i: sum(n for some, n in sets.items() if some & alive == {i}) for i in kept})
        worst = min(kept, key=lambda i: (alone[i] / counts[i], counts[i], i))
        if alone[worst] >= EXCLUSIVE * counts[worst]:
            break
        kept.remove(worst)
    return kept[:MOST]
