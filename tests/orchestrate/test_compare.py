"""Comparison and recommendation against values worked out by hand, and the Pareto front against its definition."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrate import compare, compare_matrix, compare_page, compare_plots, measure, recommend, sweepdir
from orchestrate.cli import main
from orchestrate.compare import Run
from orchestrate.compare_matrix import arranged, planted
from orchestrate.recommend import condition, pareto
from orchestrate.statistics import wilson

from . import sweeping


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweeping.write(tmp_path_factory.mktemp("sweep") / "runs", sweeping.trials())


@pytest.fixture(scope="module")
def runs(sweep: Path) -> list[Run]:
    return compare.load([sweep])


def one(seed: int = 0, **result: float) -> Run:
    return Run(Path("run"), {"seed": seed, "defense.every": 1}, {key.replace("__", "/"): value for key, value in result.items()})


# --- metrics -----------------------------------------------------------------------------------------------------------------------


def test_metrics_that_stand_for_several():
    result = {"asr/targeted": 0.5, "asr/stripes": 0.25, "asr/stripes/clean": 0.1, "asr/noise": 0.125, "asr/noise/clean": 0.0}
    result |= {"asr/stripes/hits": 5, "asr/stripes/total": 20, "seconds/train": 10.0, "seconds/match": 2.5}
    assert measure.value(result, "asr") == 0.5
    assert measure.value(result, "asr/backdoor") == 0.25 and measure.counts(result, "asr/backdoor") == (5, 20)
    assert measure.value(result, "asr/noise") == 0.125 and measure.counts(result, "asr/noise") is None
    assert measure.value(result, "seconds") == 12.5
    assert measure.value(result, "asr/other") is None and measure.value({}, "asr") is None and measure.value({}, "seconds") is None
    assert measure.counts({"zeroshot/top1": 0.25, "zeroshot/total": 280}, "zeroshot/top1") == (70, 280)


# --- estimates ---------------------------------------------------------------------------------------------------------------------


def test_three_seeds_by_students_t():
    """Values 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.3027, half = 4.3027 / √3 = 2.4841."""
    found = compare.estimate([one(seed, loss=seed + 1.0) for seed in range(3)], "loss")
    assert found is not None and (found.mean, found.seeds) == (2.0, 3)
    assert found.low == pytest.approx(2 - 2.48414, abs=1e-4) and found.high == pytest.approx(2 + 2.48414, abs=1e-4)


def test_one_seed_has_wilsons_interval_or_none():
    counted = compare.estimate([one(asr__x=0.25, asr__x__hits=5, asr__x__total=20)], "asr/x")
    assert counted is not None and (counted.low, counted.high) == pytest.approx(wilson(5, 20))
    bare = compare.estimate([one(loss=1.5)], "loss")
    assert bare is not None and (bare.mean, bare.low, bare.high) == (1.5, None, None)
    assert compare.estimate([one()], "loss") is None


def test_seeds_that_agree_on_nothing_do_not_prove_nothing():
    """Three times 0 of 16: Student's interval is a point, Wilson's on 0 of 48 ends at z²/(48 + z²) = 7.4 %."""
    found = compare.estimate([one(seed, asr__x=0.0, asr__x__hits=0, asr__x__total=16) for seed in range(3)], "asr/x")
    assert found is not None and found.low == 0.0 and found.high == pytest.approx(1.96**2 / (48 + 1.96**2), abs=1e-4)


def test_what_else_differs_is_averaged_within_a_seed_first():
    """Seed 0: (1 + 3) / 2 = 2, seed 1: 4; the seeds' mean is 3, not the runs' 8 / 3."""
    found = compare.estimate([one(0, loss=1.0), one(0, loss=3.0), one(1, loss=4.0)], "loss")
    assert found is not None and found.mean == 3.0 and found.seeds == 2


# --- groups and tables -------------------------------------------------------------------------------------------------------------


def test_what_varies_is_found(runs):
    assert len(runs) == 81
    assert compare.varying(runs) == ["attack.count", "defense.every", "defense.pool_size"]
    groups = compare.group(runs, ["defense.every"])
    assert [g.at["defense.every"] for g in groups] == ["1", "2", "4"] and [len(g.runs) for g in groups] == [27, 27, 27]
    assert "attack.count (30, 100, 300)" in compare.averaged(runs, ["defense.every"])
    assert compare.averaged(runs, compare.varying(runs)) == ""


def test_a_field_that_only_some_methods_have_does_not_vary_by_that(tmp_path):
    found = sweeping.trials(("attack.count=30,100", "seed=0"), "clip-stripes-smoke", "roclip-stripes-smoke")
    some = compare.load([sweeping.write(tmp_path / "runs", found)])
    assert compare.varying(some) == ["attack.count", "defense"]
    assert {run.at("defense.every") for run in some} == {"–", "2"}


def test_the_table_in_every_form(runs):
    groups = compare.group(runs, ["defense.every", "attack.count"])
    names = ["zeroshot/top1", "asr", "seconds"]
    text, marked, tex = (compare.table(groups, names, form) for form in ("text", "markdown", "latex"))
    assert len(text.splitlines()) == 2 + 9 and "43.1 %" not in text.splitlines()[0]
    # every=1, count=30: hits 0, 1, 2 of 100 → 1.0 %; t half = 4.3027 · 0.01 / √3 = 2.48 %; Wilson on 3 of 300 reaches 2.9 %
    assert "1.0 % [0.0, 3.5]" in text.splitlines()[2]
    assert marked.splitlines()[1].count("---") == 6 and len(marked.splitlines()) == 11
    assert tex.startswith(r"\begin{tabular}{llrrrr}") and r"1.0 \% [0.0, 3.5]" in tex and tex.count(r" \\") == 10
    rows = list(csv.DictReader(io.StringIO(compare.table(groups, names, "csv"))))
    assert len(rows) == 9 and float(rows[0]["asr"]) == pytest.approx(0.01) and rows[0]["seeds"] == "3"
    assert float(rows[0]["seconds"]) == pytest.approx(40 + 20 + 100 * (0.005 + 0.02 + 0.1) / 3, rel=1e-5)


def test_numbers_sort_as_numbers():
    assert sorted(["10", "9", "x", "0.5"], key=compare.order) == ["0.5", "9", "10", "x"]


# --- Pareto ------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=25))
def test_the_front_is_what_nothing_dominates(points):
    found = [(float(u), float(h)) for u, h in points]

    def beaten(i: int) -> bool:
        u, h = found[i]
        return any(a >= u and b <= h and (a, b) != (u, h) for a, b in found)

    front = pareto(found)
    assert sorted(front) == [i for i in range(len(found)) if not beaten(i)]
    assert [found[i][1] for i in front] == sorted(found[i][1] for i in front)


# --- recommendation ----------------------------------------------------------------------------------------------------------------


def test_a_condition_is_read():
    assert condition("asr<=0.125") == recommend.Condition("asr", True, 0.125)
    assert condition(" zeroshot/top1 >= 40% ") == recommend.Condition("zeroshot/top1", False, 0.4)
    for text in ("asr", "asr=0.1", "asr<=x", "<=0.1", "asr<=0.1.2"):
        with pytest.raises(ValueError, match="is no condition"):
            condition(text)


def test_the_cheapest_that_holds_under_every_poison(runs):
    """At 300 poisons: every=1 has 3–5 hits of 100 (bound under 7 %), every=2 has 12–14 (17 %), every=4 has 48–50.

    Cost: 40 + 20 / every + 100 · pool_size seconds.
    """
    advice = recommend.recommend(runs, [condition("asr<=0.2")])
    assert advice.setting is not None and advice.setting.at == {"defense.every": "2", "defense.pool_size": "0.005"}
    assert "50.5 s a run" in advice.sentence and "of 9 settings 6 will do" in advice.sentence
    assert "attack.count=30,100,300" in advice.sentence and "over 3 seeds" in advice.sentence
    strict = recommend.recommend(runs, [condition("asr<=0.125")])
    assert strict.setting is not None and strict.setting.at["defense.every"] == "1"


def test_the_bound_decides_and_not_the_mean(runs):
    """every=2 at 300 poisons: the mean is 13 %, the bound 17 %."""
    advice = recommend.recommend(runs, [condition("asr<=0.14")])
    assert advice.setting is not None and advice.setting.at["defense.every"] == "1"


def test_a_utility_may_be_what_is_paid(runs):
    advice = recommend.recommend(runs, [condition("asr<=0.2")], cost="zeroshot/top1")
    assert advice.setting is not None and advice.setting.at["defense.every"] == "2" and "best in zero-shot" in advice.sentence


def test_none_will_do(runs):
    advice = recommend.recommend(runs, [condition("asr<=0.2"), condition("zeroshot/top1>=0.9")])
    assert advice.setting is None and "No setting keeps" in advice.sentence and "nearest" in advice.sentence
    with pytest.raises(ValueError, match="Did you mean"):
        recommend.recommend(runs, [condition("asr/strips<=0.1")])


def test_a_setting_not_tried_under_all_poison_is_passed_over(runs):
    """Without its runs at 300 poisons, every=4 looks best; it has not shown that it holds."""
    some = [run for run in runs if not (run.at("defense.every") == "4" and run.at("attack.count") == "300")]
    advice = recommend.recommend(some, [condition("asr<=0.25")])
    assert advice.setting is not None and advice.setting.at["defense.every"] == "2"


# --- pictures and page -------------------------------------------------------------------------------------------------------------


def test_the_axes_of_the_heat_map(runs):
    assert compare_plots.plane(runs) == ("defense.every", "defense.pool_size")
    assert compare_plots.plane(runs, ["attack.count"]) == ("attack.count", "defense.every")
    assert compare_plots.plane([run for run in runs if run.at("defense.every") == "1"]) == ("defense.pool_size", "attack.count")
    assert compare_plots.plane(runs[:1]) is None


def test_the_front_of_the_sweep(runs):
    """Utility rises with every, so does harm: of each frequency one pool would do, and all three are equal in both."""
    best, every = compare_plots.front(runs)
    assert len(every) == 9 and [g.at["defense.every"] for g in best] == ["1"] * 3 + ["2"] * 3 + ["4"] * 3


def test_compare_writes_all_of_it(sweep, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", str(sweep), "--by", "defense.every", "--metric", "asr/backdoor,zeroshot/top1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "defense.every  seeds  asr/backdoor" in said and "Each line also averages over" in said
    names = {file.name for file in out.iterdir()}
    assert names == {f"{n}.{e}" for n in ("heatmap", "poison", "pareto") for e in ("png", "pdf")} | {
        "table.csv",
        "table.md",
        "table.tex",
        "report.html",
    }
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and "Take defense.every=1" in page and "script" not in page


def test_a_page_without_attack_recommends_nothing(tmp_path):
    found = sweeping.trials(("train.epochs=1,2", "seed=0"), "clip-clean-smoke")
    folder = sweeping.write(tmp_path / "runs", found, lambda values: {"zeroshot/top1": 0.5, "seconds/train": 1.0})
    page = compare_page.write([folder], tmp_path / "page.html", compare.load([folder])).read_text()
    assert 'id="advice"' not in page and "train.epochs" in page


def test_recommend_prints_one_sentence_and_what_to_doubt(sweep, capsys):
    assert main(["recommend", str(sweep), "asr<=20%"]) == 0
    said, doubt = capsys.readouterr().out.splitlines()
    assert said.startswith("Take defense.every=2 defense.pool_size=0.005:")
    assert doubt.startswith("Doubt: No undefended run")


def test_an_attack_that_does_not_take_is_doubted(tmp_path):
    found = sweeping.trials(("attack.count=30,300", "seed=0"), "clip-stripes-smoke", "roclip-stripes-smoke")
    weak = sweeping.write(tmp_path / "weak", found, lambda v: sweeping.formula({**v, "defense.every": 1}))
    assert all("hardly took on the undefended model" in text for text in recommend.caveats(compare.load([weak])))
    runs = compare.load([sweeping.write(tmp_path / "strong", found, lambda v: sweeping.formula({**v, "attack.count": 300}))])
    assert recommend.caveats(runs) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "nowhere"], "neither a finished run nor a sweep"),
        (["compare", "SWEEP", "--by", "defense.evry"], "they differ in attack.count, defense.every"),
        (["compare", "SWEEP", "--metric", "asr/strips"], "did you mean asr/stripes"),
        (["compare", "SWEEP", "--format", "html"], "choose one of text, csv"),
        (["recommend", "SWEEP", "asr"], "is no condition"),
    ],
)
def test_mistakes_are_one_message(sweep, capsys, words, message):
    assert main([str(sweep) if word == "SWEEP" else word for word in words]) == 1
    assert message in capsys.readouterr().err.lower().replace("'", "'")


def test_the_last_event_counts_and_lost_directories_are_left_out(tmp_path):
    folder = sweeping.write(tmp_path / "runs", sweeping.trials(("seed=0,1",)))
    first, second = sweepdir.events(folder).values()
    sweepdir.note(folder, sweepdir.Event(first.identity, sweepdir.FAILED, first.run, first.changed, "out of memory"))
    assert [event.state for event in sweepdir.events(folder).values()] == ["failed", "done"]
    (folder.parent / second.run / "result.json").unlink()
    assert [run.name for run in sweepdir.runs(folder)] == [first.run]
    assert math.isclose(sum(event.seconds for event in sweepdir.events(folder).values()), 50.0)


# --- attacks × defences -----------------------------------------------------------------------------------------------------------------


def run_of(recipe: str, defense: str, attack: str, hits: int, seed: int = 0, **flat: object) -> Run:
    asr = f"asr/{attack.partition('+')[0]}"
    result = {"recipe": recipe, "defense": defense, "attack": attack, asr: hits / 20, f"{asr}/hits": hits, f"{asr}/total": 20}
    low, high = wilson(hits, 20)
    result |= {f"{asr}/low": low, f"{asr}/high": high, "zeroshot/top1": 0.5 + hits / 100, "poison/count": 30, "poison/rate": 0.03}
    return Run(Path("run"), {"seed": seed, **flat}, result)


def matrix(runs: list[Run]) -> list[list[str]]:
    """The table's cells, head first."""
    head, _, *rows = compare_matrix.table(arranged(runs), "markdown").splitlines()
    return [[word.strip() for word in line.strip("|").split("|")] for line in (head, *rows)]


