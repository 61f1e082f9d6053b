"""Augmentation alone: the fair baseline beside every augmented defence."""

from __future__ import annotations

from dataclasses import dataclass, replace

from defenses.augment import ImageAugment
from defenses.base import Batch, Defense
from defenses.text import augment_captions

JITTER = (0.5, 0.5, 0.5, 0.1)  # brightness, contrast, saturation, hue of the released code


@dataclass(frozen=True)
class Augmented(Defense):
    """Plain CLIP on RoCLIP's augmented images and captions, without RoCLIP's matching.

    Source: the augmentations of RoCLIP (Yang, Gao & Mirzasoleiman, NeurIPS 2023, arXiv 2303.06854), text by EDA
        (Wei & Zou, EMNLP 2019, arXiv 1901.11196). Defaults are the released code's.
    Assumes: a trigger or a memorised image does not survive strong views; no clean data is needed.
    Cost: about 0.1 ms of one CPU core an image at 64 px, 6 ms at 224 px (matrix products, so little on a GPU);
        7 µs a caption.
    Parameters:
        image_augment, text_augment: on or off (paper: both on, in every epoch).
        crop: smallest crop, as a share of the area (paper .08; 1 = the whole image).
        local: where a method takes two views, the second is cropped inside the first one's crop, its sides larger by this share: localized
            cropping, CorruptEncoder's countermeasure (Zhang et al., CVPR 2024: .2), so that no two views hold an object in one and a
            trigger elsewhere in the other; negative (the default): anywhere.
        flip: probability of a mirror image (paper .5).
        jitter: times the paper's colour strengths (.5, .5, .5, hue .1), applied to 80 % of the images (paper 1; 0 = off).
        gray: probability of greyscale (paper .2).
        blur: largest Gaussian sigma, in px of a 224 px image (paper 2, smallest .1, always on; 0 = off).
        eda: share of a caption's words that change (paper .1; 0 = off).
        synonyms: path of a synonym table, one group a line, commas between; None: the built-in table.
    Limits: jitter and greyscale belie captions that name colours, mirroring those that say left or right; strong crops may
        leave the caption's object out; the built-in synonyms are English and few (EDA's own source is WordNet).
    """

    image_augment: bool = True
    text_augment: bool = True
    crop: float = 0.08
    local: float = -1.0
    flip: float = 0.5
    jitter: float = 1.0
    gray: float = 0.2
    blur: float = 2.0
    eda: float = 0.1
    synonyms: str | None = None

    def __post_init__(self) -> None:
        for name in ("flip", "gray", "eda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a share between 0 (off) and 1")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop={self.crop}: give the smallest share of the area, above 0 and up to 1")
        if self.local >= 0 and self.view_count < 2:
            raise ValueError(
                f"local={self.local}: localizes a second view; this method takes one (safeclip, and otcclip with beta, take two)"
            )
        if not 0 <= self.jitter <= 2:
            raise ValueError(f"jitter={self.jitter}: give a multiple of the paper's strengths, 0 (off) to 2")
        if self.blur < 0:
            raise ValueError(f"blur={self.blur}: give the largest sigma in px at 224 px, 0 for none")

    def augment(self, batch: Batch) -> Batch:
        if self.image_augment:
            within = self.views.around(batch.first, self.local) if batch.first is not None and self.local >= 0 else None
            batch = replace(batch, images=self.views.apply(batch.images, batch.keys, within=within))
        if self.text_augment and self.eda:
            captions = augment_captions(batch.captions, batch.keys, self.eda, self.synonyms)
            batch = replace(batch, captions=captions)
        return batch

    @property
    def views(self) -> ImageAugment:
        brightness, contrast, saturation, hue = (self.jitter * strength for strength in JITTER)
        return ImageAugment(
            flip=self.flip,
            crop=(self.crop, 1.0),
            jitter=(brightness, contrast, saturation, hue),
            gray_p=self.gray,
            blur=(min(0.1, self.blur), self.blur),
        )
