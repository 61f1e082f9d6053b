"""Axes off the command line: what each word means, what is refused, and that a grid has every combination once."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrate import axes, recipes, sweeps
from orchestrate.axes import Axis, Span
from orchestrate.recipe import flatten


def base(name: str) -> axes.Make:
    return lambda given: recipes.get(name, given)


def space(words: str, *names: str) -> axes.Space:
    return axes.read({name: base(name) for name in names or ("roclip-badnets-smoke",)}, words.split())


def only(word: str, *names: str) -> Axis | Span | None:
    found = space(word, *names).axes
    return found[-1] if found else None


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("defense.every=1,2,4", ("1", "2", "4")),
        ("defense.every=2,1,2", ("2", "1")),
        ("defense.every=choice:1,2", ("1", "2")),
        ("defense.every=1;2", ("1", "2")),
        ("attack.count=0.01,1,1.0", ("0.01", "1", "1.0")),  # a share, one, and all: texts stay as typed
        ("attack.count=10..30:3", ("10", "20", "30")),
        ("seed=0..2,7", ("0", "1", "2", "7")),
        ("train.lr=log:1e-4..1e-2:3", ("0.0001", "0.001", "0.01")),
        ("train.lr=0.1..0.2:3", ("0.1", "0.15", "0.2")),
        ("data.classes=dog,cat;dog", ("dog,cat", "dog")),
        ("data.classes=choice:dog,cat", ("dog", "cat")),
        ("evaluate.probe=true,false", ("true", "false")),
        ("train.precision=fp32,bf16", ("fp32", "bf16")),
    ],
)
def test_a_word_is_an_axis(word, values):
    assert only(word) == Axis(word.partition("=")[0], values)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("defense.every=3", "3"),
        ("data.classes=dog,cat", "dog,cat"),
        ('data.classes=["dog","cat"]', '["dog","cat"]'),
        ("data.path=../sets/a..b", "../sets/a..b"),
        ("data.path=x,y;", "x,y"),
        ("data.image_column=", ""),
    ],
)
def test_a_word_is_one_value(word, value):
    found = space(word)
    assert found.axes == () and found.fixed == {word.partition("=")[0]: value}


def test_a_span_is_drawn_from():
    assert only("train.lr=log:1e-4..1e-2") == Span("train.lr", 1e-4, 1e-2, log=True)
    assert only("seed=0..2") == Span("seed", 0, 2, whole=True)
    assert only("attack.count=30..300") == Span("attack.count", 30, 300, whole=True)
    assert only("attack.count=0.1..0.5") == Span("attack.count", 0.1, 0.5)
    assert only("train.lr=0..1") == Span("train.lr", 0, 1)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("defense.evry=1,2", "unknown key 'defense.evry'. Did you mean defense.every"),
        ("defense.every=1,two", "defense.every='two': a whole number is wanted"),
        ("train.lr=1..", "a range is written 0..2"),
        ("train.lr=log:1e-2", "a range is written 0..2"),
        ("seed=3..1", "such as 1..3"),
        ("train.lr=log:0..1", "begins above 0"),
        ("train.lr=0.1..0.2:1", "take 2 to"),
        ("train.lr=0.1..0.2,3", "say how many"),
        ("cluster.workers=1,2", "does not change what a run computes"),
        ("name=a,b", "does not change what a run computes"),
        ("defense.every=choice:", "has no values"),
        ("attack=badnets,foo", "no attack is called 'foo'"),
        ("defense.every", "is no override"),
    ],
)
def test_what_is_refused(word, message):
    with pytest.raises(ValueError, match=message):
        space(word)


def test_a_key_may_not_come_twice_under_two_names():
    with pytest.raises(ValueError, match=r"data.path is given twice"):
        space("data=scenes data.path=a,b")


def test_a_span_without_end_is_no_grid():
    with pytest.raises(ValueError, match=r"train.lr=log:0.0001..0.01:5"):
        axes.grid(space("train.lr=log:1e-4..1e-2"))


def test_a_grid_that_is_a_slip_is_refused():
    with pytest.raises(ValueError, match="more than"):
        axes.grid(space("seed=0..999 data.seed=0..99"))


def test_the_grid_of_the_issue():
    trials = axes.grid(space("defense.every=1,2,4 defense.pool_size=0.005,0.02,0.1 attack.count=30,100,300 seed=0..2"))
    assert len(trials) == 81 == len({t.recipe.identity for t in trials})
    assert trials[0].label == "defense.every=1 defense.pool_size=0.005 attack.count=30 seed=0"
    assert [t.recipe.seed for t in trials[:4]] == [0, 1, 2, 0]
    values = [flatten(t.recipe.as_dict()) for t in trials]
    assert {(v["defense.every"], v["defense.pool_size"], v["attack.count"]) for v in values} == set(
        itertools.product((1, 2, 4), (0.005, 0.02, 0.1), (30, 100, 300))
    )


def test_equal_identities_run_once():
    assert len(axes.grid(space("train.lr=0.001,1e-3"))) == 1
    assert len(axes.grid(space("defense.every=1,2", "clip-smoke", "roclip-smoke"))) == 3, "clip has no frequency: it runs once"


def test_an_option_goes_to_the_methods_that_have_it():
    trials = axes.grid(space("attack=targeted,badnets attack.copies=3,4 attack.count=7"))
    assert [t.label for t in trials] == ["attack=targeted attack.copies=3", "attack=targeted attack.copies=4", "attack=badnets"]
    assert flatten(trials[-1].recipe.as_dict())["attack.count"] == 7


def test_several_recipes_are_an_axis_and_a_suite_is_its_members():
    labels = [t.label for t in axes.grid(space("seed=0,1", "demo"))]
    assert labels == [f"recipe=demo-{member} seed={seed}" for seed in (0, 1) for member in recipes.SUITES["demo"][1]]


def test_an_impossible_combination_is_named():
    with pytest.raises(ValueError, match=r"defense.move=0.5: .*matched"):
        axes.grid(space("defense.move=1.0,0.5 defense.matched=embedding"))


@given(st.lists(st.integers(0, 50), min_size=1, unique=True), st.lists(st.integers(1, 9), min_size=1, unique=True))
def test_a_grid_has_every_combination_once(seeds, every):
    def listed(values):
        return ",".join(map(str, values))

    trials = axes.grid(space(f"seed={listed(seeds)} defense.every={listed(every)}"))
    points = [(t.recipe.seed, t.recipe.defense.parts[0][1].every) for t in trials]
    assert points == list(itertools.product(seeds, every))


@given(st.integers(-50, 50), st.integers(1, 60))
def test_a_whole_range_holds_both_ends(low, width):
    span = Span("seed", low, low + width, whole=True)
    assert [int(v) for v in span.points(width + 1)] == list(range(low, low + width + 1))


@given(st.floats(1e-6, 1e3), st.floats(1.01, 1e4), st.booleans(), st.integers(2, 30), st.integers(0, 9))
def test_what_a_span_gives_lies_in_it(low, factor, log, count, seed):
    low, high = float(f"{low:.6g}"), float(f"{low * factor:.6g}")
    span = Span("train.lr", low, high, log=log)
    values = [float(v) for v in span.points(count)] + [float(span.draw(axes.random.Random(seed)))]
    assert all(low <= v <= high for v in values)
    assert math.isclose(values[0], low, rel_tol=1e-5) and math.isclose(values[-2], high, rel_tol=1e-5)
    assert values[:-1] == sorted(values[:-1])


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4), st.lists(st.sampled_from("ghij"), min_size=1, max_size=4))
def test_lists_split_at_semicolons_only(one, two):
    found = only(f"data.classes={','.join(one)};{','.join(two)}")
    assert found == Axis("data.classes", (",".join(one), ",".join(two)))


def test_what_an_axis_prints_can_be_typed_again():
    for word in ("defense.every=1,2", "data.classes=dog,cat;dog", "train.lr=log:0.0001..0.01", "seed=0..2", "train.lr=0.1..0.5"):
        assert str(only(word)) == word and only(str(only(word))) == only(word)


def test_draws_repeat_and_more_of_them_are_the_same_and_some_more():
    where = space("train.lr=log:1e-4..1e-2 defense.every=1..4 seed=0,1")
    few, many = axes.sample(where, 3), axes.sample(where, 5)
    assert [t.label for t in few] == [t.label for t in many[:6]]
    assert len(many) == 10 and [t.recipe.seed for t in many] == [0, 1] * 5
    assert [t.label for t in axes.sample(where, 3, seed=1)] != [t.label for t in few]


def test_a_small_space_gives_what_it_has():
    assert len(axes.sample(space("defense.every=1,2"), 50)) == 2
    with pytest.raises(ValueError, match="nothing to draw"):
        axes.sample(space("seed=0,1"), 3)


def test_a_sweeps_identity_is_of_its_runs_in_any_order():
    one, two = (axes.grid(space(f"defense.every={v}")) for v in ("1,2", "2,1"))
    ids = [[t.recipe.identity for t in trials] for trials in (one, two)]
    assert ids[0] != ids[1] and axes.identity(ids[0]) == axes.identity(ids[1]) != axes.identity(ids[0][:1])


SEEDED = [name for name in sweeps.SWEEPS if name != "matrix"]


@pytest.mark.parametrize("name", [*SEEDED, *(f"{name}-{scale}" for name in SEEDED for scale in recipes.SCALES)])
def test_every_ready_sweep_but_the_matrix_is_a_grid_of_three_seeds(name):
    asked = sweeps.ask(name, [])
    trials = axes.grid(space(" ".join(asked.words), *asked.recipes))
    assert len(trials) >= 9 and {t.recipe.seed for t in trials} == {0, 1, 2} and asked.shows


@pytest.mark.parametrize("scale", recipes.SCALES)
def test_the_matrix_has_every_attack_once_against_each_defence_that_trains(scale):
    asked = sweeps.ask(f"matrix-{scale}", [])
    trials = axes.grid(space(" ".join(asked.words), *asked.recipes))
    planted = {str(t.recipe.as_dict()["attack"]) for t in trials}
    assert len(trials) == len({t.recipe.identity for t in trials}) == 6 * len(planted) == 6 * (len(recipes.ATTACKS) - 2)
    assert {t.recipe.defense.use for t in trials} == {"clip", "augmented", "roclip", "otcclip", "safeclip"}
    assert sum(t.recipe.data.exclude == "audit" for t in trials) == len(planted)


def test_many_recipes_make_a_sweep_whose_directory_can_be_made():
    one = "clip-adaptive_transport-small"
    asked = sweeps.ask(",".join([one] * 20), ["seed=0"])
    assert asked.name == f"{one}+19" and len(asked.recipes) == 20
    assert sweeps.ask("clip,roclip-smoke", ["seed=0"]).name == "clip+roclip-smoke"
    assert sweeps.ask("mine/one.json,/x/two.json", ["seed=0"]).name == "one+two"


def test_words_win_over_a_ready_sweeps_own():
    asked = sweeps.ask("frequency-smoke", ["defense.every=1,3", "recipe=roclip-stripes-smoke", "train.epochs=2"])
    assert asked.recipes == ("roclip-stripes-smoke",)
    assert asked.words == ("attack.count=30,90", "seed=0..2", "defense.every=1,3", "train.epochs=2")


@pytest.mark.parametrize("words", [["recipe=roclip-stripes"], ["attack=badnets"], ["recipe=otcclip-blended,roclip-blended"]])
def test_a_ready_sweep_on_another_attack_or_recipe(words):
    asked = sweeps.ask("frequency", words)
    trials = axes.grid(space(" ".join(asked.words), *asked.recipes))
    assert len(trials) == 24 * len(asked.recipes)


def test_a_wrong_sweep_gets_a_suggestion():
    with pytest.raises(ValueError, match="Did you mean frequency"):
        sweeps.ask("frequncy", [])
    with pytest.raises(ValueError, match="pool-smoke"):
        sweeps.ask("pool-tiny", [])
    assert sweeps.ask("clip,roclip-smoke", ["seed=0"]).recipes == ("clip", "roclip-smoke")
