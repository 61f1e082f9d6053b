"""Passwords in addresses are found wherever they hide, and what is public stays readable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrate import rundir, sweepdir
from orchestrate.recipe import resolve
from orchestrate.secrets import credentials, masked, masked_tree
from orchestrate.sweepdir import Asking


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg2://me:p%40ss@db/antidote", "postgresql+psycopg2://***@db/antidote"),
        ("https://ghp_token@host/", "https://***@host/"),
        ("s3://AKIA:secret@bucket/a?region=x", "s3://***@bucket/a?region=x"),
        ("s3://bucket/a?access_key=AKIA&secret_key=abc/def&region=x", "s3://bucket/a?access_key=***&secret_key=***&region=x"),
        ("https://a.blob.core.windows.net/c?sv=1&sig=abc%3D", "https://a.blob.core.windows.net/c?sv=1&sig=***"),
        ("abfs://container:key@account.dfs.core.windows.net/x", "abfs://***@account.dfs.core.windows.net/x"),
        ("MLFLOW_TRACKING_PASSWORD=hush", "MLFLOW_TRACKING_PASSWORD=***"),
    ],
)
def test_what_is_secret_is_masked(text: str, shown: str):
    assert masked(text) == shown
    assert masked(shown) == shown
    assert credentials(text) == ("://" in text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/runs",
        "abfs://container@account.dfs.core.windows.net/x",
        "/data/a@b/c",
        "http://host:5000",
        "a photo of user@host",
        "max_tokens=3",
    ],
)
def test_what_is_public_stays(text: str):
    assert masked(text) == text and not credentials(text)


NAMES = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1)


@given(NAMES, NAMES, NAMES)
def test_no_password_survives_in_an_address(user: str, word: str, host: str):
    text = f"see http://{user}:{word}secret@{host}/path for more"
    assert f"{word}secret" not in masked(text) and masked(text).endswith(f"@{host}/path for more")


def test_nested_values_are_masked_and_nothing_else_changes():
    tree = {"a": ["http://u:p@h", 1, None, {"b": ("x", "postgresql://u:p@h/d")}], "token": "=no=address"}
    assert masked_tree(tree) == {"a": ["http://***@h", 1, None, {"b": ["x", "postgresql://***@h/d"]}], "token": "=no=address"}


def test_a_run_directory_holds_no_password(tmp_path: Path):
    words = {"cluster.runs": str(tmp_path), "track.uri": "postgresql://me:hush@db/antidote"}
    recipe = resolve("x", [("test", words)]).recipe
    with rundir.claimed(recipe) as folder:
        kept = (folder / "recipe.json").read_text()
    assert "hush" not in kept and "postgresql://***@db/antidote" in kept
    assert not any("hush" in str(value) for value in rundir.parameters(recipe).values())


def test_a_sweep_directory_holds_no_password(tmp_path: Path):
    sweepdir.begin(tmp_path, Asking("s", ("clip",), ("track.uri=http://me:hush@host/", "seed=0..2")), "0123", [])
    assert "hush" not in (tmp_path / sweepdir.SWEEP).read_text()
    assert json.loads((tmp_path / sweepdir.SWEEP).read_text())["words"][1] == "seed=0..2"


def test_a_recipe_refuses_keys_in_the_address_of_its_data():
    with pytest.raises(ValueError, match=r"data\.path=s3://\*\*\*@bucket/x: keep keys out of recipes") as error:
        resolve("x", [("test", {"data": "s3://AKIA:hush@bucket/x"})])
    assert "hush" not in str(error.value)