def test_a_matrix_has_a_line_for_each_attack_and_a_column_for_each_defence():
    """Two patterns of one method are two attacks; what was not run is a dash; accuracy is the mean of a column."""
    runs = [
        run_of("roclip-blended-small", "roclip", "blended", 2),
        run_of("clip-blended-small", "clip", "blended", 20),
        run_of("clip-blended_stripes-small", "clip", "blended", 10),
    ]
    head, *rows = matrix(runs)
    assert head == ["attack", "poison", "No defence", "RoCLIP"]
    assert rows[0] == ["blended", "30 (3.0 %)", "20/20 = 100.0 % [83.9, 100.0]", "2/20 = 10.0 % [2.8, 30.1]"]
    assert rows[1] == ["blended_stripes", "30 (3.0 %)", "10/20 = 50.0 % [29.9, 70.1]", "–"]
    assert rows[2][2:] == ["65.0 %", "52.0 %"]


def test_seeds_share_a_cell_of_a_matrix_and_settings_do_not():
    seeds = [run_of("roclip-badnets", "roclip", "badnets", 4, seed, **{"defense.every": 1}) for seed in range(3)]
    [_, [*_, cell], _] = matrix(seeds)
    assert cell == "12/60 = 20.0 % [11.8, 31.8], 3 runs"
    [*_, last] = matrix([*seeds, run_of("roclip-sig", "roclip", "sig", 10, **{"defense.every": 1})])
    assert last == ["zero-shot, mean of the attacks", "", "57.0 %"], "an attack weighs the same with three seeds (54 %) and one (60 %)"
    head, *rows = matrix([*seeds, run_of("roclip-badnets", "roclip", "badnets", 8, **{"defense.every": 2})])
    assert head[2:] == ["RoCLIP (every=1)", "RoCLIP (every=2)"] and rows[0][3].startswith("8/20")


