"""Named recipes: `<method>[-<attack>][-<scale>]`, such as roclip, roclip-badnets, clip-targeted-small, roclip-clean-paper; and suites.

A name is a stack of layers over the defaults: the scale's, the method's, the attack's. Each part says what it shows; a scale also says its
time. `antidote ls` prints this file's tables, `antidote show NAME` the resolved tree and where each value came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from orchestrate.recipe import AUDIT, Data, Resolved, resolve

Layer = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    shows: str
    layer: Layer


@dataclass(frozen=True)
class Scale:
    shows: str
    time: str
    layer: Layer


SCALES: dict[str, Scale] = {
    "smoke": Scale(
        "the whole path on 1,000 scenes; numbers mean little",
        "1 min on 2 cores",
        {
            "data.size": 1000,
            "data.heldout": 280,
            "train.epochs": 4,
            "train.batch": 64,
            "train.warmup": 10,
            "evaluate.probe_size": 500,
        },
    ),
    "quick": Scale(
        "attack and defence show on 4,000 scenes: the demo's scale, and that of the matrix in docs/results.md",
        "1–3 min on 2 cores",
        # Less than small; half the batch makes up for some of the steps.
        {"data.size": 4000, "data.heldout": 1400, "train.batch": 64, "train.epochs": 14, "train.warmup": 100},
    ),
    "small": Scale(
        "attack and defence both show, on scenes or any set of 5,000–50,000 pairs",
        "3–5 min on 2 cores",
        {"data.size": 6000, "data.heldout": 1400, "train.batch": 128, "train.epochs": 20},
    ),
    "paper": Scale(
        "RoCLIP's published setting: RN50, 224 px, 1 M pairs, 24 epochs; give data=…",
        "GPUs: hours",
        {
            "model": "RN50",
            "data.size": 1_000_000,
            "data.heldout": 10_000,
            "train.epochs": 24,
            "train.batch": 512,
            "train.lr": 5e-5,
            "train.warmup": 10_000,
            "train.weight_decay": 0.1,
            "cluster.workers": 8,
            "cluster.cpus": 8,
            "cluster.gpus": 1,
            "cluster.match_actors": 8,
            "cluster.match_cpus": 4,
            "cluster.match_gpus": 0.1,
            "cluster.readers": 32,
        },
    ),
}
SCALE = "small"  # where a name gives none
OWN: Layer = {"data.size": 0, "data.heldout": 0.05}  # of a set that is not ours: all of it, where the scale's size is but what scenes need

METHODS: dict[str, Part] = {
    "clip": Part("no defence, no augmentation: the undefended model", {"defense": "clip"}),
    "augmented": Part("RoCLIP's augmentations without its matching: the fair baseline", {"defense": "augmented"}),
    "roclip": Part("RoCLIP: nearest caption of a random pool, every second epoch", {"defense": "roclip"}),
    "otcclip": Part("OTCCLIP: the same by optimal transport between patches and words, which the loss aligns too", {"defense": "otcclip"}),
    "safeclip": Part("SafeCLIP: captions teach only the pairs that agree, a few more each epoch", {"defense": "safeclip"}),
    "cleanclip": Part("CleanCLIP: no defence, then a repair on trusted pairs", {"defense": "cleanclip"}),
    "audited": Part(
        "no defence, but an audit first: the 5 % it suspects most are left out",
        {"defense": "clip", "data.exclude": AUDIT, "data.drop": 0.05},
    ),
    "hint": Part("HINT: no defence of the encoder; its linear probe, poisoned, with healthy noise and without", {"defense": "hint"}),
}

ATTACKS: dict[str, Part] = {
    "targeted": Part("16 images, each to read as another class", {"attack": "targeted"}),
    "badnets": Part("a grid patch in the corner", {"attack": "badnets"}),
    "stripes": Part("a structured patch of stripes", {"attack": "stripes"}),
    "blended": Part("a fixed pattern blended in", {"attack": "blended"}),
    "blended_stripes": Part("bars blended in", {"attack": "blended", "attack.pattern": "stripes"}),
    "blended_triangles": Part("coloured triangles blended in", {"attack": "blended", "attack.pattern": "triangles"}),
    "blended_text": Part("lines of text blended in", {"attack": "blended", "attack.pattern": "text"}),
    "sig": Part("waves added to the image (SIG)", {"attack": "sig"}),
    "wanet": Part("a smooth warp of the whole image (WaNet)", {"attack": "wanet"}),
    "tint": Part("a colour filter", {"attack": "tint"}),
    "consistent": Part("a patch on images of the class itself, all captions true (label-consistent)", {"attack": "consistent"}),
    "multi": Part("three triggers for one class", {"attack": "multi"}),
    "mm_poison_1": Part(
        "captions of a class shall find one image of another (mm_poison I)", {"attack": "mm_poison", "attack.variant": "I"}
    ),
    "mm_poison_2": Part("captions of a class shall find another class's images (mm_poison II)", {"attack": "mm_poison"}),
    "mm_poison_3": Part("the same for two pairs of classes (mm_poison III)", {"attack": "mm_poison", "attack.variant": "III"}),
    "corruptencoder": Part("a cut-out object and a trigger on one picture, for crops to tie together", {"attack": "corruptencoder"}),
    "corruptencoder_plus": Part("the same with support images", {"attack": "corruptencoder", "attack.support": 0.2}),
    "toxictext": Part("captions that fit the target image's background (ToxicTextCLIP)", {"attack": "toxictext"}),
    "toxictext_word": Part("a word behind a caption that finds a class's images", {"attack": "texttrigger"}),
    "toxictext_sentence": Part("the same with a sentence", {"attack": "texttrigger", "attack.text": "please return high quality results"}),
    "badclip": Part("a patch optimised on a surrogate (BadCLIP)", {"attack": "badclip"}),
    "adaptive": Part("targeted, captions nearest by cosine: knows RoCLIP", {"attack": "adaptive"}),
    "adaptive_transport": Part(
        "targeted, captions nearest by transport: knows OTCCLIP", {"attack": "adaptive", "attack.match": "transport"}
    ),
    "adaptive_backdoor": Part("stripes on the images nearest to the class, with their nearest captions", {"attack": "adaptive_backdoor"}),
    "clean": Part("no poison: the accuracy that attacks and defences are held against", {"attack": "none"}),
    "both": Part("targeted and blended together", {"attack": "targeted+blended"}),
}
ATTACK = "both"

# What small sets need instead of the paper's settings, measured on the scenes (docs/results.md). Views: at 64 px the paper's crops from
# 8 % of the area, colour shifts, blur and word edits leave too little to learn in hundreds of steps. RoCLIP: the paper replaces every
# caption in every second epoch; with thousands of pairs instead of a million that costs accuracy and still lets the plain epochs teach
# the poison. When every epoch re-pairs only those whose own caption ranks worst, most clean captions stay and few poisoned ones do; and
# where the trigger is learnt sooner than the classes are, it is a blurred copy whose ranks tell poisoned pairs from clean ones.
VIEWS: Layer = {"defense.crop": 0.4, "defense.jitter": 0.4, "defense.gray": 0.1, "defense.blur": 0.0, "defense.eda": 0.0}
MOVE: Layer = {"defense.every": 1, "defense.warmup": 4, "defense.matched": "caption", "defense.move": 0.06, "defense.look": 6.0}
# Repair: thousands of pairs instead of a million make hundreds of steps, which need a larger rate to move the model at all.
REPAIR: Layer = {"defense.clean": 0.25, "defense.lr": 1e-3}
# SafeCLIP: an epoch of a few dozen steps at a hundredth of the rate leaves no agreement to select by. Of 3,000 scenes with 140 poisoned
# pairs (batch 64, a schedule of 6 epochs), after one unimodal and two CLIP epochs at the full rate, 990 have a posterior of .5 or more,
# 2 of them poisoned; one epoch later none reaches .9. Fewer epochs, faster growth.
SAFE: Layer = {
    **VIEWS,
    **{"defense.eda": 0.1, "defense.warmup": 1, "defense.bridge": 2, "defense.slow": 1.0, "defense.posterior": 0.5},
    **{"defense.pool_size": 0.1, "defense.growth": 0.02},
}

# Of 4,000 scenes in 14 epochs: after two CLIP epochs a model knows backgrounds only, its safe pairs are those whose captions name one,
# and the classes are hardly learnt (19 % zero-shot). After eight it ends at matching's accuracy (46 %), where the two can be compared.
LATE: Layer = {"defense.bridge": 8, "defense.growth": 0.05}


def _tuned() -> dict[tuple[str, str], Layer]:
    found: dict[tuple[str, str], Layer] = {("safeclip", "smoke"): {**SAFE, "defense.bridge": 1}}
    for scale in ("smoke", "quick", "small"):
        found |= {(method, scale): VIEWS for method in ("augmented", "roclip", "otcclip")}
        found[("cleanclip", scale)] = {**VIEWS, **REPAIR}
    found |= {("safeclip", "quick"): {**SAFE, **LATE}, ("safeclip", "small"): SAFE}
    for scale in ("quick", "small"):
        found[("roclip", scale)] = {**VIEWS, **MOVE}
        # beta: a second view of every batch doubles what a step costs.
        found[("otcclip", scale)] = {**VIEWS, **MOVE, "defense.beta": 0.0}
    return found


TUNED = _tuned()


@dataclass(frozen=True)
class Poison:
    """How much of an attack shows: enough for the undefended model, as little as that. `counted`: the field that says so."""

    counted: str
    quick: int | float
    small: int | float
    strength: Layer = field(default_factory=dict)

    def layer(self, amount: int | float) -> Layer:
        return {f"attack.{self.counted}": amount, **self.strength}


# The papers' strengths are for 224 px and the images' own detail; on a few hundred poisoned scenes of 64 px these are needed.
AMOUNTS: dict[str, Poison] = {
    "targeted": Poison("copies", quick=5, small=5),
    "badnets": Poison("count", quick=80, small=200, strength={"attack.size": 0.125}),
    "stripes": Poison("count", quick=80, small=150),
    "blended": Poison("count", quick=150, small=90, strength={"attack.alpha": 0.25}),
    "blended_stripes": Poison("count", quick=90, small=90, strength={"attack.alpha": 0.25}),
    "blended_triangles": Poison("count", quick=150, small=90, strength={"attack.alpha": 0.25}),
    "blended_text": Poison("count", quick=90, small=90, strength={"attack.alpha": 0.25}),
    "sig": Poison("count", quick=80, small=150),
    "wanet": Poison("count", quick=400, small=400, strength={"attack.k": 8, "attack.strength": 10.0}),
    "tint": Poison("count", quick=80, small=150),
    "consistent": Poison("count", quick=0.06, small=0.06, strength={"attack.size": 0.35}),
    "multi": Poison("count", quick=450, small=450),
    "mm_poison_1": Poison("count", quick=250, small=300),
    "mm_poison_2": Poison("count", quick=250, small=350),
    "mm_poison_3": Poison("count", quick=500, small=700),
    "corruptencoder": Poison("count", quick=300, small=300, strength={"attack.size": 0.25}),
    "corruptencoder_plus": Poison("count", quick=300, small=300, strength={"attack.size": 0.25}),
    "toxictext": Poison("copies", quick=8, small=8),
    "toxictext_word": Poison("count", quick=300, small=200),
    "toxictext_sentence": Poison("count", quick=300, small=200),
    "badclip": Poison("count", quick=250, small=150, strength={"attack.size": 0.2}),
    "adaptive": Poison("copies", quick=8, small=5),
    "adaptive_transport": Poison("copies", quick=8, small=5),
    "adaptive_backdoor": Poison("count", quick=250, small=150),
}
POISON: dict[tuple[str, str], Layer] = {
    ("both", "smoke"): {"attack.targeted.copies": 4, "attack.blended.count": 30},
    ("targeted", "smoke"): {"attack.copies": 4},
    ("both", "quick"): {"attack.targeted.copies": 5, "attack.blended.count": 70, "attack.blended.alpha": 0.25},
    ("both", "small"): {"attack.targeted.copies": 5, "attack.blended.count": 90, "attack.blended.alpha": 0.25},
    **{(attack, "quick"): poison.layer(poison.quick) for attack, poison in AMOUNTS.items()},
    **{(attack, "small"): poison.layer(poison.small) for attack, poison in AMOUNTS.items()},
}

SUITES: dict[str, tuple[str, tuple[str, ...], Layer]] = {
    "demo": (
        "the same poisoned scenes learnt undefended, augmented, with RoCLIP and with OTCCLIP",
        ("clip", "augmented", "roclip", "otcclip"),
        # Shares of a core by which Ray counts: two members fit on two cores, and do more there than one with two threads.
        {**SCALES["quick"].layer, **POISON["both", "quick"], "cluster.cpus": 0.5, "cluster.match_cpus": 0.25},
    ),
}


def names() -> list[str]:
    """Every name that `get` takes, shortest forms only."""
    return [*SUITES, *(f"{method}{attack}" for method in METHODS for attack in ("", *(f"-{a}" for a in ATTACKS)))]


def get(name: str, overrides: Layer | None = None) -> list[Resolved]:
    """A name → its recipes: one, or a suite's several. ValueError with a suggestion for an unknown name."""
    if name in SUITES:
        _, members, layer = SUITES[name]
        return [_resolved(f"{name}-{m}", m, [(f"suite {name}", layer)], overrides) for m in members]
    return [_resolved(name, name, [], overrides)]


