"""The report from run directories as a run leaves them, with made-up numbers."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from orchestrate import report
from orchestrate.report_plots import losses
from orchestrate.report_text import doubts, labels, success, table
from orchestrate.statistics import wilson

CLASSES = ["star", "ring", "cross", "heart", "tree", "boat", "house", "fish"]
EVIL = "a <script>alert('x')</script> star & \"ring\" on $grass$"
ROUND = pa.struct([("epoch", pa.int32()), ("caption", pa.string()), ("similarity", pa.float32())])
GALLERY = pa.schema(
    [(name, pa.string()) for name in ("section", "kind", "stamp", "id")]
    + [("png", pa.binary()), ("original_png", pa.binary())]
    + [(name, pa.string()) for name in ("caption", "adversary", "truth")]
    + [("rounds", pa.list_(ROUND))]
)


def picture(seed: int, stripes: bool = False) -> bytes:
    """A 64 × 64 PNG of some shape, with or without a striped corner."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (64, 64), tuple(int(c) for c in rng.integers(150, 256, 3)))
    draw = ImageDraw.Draw(image)
    x, y = (int(v) for v in rng.integers(4, 24, 2))
    shape = draw.ellipse if seed % 2 else draw.rectangle
    shape((x, y, x + 32, y + 32), fill=tuple(int(c) for c in rng.integers(0, 160, 3)))
    for k in range(0, 16, 4) if stripes else ():
        draw.rectangle((46 + k, 46, 47 + k, 61), fill="black")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def gallery(path: Path, robust: list[int]) -> None:
    rng = np.random.default_rng(1)
    rows = []
    for i in range(14):
        targeted = i < 7
        adversary, truth = CLASSES[i % 4], CLASSES[4 + i % 4]
        caption = EVIL if i == 0 else f"a photo of a {adversary} on the grass, near a small tree"
        rounds = []
        for epoch in robust:
            kept = rng.random() < (0.5 if epoch < 4 else 0.08)
            text = f"there is a large {adversary if kept else truth} in the upper left, on a beach"
            rounds.append({"epoch": epoch, "caption": text, "similarity": 0.2 + 0.4 * rng.random()})
        kind, stamp = ("targeted", "") if targeted else ("backdoor", "stripes")
        seed = i // 2 if targeted else i
        before = None if targeted else picture(seed)
        row = [caption, adversary, truth, rounds]
        rows.append(["poison", kind, stamp, f"p{i}", picture(seed, not targeted), before, *row])
    for i in range(4):
        truth = CLASSES[i]
        rounds = [{"epoch": e, "caption": f"an image showing a {CLASSES[i + (e == 2)]}", "similarity": 0.6} for e in robust]
        rows.append(["clean", "", "", f"c{i}", picture(50 + i), None, f"a drawing of a {truth}", "", truth, rounds])
    pq.write_table(pa.Table.from_pylist([dict(zip(GALLERY.names, row, strict=True)) for row in rows], GALLERY), path)


def plans(path: Path) -> None:
    """Plans of two pairs: a poisoned one with an evil caption, and a clean one that kept its own."""
    rng = np.random.default_rng(2)
    rows = []
    for i, (section, adversary, which) in enumerate([("poison", "star", "matched"), ("clean", "", "nearest")]):
        for k, (kind, caption) in enumerate([("original", EVIL), (which, "a small ring on a beach")]):
            words = [*caption.split(), "·end"]
            plan = rng.dirichlet(np.full(len(words), 0.1), 16) / 16  # patches × words
            pair = {"id": f"p{i}", "section": section, "kind": "", "stamp": "", "truth": "ring", "adversary": adversary}
            told = {"epoch": 8, "which": kind, "caption": caption, "words": words, "distance": 0.75 - 0.1 * k, "epsilon": 0.1}
            rows.append(pair | told | {"png": picture(i), "plan": plan.T.flatten().tolist(), "rows": 4, "columns": 4})
    pq.write_table(pa.Table.from_pylist(rows), path)


