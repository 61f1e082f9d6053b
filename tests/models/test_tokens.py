"""Token ids are open_clip's, trimmed and cached."""

import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models import clip, tokens
from models.torchvision_door import open_clip

REFERENCE = open_clip.get_tokenizer("RN50", context_length=32)
CFG = clip.config("tiny-rn")


def check(captions):
    ids = clip.tokenize(CFG, captions)
    expected = REFERENCE(captions)
    length = ids.shape[1]
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected[:, :length])
    assert not expected[:, length:].any()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=80), st.from_regex(r"[a-z!'&;<>_ 0-9]{0,200}")), min_size=1, max_size=4))
def test_ids_are_those_of_open_clip_up_to_padding(captions):
    check(captions)


@pytest.mark.parametrize(
    "caption",
    ["", "!", "!!! wow !!!", "<end_of_text> and <start_of_text>", "caf\u00e9 &amp; ch\u00e2teau", "word " * 90],
)
def test_awkward_captions(caption):
    check([caption, "a dog"])


def test_padding_ends_with_the_longest_caption_and_truncation_keeps_the_end_token():
    assert clip.tokenize(CFG, ["a dog", "a small dog"]).shape == (2, 5)
    ids = clip.tokenize(CFG, ["word " * 90])
    assert ids.shape == (1, 32)
    assert ids[0, -1] == 49407
    assert clip.tokenize(CFG, []).shape == (0, 0)


def test_models_tell_their_own_context_length():
    caption = ["word " * 90]
    assert clip.tokenize(clip.build("tiny-rn", seed=0), caption).shape == (1, 32)
    foreign = open_clip.CLIP(**CFG)
    assert clip.tokenize(foreign, caption).shape == (1, 32)
    with pytest.raises(ValueError, match="not a CLIP model"):
        clip.tokenize(torch.nn.Linear(1, 1), caption)


def test_the_cleaning_of_the_configuration_is_used():
    text = CFG["text_cfg"] | {"tokenizer_kwargs": {"clean": "canonicalize"}}
    ids = clip.tokenize({"text_cfg": text}, ["A_dog, running!"])
    reference = open_clip.SimpleTokenizer(clean="canonicalize")(["A_dog, running!"])
    assert torch.equal(ids, reference[:, : ids.shape[1]])


CLEAN = open_clip.SimpleTokenizer().clean_fn


@settings(max_examples=150, deadline=None)
@example("\u0345")
@example("a \u0345 dog\u0345s, and\u0345")
@given(st.one_of(st.text(max_size=40), st.from_regex(r"[a-z!'&;,.<>_ 0-9é🐶]{0,60}")))
def test_words_join_back_to_the_caption_and_own_every_token(caption):
    text = CFG["text_cfg"] | {"context_length": 400}
    words, owner = tokens.words(text, caption)
    assert words[-1] == tokens.END and owner[-1] == len(words) - 1
    assert owner == sorted(owner) and set(owner) == set(range(len(words)))
    content = clip.tokenize({"text_cfg": text}, [caption])[0]
    assert len(owner) == int((content == 49407).int().argmax())  # all but the start token, up to the first end token
    cut = "<end_of_text>" in CLEAN(caption)
    known = ["".join(tokens._simple("lower").pat.findall(word)) for word in CLEAN(caption).split(" ")]  # U+0345, for one, has no token
    assert cut or " ".join(words[:-1]) == " ".join(word for word in known if word)


@pytest.mark.parametrize(
    ("caption", "words", "counts"),
    [
        ("A dog, in 1990's château!", ["a", "dog,", "in", "1990's", "château!"], [1, 2, 1, 5, 3]),
        ("", [], []),
        ("antidisestablishment of 🐶🐶x", ["antidisestablishment", "of", "🐶🐶x"], [5, 1, 3]),
        ("word " * 90, ["word"] * 30, [1] * 30),
        ("a <b>dog</b>", ["a", "<b>dog</b>"], [1, 7]),
    ],
)
def test_words_are_what_stands_between_spaces(caption, words, counts):
    found, owner = tokens.words(CFG["text_cfg"], caption)
    assert found == [*words, tokens.END]
    assert [owner.count(k) for k in range(len(words))] == counts


def test_words_of_a_foreign_tokenizer_are_refused():
    with pytest.raises(ValueError, match="told apart"):
        tokens.words(CFG["text_cfg"] | {"hf_tokenizer_name": "not-on-this-machine"}, "a dog")


def test_what_cannot_be_tokenised_is_refused():
    with pytest.raises(ValueError, match="caption"):
        clip.tokenize(CFG, "one string")
    with pytest.raises(ValueError, match="vocab_size"):
        clip.tokenize({"text_cfg": CFG["text_cfg"] | {"vocab_size": 1000}}, ["a dog"])
    with pytest.raises(ValueError, match="reduction"):
        clip.tokenize({"text_cfg": CFG["text_cfg"] | {"tokenizer_kwargs": {"reduction_mask": "random"}}}, ["a dog"])
    with pytest.raises(ValueError, match="not-on-this-machine"):
        clip.tokenize({"text_cfg": CFG["text_cfg"] | {"hf_tokenizer_name": "not-on-this-machine"}}, ["a dog"])


def test_cached_captions_are_quick_and_the_cache_is_bounded():
    captions = [f"a photo of {i} red dogs near the old house in autumn" for i in range(2000)]
    clip.tokenize(CFG, captions)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        clip.tokenize(CFG, captions)
        times.append(time.perf_counter() - start)
    assert min(times) / len(captions) < 5e-6
    assert tokens._caption_ids.cache_info().maxsize == tokens.CACHED_CAPTIONS