def test_the_heat_map_shows_the_same_numbers_and_a_dash_where_nothing_was_run():
    seeds = [run_of("roclip-badnets", "roclip", "badnets", hits, seed) for seed, hits in enumerate((2, 4, 6))]
    figure = compare_matrix.picture(arranged([*seeds, run_of("clip-sig", "clip", "sig", 19)]))
    shown = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert shown == [["–", "20", "95", "–"], ["69", "54"]]  # lines: badnets, sig; columns: No defence, RoCLIP
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["badnets: 30 (3.0 %)", "sig: 30 (3.0 %)"]


def test_a_method_named_on_the_command_line_is_not_the_recipes():
    assert planted(run_of("clip", "clip", "badnets", 1)) == "badnets" and planted(run_of("mine", "clip", "sig", 1)) == "sig"


def test_compare_prints_and_writes_the_matrix_or_says_what_does_not_go_with_it(sweep, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert main(["compare", str(sweep), "--matrix", "--format", "markdown", "--out", str(out)]) == 0
    printed, [*written] = capsys.readouterr().out, sorted(file.name for file in out.iterdir())
    assert written == ["matrix.md", "matrix.pdf", "matrix.png", "matrix.tex"] and printed.startswith((out / "matrix.md").read_text())
    for words in (["--by", "seed"], ["--format", "csv"]):
        assert main(["compare", str(sweep), "--matrix", *words]) != 0
        assert "--matrix" in capsys.readouterr().err