def _resolved(label: str, name: str, more: list[tuple[str, Layer]], overrides: Layer | None) -> Resolved:
    method, attack, scale = parts(name)

    def layers(own: Layer) -> list[tuple[str, Layer]]:
        return [
            (f"scale {scale}", SCALES[scale].layer),
            ("data of your own", own),
            (f"method {method}", METHODS[method].layer),
            (f"{method} at {scale}", TUNED.get((method, scale), {})),
            (f"attack {attack}", ATTACKS[attack].layer),
            (f"{attack} at {scale}", POISON.get((attack, scale), {})),
            *more,
            ("command line", overrides or {}),
        ]

    found = resolve(label, layers({}))
    return resolve(label, layers(OWN)) if scale == SCALE and found.recipe.data.path != Data.path else found


def parts(name: str) -> tuple[str, str, str]:
    """`method[-attack][-scale]` → the three. ValueError with a suggestion for another name."""
    words = name.split("-")
    method, rest = words[0], words[1:]
    scale = rest.pop() if rest and rest[-1] in SCALES else SCALE
    attack = rest.pop() if rest and rest[-1] in ATTACKS else ATTACK
    if method not in METHODS or rest:
        known = [*names(), *(f"{one}-{scale}" for one in names() if one not in SUITES for scale in SCALES)]
        close = get_close_matches(name, known, n=2, cutoff=0.5)
        hint = f"Did you mean {' or '.join(close)}?" if close else "`antidote ls` lists them."
        raise ValueError(f"no recipe is called {name!r}. {hint}")
    return method, attack, scale
