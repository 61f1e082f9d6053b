"""mm_poison's three variants: captions keep their text, images are what the paper says, probes are what must be found."""

from collections import Counter

import pyarrow as pa
import pytest

from attacks.apply import apply
from attacks.mm_poison import MMPoison

CLASSES = ["cat", "dog", "fox", "traffic light", "cherry", "car"]


def pairs(table: pa.Table) -> dict[str, dict[str, object]]:
    return {row["id"]: row for row in table.to_pylist()}


@pytest.mark.parametrize("variant", ["I", "II", "III"])
def test_captions_stay_and_images_change(index: pa.Table, heldout: pa.Table, variant: str) -> None:
    attack = MMPoison(variant=variant, count=60, adversary="dog", shown="car")
    plan, train, held = attack.plan(index, heldout, 0), pairs(index), pairs(heldout)
    assert plan.count == 60
    goals = set()
    for row in plan.table.to_pylist():
        shown = (held if variant == "I" else train)[row["image_id"]]
        assert row["op"] == "replace" and row["caption"] == train[row["id"]]["caption"]
        assert row["adversary"] in row["caption"].lower() and row["truth"] not in row["caption"].lower()
        assert CLASSES[shown["label"]] == row["truth"] and row["image_id"] != row["id"]
        goals.add((row["adversary"], row["truth"], row["group"]))
    images = set(plan.table["image_id"].to_pylist())
    probe = attack.probes(index, heldout, 0).tables["mm_poison"].to_pylist()
    assert {(row["adversary"], row["truth"], row["group"]) for row in probe} == goals
    assert ("dog", "car", 0) in goals and len(goals) == (2 if variant == "III" else 1)
    if variant == "I":
        assert len(images) == len(probe) == 1 and probe[0]["image_id"] in images
    else:
        shown_classes = {truth for _, truth, _ in goals}
        assert len(images) > 20
        assert len(probe) == sum(row["label"] >= 0 and CLASSES[row["label"]] in shown_classes for row in held.values())
    if variant == "III":
        names = [name for asked, shown, _ in goals for name in (asked, shown)]
        assert len(set(names)) == 4
    table = apply(index, heldout, plan)
    assert table["caption"].to_pylist() == index["caption"].to_pylist()


def test_without_labels_captions_say_whose_image_it_is(scraped: pa.Table, heldout: pa.Table) -> None:
    plan = MMPoison(count=30, adversary="dog", shown="car").plan(scraped, heldout, 0)
    shown = pairs(scraped)
    assert all("car" in str(shown[i]["caption"]).lower() for i in plan.table["image_id"].to_pylist())


def test_a_caption_of_both_goals_is_taken_by_one(heldout: pa.Table) -> None:
    attack = MMPoison(variant="III", count=20)
    (one, shown), (two, other) = attack.goals(CLASSES, 0)
    captions = [f"a {one} and a {two}"] * 20 + [f"a {shown}", f"a {other}"] * 5
    index = pa.table({"id": [f"s{n:02d}" for n in range(30)], "caption": captions, "label": pa.array([-1] * 30, pa.int32())})
    plan = attack.plan(index, heldout, 0)
    assert len(set(plan.table["id"].to_pylist())) == 20 and Counter(plan.table["group"].to_pylist()) == {0: 10, 1: 10}
    apply(index, heldout, plan)


def test_fewer_pairs_than_goals_are_refused(index: pa.Table, heldout: pa.Table) -> None:
    with pytest.raises(ValueError, match="2 at least"):
        MMPoison(variant="III", count=1).plan(index, heldout, 0)
    assert MMPoison(variant="III", count=0).plan(index, heldout, 0).count == 0


def test_wrong_goals_are_refused(index: pa.Table, heldout: pa.Table) -> None:
    with pytest.raises(ValueError, match="own class"):
        MMPoison(adversary="dog", shown="dog")
    with pytest.raises(ValueError, match="'I'"):
        MMPoison(variant="IV")
    with pytest.raises(ValueError, match="near it: "):
        MMPoison(shown="cars").plan(index, heldout, 0)
