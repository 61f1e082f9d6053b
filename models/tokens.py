"""Captions to token ids, by open_clip's byte-pair tokenizer behind a cache, padding trimmed; and tokens back to words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.torchvision_door import open_clip

CACHED_CAPTIONS = 2**18  # about 100 MB in a process when full, captions included: ids are kept as two-byte integers
END = "·end"  # what the end token is called among words
_SIMPLE_VOCABULARY = 49408
_OPTIONS = {"clean", "strip_sep_token", "language"}  # of open_clip's wrapper around a Hugging Face tokenizer


def encode(text_cfg: Mapping[str, Any], captions: Sequence[str]) -> Tensor:
    """Token ids (n, L) int64; see `models.clip.tokenize`, the public name."""
    context_length = int(text_cfg.get("context_length", 77))
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    if text_cfg.get("hf_tokenizer_name"):
        mode = text_cfg.get("tokenizer_mode")
        if unknown := sorted(set(options) - _OPTIONS):  # the rest would go to transformers, where trust_remote_code runs code
            raise ValueError(f"tokenizer_kwargs {unknown} are not supported with hf_tokenizer_name; remove them from text_cfg.")
        tokenizer = _foreign(text_cfg["hf_tokenizer_name"], context_length, mode, json.dumps(options))
        padded: Tensor = tokenizer(list(captions))
        return padded
    clean = options.pop("clean", "lower")
    if options:
        raise ValueError(
            f"tokenizer_kwargs {sorted(options)} are not supported (a random reduction of captions would be cached); "
            "remove them from text_cfg."
        )
    if int(text_cfg.get("vocab_size", _SIMPLE_VOCABULARY)) < _SIMPLE_VOCABULARY:
        raise ValueError(
            f"The text tower knows {text_cfg['vocab_size']} tokens and open_clip's tokenizer makes {_SIMPLE_VOCABULARY}; "
            f"set text_cfg['vocab_size'] to {_SIMPLE_VOCABULARY}."
        )
    return _padded([_caption_ids(clean, context_length, caption) for caption in captions])


def words(text_cfg: Mapping[str, Any], caption: str) -> tuple[list[str], list[int]]:
    """The words of a caption as its tokens spell them, and which word (W) each of its tokens (L) belongs to.

    Words are what stands between spaces after the tokenizer's cleaning, so they join back to the cleaned caption, as far as the context
    length leaves it. Tokens are those that `encode.encode_text`'s mask counts: without start token and padding, with the end token, whose
    word is `END`, the last. ValueError for a tokenizer other than open_clip's own.
    """
    if text_cfg.get("hf_tokenizer_name"):
        raise ValueError(f"the tokens of {text_cfg['hf_tokenizer_name']!r} cannot be told apart into words: use open_clip's own tokenizer")
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    tokenizer = _simple(options.get("clean", "lower"))
    ids = encode(text_cfg, [caption])[0].tolist()
    rest = tokenizer.clean_fn(caption)
    spelled, owner = list[str](), list[int]()
    for piece, count in _pieces(tokenizer, ids[1 : ids.index(tokenizer.eot_token_id)]):
        before = max(rest.find(piece), 0)  # a space, or characters that the tokenizer leaves out (U+0345); 0: cut off by the context
        if not spelled or rest.startswith(" ") or " " in rest[:before]:
            spelled.append("")
        rest = rest[before:].removeprefix(" ")[len(piece) :]
        spelled[-1] += piece
        owner += [len(spelled) - 1] * count
    return [*spelled, END], [*owner, len(spelled)]


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, int]]:
    """What the tokenizer split before it merged bytes: (text, number of tokens), each complete in its characters."""
    found, start, tokens = list[tuple[str, int]](), 0, [tokenizer.decoder[i] for i in ids]
    for at, token in enumerate(tokens, 1):
        special = ids[at - 1] in tokenizer.all_special_ids
        if token.endswith("</w>") or special or at == len(tokens):  # the last may be cut off by the context length
            symbols = "".join(tokens[start:at]).removesuffix("</w>")
            text = symbols if special else bytes(tokenizer.byte_decoder[c] for c in symbols).decode(errors="replace")
            found.append((text, at - start))
            start = at
    return found


def _padded(rows: list[bytes]) -> Tensor:
    """Rows of uint16 ids as one zero-padded tensor (n, L), L the longest row."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)) // 2
    ids = np.zeros((len(rows), int(lengths.max(initial=0))), dtype=np.int64)
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.frombuffer(b"".join(rows), dtype=np.uint16)
    return torch.from_numpy(ids)


@lru_cache(maxsize=CACHED_CAPTIONS)
def _caption_ids(clean: str, context_length: int, caption: str) -> bytes:
    tokenizer = _simple(clean)
    ids = [tokenizer.sot_token_id, *tokenizer.encode(caption), tokenizer.eot_token_id]
    if len(ids) > context_length:
        ids = [*ids[: context_length - 1], tokenizer.eot_token_id]
    return np.array(ids, dtype=np.uint16).tobytes()


@lru_cache(maxsize=4)
def _simple(clean: str) -> Any:
    return open_clip.SimpleTokenizer(clean=clean)


@lru_cache(maxsize=4)
def _foreign(name: str, context_length: int, mode: str | None, options: str) -> Any:
    """A Hugging Face tokenizer that is already on this machine. It pads by its own rule, so nothing is trimmed."""
    try:
        return open_clip.tokenizer.HFTokenizer(
            name, context_length=context_length, tokenizer_mode=mode, local_files_only=True, trust_remote_code=False, **json.loads(options)
        )
    except Exception as error:
        raise ValueError(
            f"The tokenizer {name!r} is not open_clip's own and could not be opened from this machine ({error}). Install "
            "`transformers` and fetch the tokenizer beforehand, or choose a configuration without hf_tokenizer_name."
        ) from error