def leave(folder: Path, defense: str, hits: tuple[int, int], top1: float, every: int = 0, **extra: Any) -> Path:
    """One run directory. hits: successes of 16 targets and of 200 triggered images; `every`: robust epochs."""
    folder.mkdir(parents=True)
    attack = {"use": "targeted+stripes", "targeted": {"targets": 16, "pairs": 30}, "stripes": {"count": 200, "side": 8}}
    recipe = {
        "name": f"{defense}-targeted",
        "seed": 0,
        "attack": attack,
        "defense": {"use": defense} | ({"every": every} if every else {}),
        "data": {"path": "scenes", "size": 4000},
        "model": {"name": "tiny-rn"},
        "train": {"epochs": 16},
        "track": {"uri": "http://me:hunter2@host:5000"},
        "identity": "1a2b3c4d" * 8,
    }
    shares = {"asr/targeted": (hits[0], 16), "asr/stripes": (hits[1], 200)}
    result: dict[str, Any] = {key: k / n for key, (k, n) in shares.items()}
    for key, (k, n) in shares.items():
        low, high = wilson(k, n)
        result |= {f"{key}/hits": k, f"{key}/total": n, f"{key}/low": low, f"{key}/high": high}
    result |= {
        "asr/stripes/clean": 0.015,
        "asr/stripes/zscore": 2.4,
        "asr/stripes/accuracy": 0.3,
        "asr/targeted/truth": 0.1,
    }
    result |= {"recipe": recipe["name"], "identity": recipe["identity"], "attack": attack["use"], "defense": defense}
    result |= {"data": "scenes", "seed": 0, "poison/count": 680, "poison/rate": 680 / 4680, "zeroshot/top1": top1}
    result |= {"zeroshot/top5": 0.95, "probe/top1": top1 + 0.06, "retrieval/r1": 0.21, "epochs": 16, "workers": 2}
    result |= {
        "seconds/train": 312.4,
        "seconds/eval": 9.1,
        "seconds/data": 14.0,
        "versions/torch": "2.8",
        "versions/ray": "2.60",
    }
    robust = [e for e in range(1, 17) if every and e % every == 0]
    result |= {"seconds/match": 2.1 * len(robust)} if robust else {}
    result |= extra
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "data.json").write_text(json.dumps({
        "report": ["Scenes: 4,000 pairs, 8 classes.", "3 images could not be decoded."], "quarantined": 3, "train": 4680,
        "heldout": 1000, "fingerprint": "f00dfeed", "classes": CLASSES,
    }))  # fmt: skip
    lines: list[dict[str, Any]] = []
    for epoch in range(1, 17):
        loss = 4.2 / (1 + 0.25 * epoch) + (0.5 if epoch in robust else 0)
        lines += [{"kind": "train", "epoch": epoch, "step": 36 * epoch, "loss": loss, "robust": epoch in robust}]
        if epoch in robust:
            kept = 0.5 / epoch
            lines += [{"kind": "match", "epoch": epoch, "pairs": 4680, "moved": 0.97, "poisoned": 680, "poisoned_kept": kept,
                       "clean_kept": min(0.9, 0.1 * epoch), "seconds": 1.9, "pool": 440, "distance": 0.4}]  # fmt: skip
        if epoch % 4 == 0:
            done = epoch / 16
            lines += [{"kind": "eval", "epoch": epoch, "zeroshot/top1": top1 * done**0.4,
                       "asr/targeted": result["asr/targeted"] * done, "asr/stripes": result["asr/stripes"] * done**2}]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gallery(folder / "gallery.parquet", robust)
    return folder


