"""The table of an audit: its order, what it is worth against known poison, and what it keeps from training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from defenses.detect import SCORES
from orchestrate import audit_scores, prepared
from orchestrate.data.index import open_dataset
from orchestrate.recipe import from_dict, resolve
from orchestrate.report_text import labels, undefended

from . import small


def scores(count: int, suspicious: list[int], ids: list[str] | None = None) -> pa.Table:
    values = np.zeros(count)
    values[suspicious] = np.arange(len(suspicious), 0, -1)
    return audit_scores.table(pa.chunked_array([ids or [f"train{i:04d}" for i in range(count)]]), {"clip": values}, {})


def test_the_rank_follows_the_sum_of_what_the_scores_add():
    table = audit_scores.table(
        pa.chunked_array([list("abcd")]), {"clip": np.array([1.0, 4, 2, 3]), "repeats": np.array([0.0, 9, 0, 0])}, {}
    )
    total = table["adds_clip"].to_numpy() + table["adds_repeats"].to_numpy()
    assert table["suspicion"].to_numpy() == pytest.approx(total, rel=1e-6)
    assert table["rank"].to_pylist() == [4, 1, 3, 2]


def test_every_score_keeps_a_column_of_its_own():
    values = {name: np.random.default_rng(i).random(9).astype(np.float32) for i, name in enumerate(SCORES)}
    table = audit_scores.table(pa.chunked_array([list("abcdefghi")]), values, {})
    assert len(table.column_names) == len(set(table.column_names)) == 3 + 2 * len(SCORES)
    assert all((table[name].to_numpy() == values[name]).all() for name in SCORES)


def test_equal_suspicions_rank_alike_whatever_the_order_of_rows():
    ids = [f"p{i}" for i in range(50)]
    one, two = (audit_scores.table(pa.chunked_array([some]), {"clip": np.ones(50)}, {}) for some in (ids, ids[::-1]))
    assert one["rank"].to_pylist() == two["rank"].to_pylist()[::-1] != list(range(1, 51))


def test_measures_agree_with_counting():
    rng = np.random.default_rng(0)
    poison = np.arange(200) < 20
    values = rng.integers(0, 12, 200) + 4 * poison
    table = audit_scores.table(pa.chunked_array([[str(i) for i in range(200)]]), {"clip": values.astype(float)}, {})
    found = audit_scores.measured(table, poison, np.where(poison, "x", ""))
    assert list(found) == ["all"] and list(found["all"]) == ["combined", "clip"]
    wins = [float(a > b) + 0.5 * (a == b) for a in values[poison] for b in values[~poison]]
    assert found["all"]["clip"]["auroc"] == pytest.approx(np.mean(wins))
    assert found["all"]["clip"]["ceiling"] == 0.1


def test_recall_shares_out_ties():
    values, truth = np.array([5, 4, 4, 4, 1]), np.array([True, True, False, False, True])
    assert audit_scores.recall(values, truth, 1) == pytest.approx(1 / 3)
    assert audit_scores.recall(values, truth, 2) == pytest.approx((1 + 1 / 3) / 3)


def test_parts_of_an_attack_are_told_apart_from_the_clean_pairs_only():
    part = np.array(["a", "b", "", "", ""], dtype=object)
    table = audit_scores.table(pa.chunked_array([list("vwxyz")]), {"clip": np.array([9.0, 0, 1, 2, 3])}, {})
    found = audit_scores.measured(table, part != "", part.astype(str))
    assert (found["a"]["clip"]["auroc"], found["b"]["clip"]["auroc"]) == (1.0, 0.0)
    assert found["a"]["clip"]["pairs"] == 4


def test_unknown_scores_count_as_the_least_suspicious():
    table = audit_scores.table(pa.chunked_array([list("abc")]), {"moved": np.array([np.nan, 0.0, 1.0])}, {})
    assert table["rank"].to_pylist()[2] == 1 and table["moved"].to_pylist()[0] is None
    assert audit_scores.measured(table, np.array([True, False, False]), np.array(["x", "", ""]))["all"]["moved"]["auroc"] == 0


def test_moved_counts_the_rounds_that_gave_another_caption(tmp_path: Path):
    rounds = tmp_path / "rounds"
    rounds.mkdir()
    for epoch, rows in ((2, [0, -1]), (4, [1, 1])):
        pq.write_table(pa.table({"id": ["a", "b"], "pool_row": pa.array(rows, pa.int32())}), rounds / f"e{epoch:03d}.parquet")
        pq.write_table(pa.table({"id": ["x", "y"], "caption": ["own of a", "other"]}), rounds / f"e{epoch:03d}-pool.parquet")
    found = audit_scores.moved(tmp_path, pa.chunked_array([["new", "b", "a"]]), ["n", "own of b", "own of a"])
    assert np.isnan(found[0]) and found[1:].tolist() == [0.5, 0.5]  # a: its own caption drawn, then another; b: kept, then another
    with pytest.raises(ValueError, match="other pairs"):
        audit_scores.moved(tmp_path, pa.chunked_array([["new"]]), ["n"])
    with pytest.raises(ValueError, match="no matching rounds"):
        audit_scores.moved(rounds, pa.chunked_array([["a"]]), ["n"])


# --- data.exclude -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("set"))


def excluding(folder: Path, file: Path, drop: float) -> prepared.Prepared:
    recipe = small.recipe(folder, data__exclude=str(file), data__drop=drop)
    return prepared.plan(recipe, open_dataset(recipe.data))


def test_training_goes_without_the_most_suspicious_pairs(folder: Path, tmp_path: Path):
    plain = prepared.plan(small.recipe(folder), open_dataset(small.recipe(folder).data))
    ids = plain.table["id"].to_pylist()
    bad = [i for i, poison in enumerate(plain.table["poison"].to_pylist()) if poison]
    pq.write_table(scores(len(ids), [*bad[:5], 0], ids), tmp_path / "scores.parquet")
    ready = excluding(folder, tmp_path / "scores.parquet", 5)
    assert set(ids) - set(ready.table["id"].to_pylist()) == {ids[i] for i in bad[:5]}
    assert prepared.left_out(ready) == (5, 5) and prepared.left_out(plain) == (0, 0)
    assert ready.manifest.count == plain.manifest.count
    assert prepared.left_out(excluding(folder, tmp_path / "scores.parquet", 6)) == (6 if 0 not in bad else 7, 5)
    assert excluding(folder, tmp_path / "scores.parquet", 0).table.num_rows == len(ids)


def test_scores_of_other_pairs_are_refused(folder: Path, tmp_path: Path):
    pq.write_table(scores(120, [3]), tmp_path / "scores.parquet")  # of the clean set: the added poison has no rank
    with pytest.raises(ValueError, match=r"no rank for 12 of 132 training pairs .*Audit this very recipe"):
        excluding(folder, tmp_path / "scores.parquet", 0.01)
    with pytest.raises(ValueError, match="no readable scores"):
        excluding(folder, tmp_path / "nothing.parquet", 0.01)
    with pytest.raises(ValueError, match="no table of scores"):
        excluding(folder, folder / "train.parquet", 0.01)


def test_a_drop_that_leaves_nothing_is_refused():
    assert audit_scores.budget(0.01, 1000) == 10
    with pytest.raises(ValueError, match="leaves none"):
        audit_scores.budget(10, 10)


def test_the_identity_follows_the_content_of_the_scores(tmp_path: Path):
    def identity(file: Path, drop: float = 0.01) -> str:
        return resolve("run", [("command line", {"data.exclude": str(file), "data.drop": drop})]).recipe.identity

    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    pq.write_table(scores(9, [1]), one)
    pq.write_table(scores(9, [1]), two)
    assert identity(one) == identity(two) != identity(one, 0.02)
    pq.write_table(scores(9, [2]), two)
    assert identity(one) != identity(two)


def test_without_an_audit_a_recipe_keeps_its_identity_and_takes_no_drop():
    tree = resolve("run", []).recipe.as_dict()
    del tree["data"]["exclude"], tree["data"]["drop"]
    assert from_dict(tree).recipe.identity == resolve("run", []).recipe.identity == "083bf366b3046296"
    with pytest.raises(ValueError, match=r"data\.drop=0\.02: say by which audit"):
        resolve("run", [("command line", {"data.drop": 0.02})])


def test_tables_name_the_audit_as_a_defence():
    plain = {"defense": "clip", "attack": "badnets"}
    audited = [{**plain, "audit/share": 0.01}, {**plain, "defense": "roclip", "audit/share": 0.05}]
    assert labels([plain, *audited]) == ["No defence", "Audit, 1 % removed", "RoCLIP + audit, 5 % removed"]
    assert undefended(plain) and not undefended(audited[0])
