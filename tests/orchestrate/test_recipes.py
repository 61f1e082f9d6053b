"""Named recipes: every name resolves, says what it is, and a wrong one gets a suggestion."""

from __future__ import annotations

import dataclasses

import pytest

from orchestrate import prepared, recipes
from orchestrate.plugins import BUILT_IN
from orchestrate.recipe import DROP, flatten

EVERY = [
    f"{m}{a}{s}"
    for m in recipes.METHODS
    for a in ("", *(f"-{a}" for a in recipes.ATTACKS))
    for s in ("", *(f"-{s}" for s in recipes.SCALES))
]


@pytest.mark.parametrize("name", EVERY)
def test_a_name_means_its_method_attack_and_scale(name):
    [found] = recipes.get(name)
    words = name.split("-")
    attack = next((w for w in words if w in recipes.ATTACKS), recipes.ATTACK)
    scale = next((w for w in words if w in recipes.SCALES), recipes.SCALE)
    assert found.recipe.name == name
    assert found.recipe.defense.use == recipes.METHODS[words[0]].layer["defense"]
    assert (found.recipe.attack.use if found.recipe.attack else "none") == recipes.ATTACKS[attack].layer["attack"]
    values = flatten(found.recipe.as_dict())
    for key, value in recipes.SCALES[scale].layer.items():
        path = "model.name" if key == "model" else key
        assert found.origins[path] != "default"  # the scale's, or of a later layer that says its name
        assert found.origins[path] != f"scale {scale}" or values[path] == value


def test_what_a_name_leaves_out_is_the_default():
    [short], [long] = recipes.get("roclip"), recipes.get(f"roclip-{recipes.ATTACK}-{recipes.SCALE}")
    assert short.recipe.identity == long.recipe.identity


def test_of_a_set_of_ones_own_all_pairs_are_taken_unless_asked_otherwise():
    given: list[dict[str, object]] = [{}, {"data": "x.csv"}, {"data": "x", "data.size": 9}]
    built_in, own, asked = (recipes.get("roclip-badnets", more)[0].recipe.data for more in given)
    assert (built_in.size, built_in.heldout) == (6000, 1400)
    assert (own.path, own.size, own.heldout) == ("x.csv", 0, 0.05)
    assert (asked.size, asked.heldout) == (9, 0.05)
    assert recipes.get("roclip-smoke", {"data.path": "x"})[0].recipe.data.size == 1000  # a quick look stays one


def test_different_names_are_different_runs():
    spelled = [f"{m}-{a}-{s}" for m in recipes.METHODS for a in recipes.ATTACKS for s in recipes.SCALES]
    assert len({recipes.get(name)[0].recipe.identity for name in spelled}) == len(spelled)


def test_every_built_in_method_has_a_name():
    used = {kind: set() for kind in BUILT_IN}
    for name in EVERY:
        recipe = recipes.get(name)[0].recipe
        for kind, plugin in (("attack", recipe.attack), ("defense", recipe.defense)):
            used[kind] |= set(plugin.use.split("+")) if plugin else set()
    assert used == {kind: set(table) for kind, table in BUILT_IN.items()}


def test_methods_of_one_comparison_differ_in_the_defence_alone():
    """All rows of a table see the same poison, data and budget, unless a layer says otherwise by name. What an audit leaves out is its
    way to defend."""
    plain = recipes.get("clip-both")[0].recipe
    for method in recipes.METHODS:
        other = recipes.get(f"{method}-both")[0].recipe
        data = dataclasses.replace(other.data, exclude="", drop=DROP) if method == "audited" else other.data
        assert data == plain.data
        for section in ("model", "attack", "evaluate", "seed"):
            assert getattr(other, section) == getattr(plain, section)


@pytest.mark.parametrize("suite", recipes.SUITES)
def test_a_suite_is_its_members_under_its_own_name(suite):
    _, members, layer = recipes.SUITES[suite]
    found = recipes.get(suite, {"seed": 3})
    assert [one.recipe.name for one in found] == [f"{suite}-{member}" for member in members]
    for one, member in zip(found, members, strict=True):
        [alone] = recipes.get(member, {**layer, "seed": 3})
        assert one.recipe.identity == alone.recipe.identity
        assert one.origins["seed"] == "command line"


def test_an_override_reaches_every_member_of_a_suite():
    suite = next(iter(recipes.SUITES))
    assert {one.recipe.train.epochs for one in recipes.get(suite, {"train.epochs": 1})} == {1}


@pytest.mark.parametrize("name", [*recipes.SUITES, *recipes.names()])
def test_every_listed_name_resolves(name):
    for one in recipes.get(name):
        prepared.build_attack(one.recipe)
        assert prepared.build_defense(one.recipe).augment


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("roclp", "Did you mean roclip"),
        ("roclip-badnet", "Did you mean roclip-badnets"),
        ("dmo", "Did you mean demo"),
        ("roclip-smal", "Did you mean roclip-small"),
        ("roclip-badnets-papr", "Did you mean roclip-badnets-paper"),
        ("roclip-smoke-badnets", "Did you mean roclip-badnets"),
        ("roclip-badnets-stripes", "Did you mean roclip-"),
        ("zzzzzz", "`antidote ls` lists them"),
        ("", "`antidote ls` lists them"),
    ],
)
def test_a_wrong_name_gets_a_suggestion(name, message):
    with pytest.raises(ValueError, match=rf"no recipe is called '{name}'. .*{message}"):
        recipes.get(name)


def test_tables_say_what_each_part_shows():
    for part in (*recipes.METHODS.values(), *recipes.ATTACKS.values(), *recipes.SCALES.values()):
        assert part.shows and not part.shows.endswith(".")
    assert all(scale.time for scale in recipes.SCALES.values())