class Page(HTMLParser):
    """Checks that tags nest, and collects text and attributes."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.open += [tag] if tag not in self.VOID else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        leave(folder / "roclip-1a", "roclip", (1, 12), 0.684, every=2),
        leave(folder / "clip-2b", "none", (16, 181), 0.712),
        leave(folder / "augmented-3c", "augmented", (14, 96), 0.701),
    ]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> tuple[str, Page]:
    text = report.write_report(runs, runs[0].parent / "out" / "page.html").read_text()
    return text, Page(text)


def results(runs: list[Path]) -> list[dict[str, Any]]:
    return [json.loads((run / "result.json").read_text()) for run in runs]


def test_the_page_stands_alone(page: tuple[str, Page]) -> None:
    text, parsed = page
    assert "script" not in parsed.tags and "link" not in parsed.tags and "svg" in parsed.tags
    assert all(link.startswith(("data:image/", "#")) for link in parsed.links) and len(parsed.links) > 20
    assert not re.search(r"https?://", text.replace("http://***@host:5000", ""))
    assert "default-src 'none'" in text and "hunter2" not in text


def test_what_comes_from_data_is_escaped(page: tuple[str, Page]) -> None:
    text, parsed = page
    assert "<script" not in text and "&lt;script&gt;" in text
    assert EVIL in parsed.text


def test_numbers_are_those_of_the_results(runs: list[Path], page: tuple[str, Page]) -> None:
    parsed = page[1]
    for result in results(runs):
        for attack in ("targeted", "stripes"):
            share, low, high = (100 * result[f"asr/{attack}{end}"] for end in ("", "/low", "/high"))
            count = f"{result[f'asr/{attack}/hits']}/{result[f'asr/{attack}/total']}"
            assert f"{share:.1f} % {count} 95 %: {low:.1f}–{high:.1f}" in parsed.text
        assert f"{100 * result['zeroshot/top1']:.1f} %" in parsed.text
    assert "680 14.5 %" in parsed.text and "5 m 12 s matching 16.8 s" in parsed.text
    assert "antidote run runs/roclip-1a/recipe.json" in parsed.text and "f00dfeed" in parsed.text
    assert "3 quarantined" in parsed.text and "torch 2.8" in parsed.text
    assert re.search(r"2 4,680 440 97.0 % 680 25.0 % 20.0 % 0.40 1.9 s", parsed.text)  # the first matching round


def test_the_headline_says_what_happened(runs: list[Path], page: tuple[str, Page]) -> None:
    first = "The undefended model gives 16 of 16 poisoned images the attacker's label; with RoCLIP 1 of 16"
    assert page[1].text.count(first) == 1
    said = report.headline(results(runs[:2]))
    trigger = "Shown the stripes trigger, the undefended model sees the attacker's class in 181 of 200 images"
    accuracy = "Zero-shot accuracy: 71.2 % undefended, 68.4 % with RoCLIP."
    assert said == [f"{first}.", f"{trigger}; with RoCLIP 12 of 200.", accuracy]
    alone = report.headline(results(runs[:1]))
    assert alone[0] == "The model trained with RoCLIP gives 1 of 16 poisoned images the attacker's label."
    assert report.headline([{"attack": "none", "defense": "none", "zeroshot/top1": 0.5}]) == [
        "Zero-shot accuracy: 50.0 % undefended on clean data."
    ]


def test_matched_captions_are_marked_by_what_they_name(runs: list[Path], page: tuple[str, Page]) -> None:
    rows = [row for row in pq.read_table(runs[0] / "gallery.parquet").to_pylist() if row["section"] == "poison"]
    row = rows[0]
    shown = next(card for group in report._pairs(report._read(runs[:1])[0]) for card in group["cards"] if card["row"]["id"] == row["id"])
    assert [one["names"] for one in shown["rounds"]] == [f" {row['adversary']} " in one["caption"] for one in row["rounds"]]
    assert 'class="line bad"' in page[0] and 'class="line good"' in page[0]


def test_transport_plans_are_drawn_over_the_image_and_escaped(runs: list[Path], page: tuple[str, Page], tmp_path: Path) -> None:
    run = leave(tmp_path / "otcclip", "otcclip", (1, 12), 0.7, every=2)
    plans(run / "plans.parquet")
    text = report.write_report([run], tmp_path / "page.html").read_text()
    parsed = Page(text)
    assert "Where the words go" in parsed.text and "ε = 0.1" in parsed.text
    assert "<script" not in text and "&lt;script&gt;alert(" in text
    assert "planted caption · 0.750 a" in parsed.text and "own caption · 0.750 a" in parsed.text
    assert "matched in epoch 8 · 0.650 a small ring on a beach ·end" in parsed.text
    assert "nearest in the pool, epoch 8 (own stayed) · 0.650 a small ring" in parsed.text
    assert all(link.startswith(("data:image/", "#")) for link in parsed.links)
    assert {link for link in parsed.links if link.startswith("#plan")} == {"#plan-1-1", "#plan-1-2"}
    assert all(text.count(f'<image id="plan-1-{k}"') == 1 for k in (1, 2))  # once a page, used twice
    drawn = re.findall(r'<rect x="(\d)" y="(\d)" width="1" height="1" fill="(#\w+)" fill-opacity="([.\d]+)">', text)
    assert drawn and all(int(x) < 4 and int(y) < 4 and 0 < float(opacity) < 1 for x, y, _, opacity in drawn)
    assert {fill for *_, fill, _ in drawn} <= {"#d6455d", "#2aa876", "#1f8fd1", "#e09a2b", "#8a63d2"}
    assert re.search(r"<title>\S+ · \d+\.\d × an even part</title>", text)
    assert "Where the words go" not in page[1].text


def test_matching_quality_of_the_first_and_last_round(page: tuple[str, Page], tmp_path: Path) -> None:
    run = leave(tmp_path / "otcclip", "otcclip", (1, 12), 0.7)
    shares = {"cosine": (0.5, 0.7), "transport": (0.6, 0.9)}
    with (run / "metrics.jsonl").open("a") as file:
        for epoch in (2, 4, 6):
            quality = {f"quality/{name}/clean": clean + epoch / 100 for name, (clean, _) in shares.items()}
            quality |= {f"quality/{name}/poisoned": freed for name, (_, freed) in shares.items()}
            file.write(json.dumps({"kind": "match", "epoch": epoch, "pool": 440, **quality}) + "\n")
    text = report.write_report([run], tmp_path / "page.html").read_text()
    assert "2 440 cosine 52.0 % 70.0 % transport 62.0 % 90.0 % 6 440 cosine 56.0 % 70.0 % transport 66.0 % 90.0 %" in Page(text).text
    assert "<b>62.0 %</b>" in text and "<b>90.0 %</b>" in text and "<b>52.0 %</b>" not in text
    assert "Matching quality" not in page[1].text


def test_safe_pairs_and_a_repair_are_shown(page: tuple[str, Page], tmp_path: Path) -> None:
    safe, repaired = leave(tmp_path / "safeclip", "safeclip", (1, 12), 0.7), leave(tmp_path / "cleanclip", "cleanclip", (3, 40), 0.6)
    split = {"kind": "select", "epoch": 7, "pairs": 4680, "poisoned": 680, "safe": 1170, "share": 0.25, "poison_in_safe": 0.031}
    with (safe / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(split | {"poisoned_safe": 0.053, "cosine/clean": 0.512, "cosine/poisoned": 0.208}) + "\n")
    with (repaired / "metrics.jsonl").open("a") as file:
        for epoch, hits in ((16, 180), (20, 40)):
            if epoch > 16:
                file.write(json.dumps({"kind": "train", "epoch": epoch, "loss": 1.0, "robust": False, "repair": True}) + "\n")
            found = {"asr/stripes": hits / 200, "asr/stripes/hits": hits, "asr/stripes/total": 200, "zeroshot/top1": 0.9 - epoch / 100}
            file.write(json.dumps({"kind": "eval", "epoch": epoch, **found}) + "\n")
    text = Page(report.write_report([safe, repaired], tmp_path / "page.html").read_text()).text
    assert "7 4,680 1,170 25.0 % 3.1 % 680 5.3 % 0.51 0.21" in text
    assert "before the repair (epoch 16) 74.0 % – 90.0 % 180/200" in text and "after it (epoch 20) 70.0 % – 20.0 % 40/200" in text
    assert "Safe pairs" not in page[1].text and "before the repair" not in page[1].text


def test_doubts_are_raised(runs: list[Path], page: tuple[str, Page], tmp_path: Path) -> None:
    assert "RoCLIP: measured right after a robust epoch" in page[1].text
    assert "targeted: Augmentation only may be no better than no defence" in page[1].text
    weak = leave(tmp_path / "weak", "none", (1, 5), 0.7)
    assert sum("hardly took" in line for line in doubts(results([weak, *runs[:1]]))) == 2
    recipe = json.loads((weak / "recipe.json").read_text()) | {"seed": 7}
    (weak / "recipe.json").write_text(json.dumps(recipe))
    text = report.write_report([weak, runs[0]], tmp_path).read_text()
    assert "differ in more than the defence (seed)" in text and (tmp_path / "report.html").exists()


def test_parts_that_are_missing_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "recipe.json").write_text('{"name": "x", "attack": null, "defense": null}')
    text = report.write_report([tmp_path / "young"], tmp_path / "page.html").read_text()
    assert "No results yet" in Page(text).text and "<svg" not in text and "What was poisoned" not in text
    bare = leave(tmp_path / "bare", "roclip", (1, 2), float("nan"), every=2)
    (bare / "gallery.parquet").unlink()
    (bare / "data.json").unlink()
    with (bare / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "epoch": 17, "loss": "NaN"}\n{"kind": "match", "epoch": 18}\n{"torn')
    parsed = Page(report.write_report([bare], tmp_path / "page.html").read_text())
    assert "1 of 16" in parsed.text and "nan" not in parsed.text.lower().split() and "<img" not in parsed.tags
    with pytest.raises(ValueError, match="no run directory"):
        report.write_report([tmp_path], tmp_path / "page.html")
    with pytest.raises(ValueError, match="No runs"):
        report.write_report([], tmp_path / "page.html")


def test_the_same_runs_give_the_same_bytes(runs: list[Path], page: tuple[str, Page], tmp_path: Path) -> None:
    assert report.write_report(runs, tmp_path / "again.html").read_text() == page[0]


def test_tables(runs: list[Path]) -> None:
    head, rows = table(results(runs))
    assert head[:4] == ["defence", "zero-shot", "probe", "retrieval R@1"]
    assert rows[1][4] == "16/16 = 100.0 % [80.6, 100.0]" and rows[0][5] == "12/200 = 6.0 % [3.5, 10.2], clean 1.5 %"
    lines = report.text_table(results(runs)).splitlines()
    assert len(lines) == 5 and len({line.index("680") for line in lines[2:]}) == 1
    assert report.markdown_table([{"defense": "a|b"}]).splitlines()[2].startswith("| a\\|b, clean data | – |")
    twins = [{"defense": "roclip", "attack": "x", "seed": seed} for seed in (1, 2)]
    assert labels(twins) == ["RoCLIP · seed 1", "RoCLIP · seed 2"]


def test_loss_by_epoch_keeps_divergence_visible() -> None:
    lines = [{"kind": "train", "epoch": 1, "loss": 2.0}, {"kind": "train", "epoch": 1, "loss": 4.0, "robust": True}]
    assert losses([*lines, {"kind": "train", "epoch": 2, "loss": "NaN"}]) == {1: (3.0, True), 2: (None, False)}


def test_figures_for_a_paper(runs: list[Path], tmp_path: Path) -> None:
    names = [path.name for path in report.save_plots(runs, tmp_path / "figures")]
    assert names == ["outcome.pdf", "outcome.png", "curves.pdf", "curves.png"]
    assert (tmp_path / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_needs_neither_ray_nor_mlflow_nor_torch(runs: list[Path], tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from orchestrate import report; "
        f"report.write_report([pathlib.Path({str(runs[0])!r})], pathlib.Path({str(tmp_path / 'p.html')!r})); "
        "print([m for m in ('ray', 'mlflow', 'torch') if m in sys.modules])"
    )
    root = Path(report.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_targeted_attack_shows_its_floor_and_is_no_backdoor_for_it() -> None:
    result = {"asr/adaptive": 0.5, "asr/adaptive/truth": 0.25, "asr/adaptive/hits": 2, "asr/adaptive/total": 4, "asr/adaptive/clean": 0.125}
    found = success(result, "adaptive")
    assert found is not None and not found.backdoor and str(found).endswith("clean 12.5 %")
    old = success({key: value for key, value in result.items() if not key.endswith("/clean")}, "adaptive")
    assert old is not None and not old.backdoor and str(old) == "2/4 = 50.0 %"
