"""Overrides, types, layers, provenance and the identity of a recipe."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from orchestrate import recipes
from orchestrate.recipe import METHODS, SECTIONS, Recipe, flatten, from_dict, parse_overrides, resolve
from orchestrate.values import coerce

BOTH = {"attack": "targeted+stripes", "defense": "roclip"}
NEEDS = {  # options that mean nothing but beside others
    "data.drop": {"data.exclude": "scores.parquet"},
    "defense.move": {"defense.matched": "caption"},
    "cluster.min_workers": {"cluster.workers": 9},
}
NEUTRAL = ("name", "cluster.", "track.", "data.cache")  # what the identity leaves out
EVERY_NAME = [f"{m}-{a}-{s}" for m in recipes.METHODS for a in recipes.ATTACKS for s in recipes.SCALES]


def made(overrides: Mapping[str, Any] | None = None, **more: Any) -> Recipe:
    return resolve("run", [("command line", {**(overrides or {}), **more})]).recipe


def fields() -> dict[str, Any]:
    """Every option of a recipe with both methods: dotted path → type, read from the dataclasses."""
    recipe = made(BOTH)
    configs = {s: getattr(recipe, s) for s in SECTIONS} | {"defense": recipe.defense.parts[0][1]}
    configs |= {f"attack.{name}": part for name, part in recipe.attack.parts}
    found: dict[str, Any] = {"seed": int, "name": str}
    for prefix, config in configs.items():
        hints = get_type_hints(type(config))
        found |= {f"{prefix}.{f.name}": hints[f.name] for f in dataclasses.fields(config)}
    return found


FIELDS = fields()
COUNTS_OR_SHARES = [path for path, hint in FIELDS.items() if set(get_args(hint)) == {int, float}]


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type, most of which make a recipe."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.lists(st.text("abc{} ", min_size=1, max_size=4).map(str.strip).filter(bool), max_size=3).map(tuple)
    if set(get_args(hint)) == {int, float}:
        return st.integers(2, 10**6) | st.floats(0.001, 0.999)
    kinds = {bool: st.booleans(), int: st.integers(1, 2**62), float: st.floats(1e-6, 0.999), str: st.from_regex(r"[a-z][a-z0-9_.]{0,8}")}
    if hint in kinds:
        return kinds[hint]
    assert type(None) in get_args(hint), hint
    return st.none() | values(next(h for h in get_args(hint) if h is not type(None)))


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, Any]:
    path = draw(st.sampled_from(sorted(FIELDS)))
    return path, draw(values(FIELDS[path]))


def possible(path: str, value: Any) -> Recipe:
    try:
        return made({**BOTH, path: value})
    except ValueError:  # train.batch=7 with accumulate=2, templates without {} and the like
        assume(False)
        raise


# --- the identity ------------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(changes())
@example(("data.exclude", "a\x00"))
def test_the_identity_changes_with_every_value_but_the_neutral_ones(change):
    path, value = change
    before, after = made(BOTH), possible(path, value)
    same = flatten(before.as_dict()) == flatten(after.as_dict()) or path.startswith(NEUTRAL)
    assert (after.identity == before.identity) == same
    assert after.directory.endswith(f"-{after.identity[:8]}")


def another(value: Any, hint: Any) -> Any:
    """A second value of the type, which makes a recipe too."""
    if get_origin(hint) is Literal:
        return next(option for option in get_args(hint) if option != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 2
    if isinstance(value, float):
        return value / 2 or 0.5
    return ["other"] if isinstance(value, list) else f"{value or ''}other"


@pytest.mark.parametrize("path", sorted(FIELDS))
def test_no_option_is_left_out_of_the_identity(path):
    """Each option in turn, so that none escapes the draws above."""
    before = {**BOTH, **NEEDS.get(path, {})}
    value = 2 if path == "train.accumulate" else another(flatten(made(before).as_dict())[path], FIELDS[path])
    assert (made({**before, path: value}).identity == made(before).identity) == path.startswith(NEUTRAL)


@given(st.permutations(["train.lr=1e-4", "defense=roclip", "defense.every=3", "attack=badnets", "attack.count=5", "data=pairs", "seed=4"]))
def test_order_does_not_matter(words):
    recipe = resolve("run", [("command line", parse_overrides(words))]).recipe
    assert recipe == made(
        {"seed": 4, "data.path": "pairs", "train.lr": 1e-4, "defense": "roclip", "defense.every": 3, "attack": "badnets", "attack.count": 5}
    )


@given(st.permutations([("train.lr", 3e-4), ("train.epochs", 2), ("data", "pairs"), ("cluster.workers", 4)]))
def test_layers_that_do_not_meet_may_come_in_any_order(pairs):
    layers = [(f"layer {i}", {key: value}) for i, (key, value) in enumerate(pairs)]
    assert resolve("run", layers).recipe == made(dict(pairs))


def test_the_identity_is_a_fixed_function_of_the_values():
    """Hash of sorted compact JSON: another process, machine or release finds the finished run again."""
    recipe = made(BOTH)
    tree = json.loads(json.dumps(recipe.as_dict()))
    assert len(recipe.identity) == 16 and int(recipe.identity, 16) >= 0
    assert from_dict(tree).recipe.identity == recipe.identity
    assert from_dict(dict(reversed(tree.items()))).recipe.identity == recipe.identity


# --- values and types --------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(changes())
def test_a_value_written_as_text_is_the_value(change):
    path, value = change
    text = (
        ",".join(value) if isinstance(value, tuple) else "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    )
    assert possible(path, value) == made({**BOTH, path: text})


@given(st.lists(st.text(min_size=1).filter(lambda s: s.strip()), max_size=4))
def test_a_json_list_carries_any_text(items):
    assert made({"data.classes": json.dumps(items)}).data.classes == tuple(items)


@given(st.integers(0, 2**63 - 1))
def test_a_whole_number_keeps_all_its_digits(number):
    assert made(seed=str(number)).seed == number


@pytest.mark.parametrize("text", ["1e4", "10000", "10000.0"])
def test_a_whole_number_may_be_written_as_one_likes(text):
    assert made({"train.warmup": text}).train.warmup == 10000


@pytest.mark.parametrize("path", sorted(COUNTS_OR_SHARES))
@given(number=st.integers(2, 10**9), share=st.floats(1e-6, 1, exclude_max=True))
@settings(max_examples=20)
def test_a_whole_number_is_a_count_and_a_fraction_a_share(path, number, share):
    for value, kind in ((number, int), (share, float)):
        for written in (value, json.dumps(value)):
            found = flatten(made({**BOTH, **NEEDS.get(path, {}), path: written}).as_dict())[path]
            assert found == value and type(found) is kind


def test_one_is_one_pair_and_one_point_nought_is_all():
    assert repr(made({"data.size": "1"}).data.size) == "1"
    assert repr(made({"data.size": "1.0"}).data.size) == "1.0"
    assert repr(from_dict(made({"data.size": 1.0}).as_dict()).recipe.data.size) == "1.0"


@pytest.mark.parametrize("path", sorted(p for p, hint in FIELDS.items() if hint is float or p in COUNTS_OR_SHARES))
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", math.nan, math.inf])
def test_what_is_no_number_is_refused(path, value):
    with pytest.raises(ValueError, match=rf"^{path}=.*a number is wanted"):
        made({**BOTH, path: value})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.epochs", "two", "a whole number is wanted"),
        ("train.epochs", "2.5", "a whole number is wanted"),
        ("train.epochs", "1e999", "a whole number is wanted"),
        ("train.epochs", True, "a whole number is wanted"),
        ("train.epochs", None, "a whole number is wanted"),
        ("train.lr", "1e-3,1e-4", r"a number is wanted \(one value, not a list\)"),
        ("train.lr", "", "a number is wanted"),
        ("train.precision", "fp64", "choose one of fp32, bf16, fp16"),
        ("evaluate.probe", "maybe", "true or false is wanted"),
        ("data.path", None, "text is wanted"),
        ("data.path", ["a", "b"], "text is wanted"),
        ("data.path", {"a": 1}, "text is wanted"),
        ("data.classes", '["dog"', "no JSON list"),
        ("data.size", "many", "a number is wanted"),
        ("train.batch", "0", "must be above 0"),
        ("train.epochs", "1e12", "must be 100,000 or less"),
        ("data.max_pixels", "178956971", "must be 178,956,970 or less"),
        ("train.lr", "-1", "must be above 0"),
        ("train.warmup", "-1", "must be 0 or more"),
        ("train.clip_norm", "-1", "must be 0 or more"),
        ("train.weight_decay", "-0.1", "must be 0 or more"),
        ("train.beta2", "1", "must be below 1"),
        ("train.batch", "9.5", "a whole number is wanted"),
        ("data.side", "-1", "must be 0 or more"),
        ("evaluate.every", "-1", "must be 0 or more"),
        ("evaluate.batch", "0", "must be above 0"),
        ("cluster.workers", "0", "must be above 0"),
        ("cluster.gpus", "-1", "must be 0 or more"),
        ("seed", "-1", "must be 0 or more"),
        ("seed", str(2**63), "below 2"),
        ("name", "../elsewhere", "names the run's directory"),
        ("name", "", "names the run's directory"),
    ],
)
def test_a_bad_value_is_named_with_what_would_fit(path, value, message):
    with pytest.raises(ValueError, match=rf"^{path}=.*{message}"):
        made({path: value})


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"train.batch=128 does not divide into train.accumulate=3"):
        made({"train.accumulate": 3})


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("On", True), ("1", True), ("FALSE", False), ("no", False), ("0", False)])
def test_yes_and_no_may_be_written_as_one_likes(text, value):
    assert made({"evaluate.probe": text}).evaluate.probe is value


@pytest.mark.parametrize("text", ["dog,cat", "dog, cat", " dog ,cat,", '["dog", "cat"]'])
def test_a_list_may_be_written_with_commas_or_as_json(text):
    assert made({"data.classes": text}).data.classes == ("dog", "cat")


@pytest.mark.parametrize("text", ["", "none", "[]"])
def test_an_empty_list_may_be_written(text):
    assert made({"data.classes": text}).data.classes == ()


@given(st.text() | st.floats() | st.integers() | st.none() | st.lists(st.integers(), max_size=2), st.sampled_from(sorted(FIELDS)))
@settings(max_examples=300)
def test_any_value_is_taken_or_refused_with_a_message_that_names_the_key(value, path):
    hint = FIELDS[path]
    try:
        found = coerce(value, hint, path)
    except ValueError as error:
        assert str(error).startswith(f"{path}=")
    else:
        assert coerce(json.loads(json.dumps(found)), hint, path) == found


# --- keys --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("train.epoch", "Did you mean train.epochs"),
        ("defence.every", "defense.every"),
        ("defense.evry", "Did you mean defense.every"),
        ("batch", "train.batch"),
        ("attack.count", "attack.stripes.count"),
        ("attack.badnets.count", "attack.stripes.count"),
        ("model.zzz", r"There are model.name, model.image_size, model.channels_last\."),
        ("train.image_size", "Did you mean model.image_size"),
        ("evaluate.bach", "Did you mean evaluate.batch"),
        ("zzz", "Top-level keys: name, seed, attack, defense, data, model, train"),
        ("attack.", "There are attack.targeted.targets, attack.targeted.copies"),
        ("use", "Top-level keys"),
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(key, suggestion):
    with pytest.raises(ValueError, match=rf"unknown key '{key}'.*{suggestion}"):
        made({**BOTH, key: "1"})


@given(st.text("abcdefghijklmnopqrstuvwxyz._", min_size=1, max_size=14))
def test_no_unknown_key_passes(key):
    known = {*FIELDS, *METHODS, "data", "model"}
    aliases = {f"defense.roclip.{path.partition('.')[2]}" for path in FIELDS if path.startswith("defense.")}
    assume(key not in known | aliases)
    with pytest.raises(ValueError, match="unknown key"):
        made({**BOTH, key: "1"})


def test_an_option_of_a_method_that_is_not_there_says_so():
    with pytest.raises(ValueError, match=r"unknown key 'attack.count': this recipe has no attack. Name one first, such as attack=targeted"):
        made({"attack.count": 5})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["defense.every"], "write key=value"),
        (["=3"], "write key=value"),
        (["seed=1", "seed=2"], r"seed is given twice \('1' and '2'\)"),
    ],
)
def test_a_word_that_is_no_override_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_overrides(words)


@given(st.dictionaries(st.from_regex(r"[a-z][a-z.]*", fullmatch=True), st.text(), max_size=4))
def test_a_value_may_hold_anything_even_an_equals_sign(pairs):
    assert parse_overrides([f"{key}={value}" for key, value in pairs.items()]) == pairs


@pytest.mark.parametrize("pair", [("data", "data.path"), ("model", "model.name")])
def test_one_value_under_both_its_names_is_refused(pair):
    with pytest.raises(ValueError, match=rf"{pair[1]} is given twice"):
        made({pair[0]: "a", pair[1]: "b"})
    with pytest.raises(ValueError, match=r"attack.count is given twice"):
        made({"attack": "badnets", "attack.count": 3, "attack.badnets.count": 4})


# --- methods -----------------------------------------------------------------------------------------------------------------


def test_the_short_form_of_a_section_is_its_leading_key():
    recipe = made({"data": "s3://bucket/pairs", "model": "ViT-B-32"})
    assert recipe.data.path == "s3://bucket/pairs" and recipe.model.name == "ViT-B-32"


def test_parts_of_a_combined_attack_have_options_of_their_own():
    recipe = made({"attack": "targeted+stripes", "attack.stripes.count": 7, "attack.targeted.copies": "0.5"})
    targeted, stripes = (part for _, part in recipe.attack.parts)
    assert (targeted.copies, stripes.count) == (0.5, 7)
    assert [name for name, _ in recipe.attack.parts] == ["targeted", "stripes"]


def test_a_lone_part_may_be_named_in_the_key():
    assert made({"attack": "targeted", "attack.targeted.copies": 9}) == made({"attack": "targeted", "attack.copies": 9})
    with pytest.raises(ValueError, match=r"unknown key 'attack.stripes.count'"):
        made({"attack": "targeted", "attack.stripes.count": 9})


@pytest.mark.parametrize("none", ["none", "", None])
def test_none_takes_a_method_away_with_its_options(none):
    layers = [("recipe", {"attack": "badnets", "attack.count": 5}), ("command line", {"attack": none})]
    recipe = resolve("run", layers).recipe
    assert recipe.attack is None and recipe == made()


def test_another_method_drops_the_options_of_the_former_one():
    layers = [("recipe", {"attack": "badnets", "attack.count": 5, "train.lr": 1}), ("command line", {"attack": "stripes"})]
    assert resolve("run", layers).recipe == made({"attack": "stripes", "train.lr": 1})


def test_the_same_method_again_keeps_its_options():
    layers = [("recipe", {"attack": "badnets", "attack.count": 5}), ("command line", {"attack": "badnets", "attack.size": 0.5})]
    assert resolve("run", layers).recipe == made({"attack": "badnets", "attack.count": 5, "attack.size": 0.5})


@pytest.mark.parametrize("words", [["attack.count=7", "attack=stripes"], ["attack=stripes", "attack.count=7"]])
def test_an_option_beside_the_new_method_is_the_new_methods(words):
    layers = [("recipe", {"attack": "badnets", "attack.count": 5}), ("command line", parse_overrides(words))]
    assert resolve("run", layers).recipe == made({"attack": "stripes", "attack.count": 7})


def test_the_last_layer_wins_by_whatever_name_it_calls_the_option():
    layers = [
        ("a", {"attack": "badnets", "attack.badnets.count": 1}),
        ("b", {"attack.count": 2}),
        ("c", {"attack.badnets.count": 3}),
    ]
    assert resolve("run", layers).recipe.attack.parts[0][1].count == 3
    assert resolve("run", layers[:2]).recipe.attack.parts[0][1].count == 2


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"defense": "clip+roclip"}, "a run has one defence"),
        ({"attack": "stripes+stripes"}, "two parts have one name"),
        ({"attack": "stripes+"}, "no attack is called ''"),
        ({"attack": "badnet"}, "no attack is called 'badnet'. Did you mean badnets"),
        ({"defense": "rocklip"}, "no defense is called 'rocklip'. Did you mean roclip"),
        ({"attack": "badnets", "attack.size": 2}, r"^attack.size=2.0 is no share"),
        ({"attack": "targeted+stripes", "attack.stripes.size": 2}, r"^attack.stripes.size=2.0 is no share"),
        ({"defense": "roclip", "defense.every": 0}, r"^defense.every=0: give 1"),
    ],
)
def test_an_impossible_method_says_why(layer, message):
    with pytest.raises(ValueError, match=message):
        made(layer)


# --- provenance and the way to disk and back ---------------------------------------------------------------------------------


def test_every_value_tells_which_layer_it_came_from():
    [found] = recipes.get("roclip-stripes-smoke", {"data": "pairs", "attack.count": 9, "train.lr": "1e-4"})
    assert set(flatten(found.recipe.as_dict())) == set(found.origins)
    expected = {
        "data.path": "command line",
        "attack.count": "command line",
        "train.lr": "command line",
        "train.epochs": "scale smoke",
        "attack": "attack stripes",
        "defense": "method roclip",
        "train.precision": "default",
        "defense.every": "default",
    }
    assert {path: found.origins[path] for path in expected} == expected


@pytest.mark.parametrize("name", [*EVERY_NAME, *recipes.SUITES])
def test_a_recipe_comes_back_from_its_file(name, tmp_path: Path):
    for found in recipes.get(name):
        (tmp_path / "recipe.json").write_text(json.dumps({**found.recipe.as_dict(), "identity": found.recipe.identity}))
        again = from_dict(json.loads((tmp_path / "recipe.json").read_text())).recipe
        assert again == found.recipe and again.identity == found.recipe.identity
        assert again.as_dict() == found.recipe.as_dict()


@settings(max_examples=200)
@given(changes())
def test_any_recipe_comes_back_from_plain_json(change):
    recipe = possible(*change)
    tree = json.loads(json.dumps(recipe.as_dict(), allow_nan=False))
    assert from_dict(tree).recipe == recipe


def test_a_file_and_overrides_together():
    tree = made({**BOTH, "attack.stripes.count": 9}).as_dict()
    found = from_dict(tree, {"defense": "none", "attack.stripes.count": "11"})
    assert found.recipe == made({"attack": "targeted+stripes", "attack.stripes.count": 11})
    assert found.origins["attack.stripes.count"] == "command line" and found.origins["attack.targeted.copies"] == "recipe.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"epoch": 3}}, "unknown key 'train.epoch'. Did you mean train.epochs"),
        ({"trian": {"lr": 3}}, "unknown key 'trian.lr'. Did you mean train.lr"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"use": "roclip"}, "unknown key 'use'"),
        ({"train": 5}, "unknown key 'train'"),
        ({"attack": {"count": 5}}, "this recipe has no attack"),
        ({"attack": {"use": "badnets", "copies": 5}}, "unknown key 'attack.copies'"),
        ({"train": {"lr": float("nan")}}, "train.lr=nan: a number is wanted"),
        ({"data": {"path": None}}, "data.path=None: text is wanted"),
    ],
)
def test_a_file_is_read_strictly(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict({"name": "run", **change})


@pytest.mark.parametrize("content", [[], 3, "roclip", None])
def test_a_file_of_something_else_is_refused(content):
    with pytest.raises(ValueError, match="a recipe is a JSON object"):
        from_dict(content)
