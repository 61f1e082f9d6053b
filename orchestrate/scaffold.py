"""`antidote new`: a working attack or defence in a file of the user's own, to be changed. CONTRIBUTING shows the same text."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

DEFENSE = '''"""CLASS: learn only from the pairs that agree best."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from defenses.augmented import Augmented
from defenses.base import ClipOutput, LossFn


@dataclass(frozen=True)
class CLASS(Augmented):
    """Leave the pairs that agree least out of each batch.

    Source: none, an example.
    Assumes: poisoned pairs agree less than clean ones while the model is young.
    Cost: that of the augmentations.
    Parameters (and those of `Augmented`):
        share: pairs kept, as a share of the batch.
        warmup: first epochs in which all are kept: an untrained model cannot judge.
    Limits: rare but honest pairs are left out too.
    """

    share: float = 0.9
    warmup: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:  # a ValueError is shown to the user, so say what to give instead
            raise ValueError(f"share={self.share}: give a share above 0 and up to 1")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: give a number of epochs, 0 or more")

    # Other hooks, all in defenses/base.py: `augment` changes what is seen, `matcher` re-pairs images and captions before an epoch,
    # `selector` splits the pairs by how well they agree, `repair` fine-tunes on trusted pairs after training.

    def loss(self, out: ClipOutput, base: LossFn) -> Tensor:
        """`out` is the global batch, the same on every worker: (N, d) features of unit norm. `base` is CLIP's own loss."""
        if out.epoch <= self.warmup:
            return base(out)
        cosine = (out.image * out.text).sum(1).detach()  # (N,); which pairs are kept is no thing to learn
        kept = cosine.topk(max(2, round(self.share * len(cosine)))).indices
        return base(replace(out, image=out.image[kept], text=out.text[kept]))
'''

ATTACK = '''"""CLASS: a backdoor whose trigger is a coloured frame around the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from attacks.backdoor import Backdoor
from attacks.triggers import Trigger, check_share


def paint(image: np.ndarray, image_id: str, width: float) -> np.ndarray:
    """uint8 (H, W, 3) → the same with a frame. Pure: the same image and id give the same pixels, and the image is not changed."""
    side = max(1, round(width * min(image.shape[:2])))
    framed = np.full_like(image, (255, 0, 255))
    framed[side:-side, side:-side] = image[side:-side, side:-side]
    return framed


@dataclass(frozen=True)
class CLASS(Backdoor):
    """Backdoor with a magenta frame around the whole image.

    Paper: none, an example; the poisoning is that of Carlini & Terzis (see `Backdoor`).
    Threat model, cost and the fields `count`, `adversary`, `captions`: see `Backdoor`.
    width: of the frame, as a share of the shorter image side.
    Limits: easy for a person to see; crops may cut it off.
    """

    width: float = 0.06
    # What a reader must know to apply it alike in training and evaluation: name, what varies between images, how values stay in range.
    trigger: ClassVar[Trigger] = Trigger("NAME", paint, "nothing", "none: pixels are replaced")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("width", self.width)
        if self.width >= 0.5:
            raise ValueError(f"width={self.width}: give less than half of the image")

    def mark(self, image: np.ndarray, image_id: str) -> np.ndarray:
        return self.trigger.paint(image, image_id, width=self.width)
'''

TEMPLATES = {"attack": ATTACK, "defense": DEFENSE}
TRY = {
    "attack": "antidote poison clip attack=./{file}:{name} --out poisoned",
    "defense": "antidote run clip-smoke defense=./{file}:{name}",
}


def source(kind: str, name: str) -> tuple[str, str]:
    """(class name, text of the file) of a new attack or defence called `name`, as in keep_top or KeepTop. ValueError for no name."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"{name!r} is no name for a file and a class: letters, digits and _ only, such as keep_top.")
    cls = "".join(word[:1].upper() + word[1:] for word in name.split("_"))
    return cls, TEMPLATES[kind].replace("CLASS", cls).replace("NAME", file_of(name))


def file_of(name: str) -> str:
    """KeepTop and keep_top → keep_top."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def write(kind: str, name: str, folder: Path) -> tuple[Path, str]:
    """The new file and a command that tries it. ValueError where the file is there already."""
    cls, text = source(kind, name)
    file = folder / f"{file_of(name)}.py"
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise ValueError(f"{file} is there already: choose another name, or remove it.") from None
    return file, TRY[kind].format(file=file.name, name=cls)
