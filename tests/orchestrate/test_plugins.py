"""Names → classes: built in, from a file, from an installed package."""

from __future__ import annotations

import dataclasses
import pickle
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from orchestrate import plugins
from orchestrate.recipe import from_dict, resolve

MINE = '''
from __future__ import annotations

from dataclasses import dataclass

from defenses.base import Defense


@dataclass(frozen=True)
class KeepTop(Defense):
    """Nothing yet."""

    share: float = 0.5
    every: int | None = None


@dataclass(frozen=True)
class Needs(Defense):
    folder: str


@dataclass
class Loose:
    share: float = 0.5


class Bare(Defense):
    share: float = 0.5


class NoData:
    pass


NUMBER = 3
'''

WIDE = """
from dataclasses import dataclass

from attacks.backdoor import Stripes


@dataclass(frozen=True)
class Wide(Stripes):
    size: float = 0.5
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def defended(name: str, **options: object):
    return resolve("run", [("command line", {"defense": name, **{f"defense.{k}": v for k, v in options.items()}})]).recipe


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in plugins.BUILT_IN.items() for name in table])
def test_every_built_in_name_loads_a_class_of_its_room(kind, name):
    cls = plugins.load(kind, name)
    assert dataclasses.is_dataclass(cls) and cls.__module__.startswith(f"{kind}s.")
    assert plugins.names(kind)[: len(plugins.BUILT_IN[kind])] == list(plugins.BUILT_IN[kind])


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("attack", "badnet", r"no attack is called 'badnet'. Did you mean badnets or wanet\?"),
        ("defense", "ROCLIP", r"no defense is called 'ROCLIP'. Known: clip, augmented, roclip.*; or ./file.py:Class"),
        ("attack", "roclip", r"no attack is called 'roclip'"),
        ("defense", "no.such.module:Class", r"cannot load 'no.such.module:Class': No module named 'no'"),
        ("defense", "defenses.base:Nothing", r"cannot load 'defenses.base:Nothing': module 'defenses.base' has no attribute"),
        ("attack", "./mine:Frame", r"cannot load './mine:Frame': that names no module. Of a file write the ending too: ./mine.py:Frame"),
        ("attack", "/home/me/mine:Frame", r"write the ending too: /home/me/mine.py:Frame"),
        ("attack", ":Frame", r"write the ending too: ./mine.py:Frame"),
        ("defense", "./nowhere.py:Class", r"no file .*nowhere.py \(from './nowhere.py:Class'\)"),
    ],
)
def test_a_wrong_name_is_an_error_with_a_way_on(kind, name, message):
    with pytest.raises(ValueError, match=message):
        plugins.load(kind, name)


def test_a_module_path_is_a_name_too():
    assert plugins.load("defense", "defenses.roclip:RoCLIP") is plugins.load("defense", "roclip")


def test_a_class_in_a_file_is_configured_like_a_built_in_one(mine: Path):
    recipe = defended("./mine.py:KeepTop", share="0.25", every="3")
    [(name, part)] = recipe.defense.parts
    assert (name, part.share, part.every) == ("KeepTop", 0.25, 3)
    assert defended("./mine.py:KeepTop", every="none").defense.parts[0][1].every is None
    with pytest.raises(ValueError, match=r"unknown key 'defense.shar'. Did you mean defense.share"):
        defended("./mine.py:KeepTop", shar=1)


def test_a_file_is_found_again_from_another_directory(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker, and a later re-run from recipe.json, start elsewhere."""
    recipe = defended("./mine.py:KeepTop", share=0.25)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = from_dict(recipe.as_dict()).recipe
    assert again == recipe and again.identity == recipe.identity
    assert pickle.loads(pickle.dumps(again)) == recipe


def test_the_identity_follows_a_files_content_not_its_place(mine: Path, tmp_path: Path):
    before = defended("./mine.py:KeepTop").identity
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine.py").write_text(MINE)
    assert defended("./copy/mine.py:KeepTop").identity == before
    mine.write_text(MINE.replace("Nothing yet", "Something"))
    assert defended("./mine.py:KeepTop").identity != before


def test_an_edited_file_is_read_anew(mine: Path):
    assert defended("./mine.py:KeepTop").defense.parts[0][1].share == 0.5
    mine.write_text(MINE.replace("0.5", "0.75"))
    assert defended("./mine.py:KeepTop").defense.parts[0][1].share == 0.75


def test_parts_from_files_go_by_their_class_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text(WIDE)
    recipe = resolve("run", [("command line", {"attack": "targeted+./other.py:Wide", "attack.Wide.count": 3})]).recipe
    assert [name for name, _ in recipe.attack.parts] == ["targeted", "Wide"]
    assert recipe.attack.parts[1][1].count == 3 and recipe.attack.parts[1][1].size == 0.5
    assert from_dict(recipe.as_dict()).recipe == recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoData", r"is no frozen dataclass: write @dataclass\(frozen=True\) above the class"),
        ("Bare", "is no frozen dataclass"),  # would inherit the base's fields and lose its own
        ("Loose", "is no frozen dataclass"),
        ("NUMBER", "is no frozen dataclass"),
        ("Keptop", "has no class 'Keptop'"),
        ("Needs", "defense.folder has no default: give it"),
    ],
)
def test_what_is_no_method_is_refused(mine: Path, name: str, message: str):
    with pytest.raises(ValueError, match=message):
        defended(f"./mine.py:{name}")


def test_an_option_without_default_is_taken_when_given(mine: Path):
    assert defended("./mine.py:Needs", folder="x").defense.parts[0][1].folder == "x"


def test_a_file_that_cannot_be_imported_says_why_every_time(mine: Path):
    mine.write_text(MINE + "\nimport nothing_of_this_name\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot load .*mine.py: ModuleNotFoundError: No module named 'nothing_of_this_name'"):
            defended("./mine.py:KeepTop")


def test_an_installed_package_offers_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A real distribution on the path, found by its entry points."""
    (tmp_path / "their_methods.py").write_text(MINE)
    info = tmp_path / "their_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[antidote.defenses]\nkeep-top = their_methods:KeepTop\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins._entry_points.cache_clear()
    try:
        assert [e.name for e in entry_points(group="antidote.defenses")] == ["keep-top"]
        assert "keep-top" in plugins.names("defense")
        assert defended("keep-top", share=0.1).defense.parts[0][1].share == 0.1
    finally:
        plugins._entry_points.cache_clear()
