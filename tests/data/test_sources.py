"""Every format gives the same pairs; what cannot be used is said, with its place."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrate.data.files import child, find, open_file
from orchestrate.data.index import INDEX, open_dataset
from orchestrate.data.reader import load, read_bytes
from orchestrate.data.sources import split_of

from .data_formats import FORMATS, Settings, images, openclip, pairs, parquet, png, webdataset, write_tar


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_pairs(tmp_path: Path, write):
    some = pairs()
    write(tmp_path, some)
    data = open_dataset(Settings(str(tmp_path)))
    assert data.train.schema.remove_metadata() == INDEX
    assert data.train["caption"].to_pylist() == [text for _, _, text in some]
    assert read_bytes(data.train) == [raw for _, raw, _ in some]
    assert len(set(data.train["id"].to_pylist())) == len(some)
    assert data.quarantine.num_rows == 0
    pixels, errors = load(data.train, 16)
    assert not errors
    with Image.open(io.BytesIO(some[3][1])) as image:
        assert np.array_equal(pixels[3], np.asarray(image))


def test_rows_come_back_in_the_order_asked_for(tmp_path: Path):
    for write in (parquet, webdataset, openclip):
        folder = tmp_path / write.__name__
        folder.mkdir()
        some = pairs(12)
        write(folder, some)
        rows = open_dataset(Settings(str(folder))).train
        order = [*np.random.default_rng(0).permutation(12).tolist(), 3, 3]
        assert read_bytes(rows.take(pa.array(order))) == [some[i][1] for i in order]


def test_a_file_a_glob_braces_and_a_uri_are_the_same(tmp_path: Path):
    webdataset(tmp_path, pairs())
    whole = open_dataset(Settings(str(tmp_path))).train["caption"].to_pylist()
    for path in ("*.tar", "{00000..00001}.tar", "0000[01].tar", "**/*.tar"):
        assert open_dataset(Settings(f"{tmp_path}/{path}")).train["caption"].to_pylist() == whole
    assert open_dataset(Settings(f"file://{tmp_path}")).train["caption"].to_pylist() == whole
    assert open_dataset(Settings(f"{tmp_path}/00001.tar")).train["caption"].to_pylist() == whole[4:]


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_an_object_store_is_read_like_a_disk(tmp_path: Path, write):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    some = pairs()
    write(tmp_path, some)
    bucket = f"bucket-{write.__name__}"
    memory.put(f"{tmp_path}/", f"/{bucket}/my set/", recursive=True)
    data = open_dataset(Settings(f"fsspec+memory://{bucket}/my set"))
    assert data.train["caption"].to_pylist() == [text for _, _, text in some]
    assert read_bytes(data.train) == [raw for _, raw, _ in some]
    assert data.train["path"][0].as_py().startswith(f"fsspec+memory://{bucket}/my%20set")


def test_what_is_not_there_or_not_a_set_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file or folder"):
        open_dataset(Settings(str(tmp_path / "absent")))
    with pytest.raises(ValueError, match="no file there"):
        open_dataset(Settings(str(tmp_path)))
    images(tmp_path, pairs(2))
    with pytest.raises(ValueError, match="found: 2 images"):
        open_dataset(Settings(str(tmp_path)))
    with pytest.raises(ValueError, match="password"):
        find("s3://key:secret@bucket/set")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x[z-a].csv", r"data.path=.*x\[z-a\].csv: this is no glob \(bad character range z-a.*Mend what is in brackets"),
        ("x[].csv", "this is no glob"),
        ("{0..999999999999}.tar", r"\{0..999999999999\} names more than 1,000,000 files. Write \*"),
        ("{0..999}{0..999}{0..999}.tar", "names more than 1,000,000 files"),
    ],
)
def test_a_glob_that_is_none_or_has_no_end_is_refused(tmp_path: Path, pattern: str, message: str):
    with pytest.raises(ValueError, match=message):
        find(f"{tmp_path}/{pattern}")


def test_a_missing_column_lists_those_there(tmp_path: Path):
    (tmp_path / "a.csv").write_text("pic,words\nx.png,hello\n")
    with pytest.raises(ValueError, match=r"Its columns: pic, words.*data.image_column=…"):
        open_dataset(Settings(str(tmp_path)))
    with pytest.raises(ValueError, match=r"no column 'nope' \(data.image_column=nope\). It has: pic, words"):
        open_dataset(Settings(str(tmp_path), image_column="nope"))
    images(tmp_path, [("x", png(0), "")])
    named = open_dataset(Settings(str(tmp_path), image_column="pic", caption_column="words"))
    assert named.train["caption"].to_pylist() == ["hello"]


def test_parquet_without_images_lists_its_columns(tmp_path: Path):
    pq.write_table(pa.table({"a": [1], "caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"It has: a \(int64\), caption \(string\)"):
        open_dataset(Settings(str(tmp_path)))
    pq.write_table(pa.table({"a": [b""], "b": [b""], "caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="several columns of bytes: a, b"):
        open_dataset(Settings(str(tmp_path)))


def test_image_bytes_are_not_read_for_the_index(tmp_path: Path, monkeypatch):
    parquet(tmp_path, pairs())
    seen = []
    original = pq.ParquetFile.read

    def spy(self, columns):
        seen.append(columns)
        return original(self, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read", spy)
    open_dataset(Settings(str(tmp_path)))
    assert seen == [["caption", "id"]]


OUTSIDE = ["../secret.png", "images/../../secret.png", "/etc/passwd", "file:///etc/passwd", "s3://b/x.png"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_out_of_the_set_are_refused(tmp_path: Path, path: str):
    folder = tmp_path / "set"
    folder.mkdir()
    openclip(folder, pairs(2))
    (tmp_path / "secret.png").write_bytes(png(0))
    with (folder / "list.tsv").open("a") as table:
        table.write(f"{path}\ta way out\n")
    with pytest.raises(ValueError, match=r"list.tsv, row 2 names .* outside the set's folder"):
        open_dataset(Settings(str(folder)))


def test_paths_out_of_a_store_are_refused():
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe("/out/set/list.csv", b"image,caption\n%2e%2e/secret.png,a dog\n../secret.png,a dog\n")
    memory.pipe("/out/secret.png", png(0))
    with pytest.raises(ValueError, match="row 1 names"):
        # Row 0 is a plain file name with per cent signs, missing; row 1 leads out.
        open_dataset(Settings("fsspec+memory://out/set", max_bad=1))
    memory.pipe("/out/set/list.csv", b"image,caption\nfsspec+memory://out/set/%2e%2e/secret.png,a dog\n")
    with pytest.raises(ValueError, match="outside the set's folder"):
        open_dataset(Settings("fsspec+memory://out/set"))


def test_absolute_paths_inside_the_set_are_fine_and_web_addresses_are_not(tmp_path: Path):
    images(tmp_path / "images", pairs(1))
    (tmp_path / "a.csv").write_text(f"filepath,title\n{tmp_path}/images/00000.png,a dog\n")
    assert open_dataset(Settings(str(tmp_path))).train.num_rows == 1
    (tmp_path / "a.csv").write_text("url,image,title\nx,https://example.org/a.png,a dog\n")
    with pytest.raises(ValueError, match="web address"):
        open_dataset(Settings(str(tmp_path)))


def test_keys_out_of_the_set_are_quarantined_and_never_read(tmp_path: Path):
    folder = tmp_path / "set"
    FORMATS["img2dataset_files"](folder, pairs(2))
    (tmp_path / "secret.jpg").write_bytes(png(0))
    ways_out = [f"{tmp_path}/secret", "../../secret", f"file://{tmp_path}/secret", "s3://bucket/secret", "nul\0"]
    nowhere = ["00000.png/x", "x" * 300 + "/y"]
    keys = ["00000", "00001", *ways_out, *nowhere]
    columns = {"key": keys, "caption": ["a dog"] * len(keys), "status": ["success"] * len(keys)}
    pq.write_table(pa.table(columns), folder / "00000.parquet")
    data = open_dataset(Settings(str(folder), max_bad=1))
    assert data.train["id"].to_pylist() == ["00000", "00001"]
    assert data.quarantine["id"].to_pylist() == ways_out + nowhere
    reasons = data.quarantine["reason"].to_pylist()
    assert all("leads out of the set's folder" in reason for reason in reasons[:5])
    assert all("no image file of that key" in reason for reason in reasons[5:])


def test_a_link_that_the_owner_laid_inside_the_set_is_followed(tmp_path: Path):
    """docs/security.md says so."""
    images(tmp_path / "elsewhere", pairs(1))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "a.csv").write_text("filepath,title\nimages/00000.png,a dog\n")
    assert read_bytes(open_dataset(Settings(str(tmp_path / "set"))).train) == [png(0)]


def test_a_row_without_a_path_or_with_a_nonsense_label_is_quarantined(tmp_path: Path):
    images(tmp_path, [(str(i), png(i), "") for i in range(6)])
    labels = ["1", "99999999999", "-", "", " 000000000007 ", "9" * 40]
    lines = [f"{i}.png,a dog,{label}" for i, label in enumerate(labels)] + [",a cat,0", "  ,a cat,0"]
    (tmp_path / "a.csv").write_text("filepath,title,label\n" + "\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"a.csv, row 1 .*no class number(.|\n)*a.csv, row 6 .*: no image path"):
        open_dataset(Settings(str(tmp_path)))
    data = open_dataset(Settings(str(tmp_path), max_bad=0.9, classes=tuple("abcdefgh")))
    assert data.train["row"].to_pylist() == [0, 3, 4] and data.train["label"].to_pylist() == [1, -1, 7]
    reasons = dict(zip(data.quarantine["row"].to_pylist(), data.quarantine["reason"].to_pylist(), strict=True))
    assert reasons == dict.fromkeys((1, 2, 5), "its label is no class number") | dict.fromkeys((6, 7), "no image path")
    (tmp_path / "a.csv").unlink()
    wide = pa.array([1, 2**40, -(2**63), 2**31, None], pa.int64())
    pq.write_table(pa.table({"image": [png(i) for i in range(5)], "caption": ["a dog"] * 5, "label": wide}), tmp_path / "a.parquet")
    data = open_dataset(Settings(str(tmp_path), max_bad=0.9, classes=("cat", "dog")))
    assert data.train["row"].to_pylist() == [0, 4] and data.quarantine["row"].to_pylist() == [1, 2, 3]


def test_a_column_that_occurs_twice_is_named(tmp_path: Path):
    images(tmp_path, pairs(1))
    (tmp_path / "a.csv").write_text("filepath,title,note,note,,,title\n00000.png,a dog,x,y,,,a cat\n")
    with pytest.raises(ValueError, match=r"a.csv has two columns called 'title'. Rename"):
        open_dataset(Settings(str(tmp_path)))
    (tmp_path / "a.csv").write_text("filepath,title,note,note,,\n00000.png,a dog,x,y,,\n")
    assert open_dataset(Settings(str(tmp_path))).train["caption"].to_pylist() == ["a dog"]
    double = pa.table([[png(0)], ["a dog"], ["a cat"]], names=["image", "caption", "caption"])
    pq.write_table(double, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has two columns called 'caption'. Rename"):
        open_dataset(Settings(str(tmp_path)))


WRONG = [[], {"info": [1]}, {"info": {"features": {"label": {"names": 3}}}}, {"info": {"features": {"label": {"names": [1]}}}}]


@pytest.mark.parametrize("meta", [*map(json.dumps, WRONG), "{", b"\xff"])
def test_metadata_that_is_not_hugging_faces_is_named_with_its_file(tmp_path: Path, meta: str | bytes):
    table = pa.table({"image": [png(0)], "caption": ["a dog"], "label": [1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": meta}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: its metadata under 'huggingface' .*Write the file again"):
        open_dataset(Settings(str(tmp_path)))
    many = {"info": {"features": {"label": [{"names": ["a"]}]}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(many)}), tmp_path / "a.parquet")
    assert open_dataset(Settings(str(tmp_path))).train.num_rows == 1


def test_a_broken_file_of_class_names_is_named(tmp_path: Path):
    parquet(tmp_path, pairs())
    for name, content in (("classes.json", b'["dog"'), ("classes.json", b"\xff"), ("classes.json", b"{}"), ("classes.txt", b"\xff")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} (cannot be read: .*It )?must be .* in the order of the labels"):
            open_dataset(Settings(str(tmp_path)))
        (tmp_path / name).unlink()


def test_missing_images_are_quarantined_and_counted(tmp_path: Path):
    openclip(tmp_path, pairs())
    (tmp_path / "images" / "00002.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 6 rows cannot be used(.|\n)*00002.png is missing"):
        open_dataset(Settings(str(tmp_path)))
    data = open_dataset(Settings(str(tmp_path), max_bad=0.2))
    assert data.train.num_rows == 5
    assert data.quarantine.to_pylist()[0]["row"] == 2


def test_a_set_without_a_usable_row_is_said(tmp_path: Path):
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no training row"):
        open_dataset(Settings(str(tmp_path)))
    pq.write_table(pa.table({"image": [png(0)], "caption": ["12"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no usable training row"):
        open_dataset(Settings(str(tmp_path), max_bad=1.0))


def test_double_ids_name_both_places(tmp_path: Path):
    columns = {"image": [png(0), png(1), png(2)], "caption": ["a", "b", "c"]}
    pq.write_table(pa.table({"id": ["x", "y", "x"], **columns}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"'x' occurs twice: in .*a.parquet, row 0, and in .*a.parquet, row 2"):
        open_dataset(Settings(str(tmp_path)))


def test_several_captions_of_an_image_are_pairs_of_their_own_on_one_side_of_the_split(tmp_path: Path):
    images(tmp_path, [(str(i), png(i), "") for i in range(20)])
    lines = [f"{i}.png,caption {k} of {i}" for i in range(20) for k in "abcde"]
    (tmp_path / "a.csv").write_text("image,caption\n" + "\n".join(lines))
    data = open_dataset(Settings(str(tmp_path), heldout=0.2))
    sides = [set(part["path"].to_pylist()) for part in (data.train, data.heldout)]
    assert data.heldout.num_rows == 20 and not sides[0] & sides[1]
    assert any("several captions" in sentence for sentence in data.report)
    (tmp_path / "a.csv").write_text("image,caption\n" + "\n".join(reversed(lines)))
    again = open_dataset(Settings(str(tmp_path), heldout=0.2))
    assert sorted(again.train["id"].to_pylist()) == sorted(data.train["id"].to_pylist())


def test_broken_containers_are_named(tmp_path: Path):
    webdataset(tmp_path, pairs())
    tar = tmp_path / "00000.tar"
    whole = tar.read_bytes()
    member = 512 + 512  # the first caption's header and body: a cut there looks like an end
    for length in (0, 100, member, member + 100, member + 700, len(whole) // 2):
        tar.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"00000.tar ends early"):
            open_dataset(Settings(str(tmp_path)))
    tar.unlink()
    (tmp_path / "00001.tar").rename(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet is no readable Parquet"):
        open_dataset(Settings(str(tmp_path)))
    (tmp_path / "x.parquet").rename(tmp_path / "x.tar.gz")
    with pytest.raises(ValueError, match=r"Unpack x.tar.gz"):
        open_dataset(Settings(str(tmp_path)))
    (tmp_path / "x.csv").write_bytes(b"image,caption\na.png,one\nb.png,one,two\n")
    with pytest.raises(ValueError, match=r"x.csv cannot be read as a table: .*Row #3"):
        open_dataset(Settings(str(tmp_path)))


def test_tar_samples_with_labels_json_and_without_images(tmp_path: Path):
    note = json.dumps({"captions": ["a first dog", "a second dog"], "id": 7}).encode()
    members = [("sub/a.b.png", png(0)), ("sub/a.json", note), ("sub/a.png", png(1)), ("sub/a.cls", b"1")]
    write_tar(tmp_path / "x.tar", [*members, ("b.txt", b"alone"), ("c.JPG", png(2)), ("c.txt", b"a cat")])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    data = open_dataset(Settings(str(tmp_path), max_bad=0.5))
    assert data.train["id"].to_pylist() == ["x/sub/a", "x/c"]
    assert data.train["caption"].to_pylist() == ["a first dog", "a cat"]
    assert data.train["label"].to_pylist() == [1, -1]
    assert read_bytes(data.train) == [png(1), png(2)]
    assert data.quarantine["reason"].to_pylist() == ["sample x/b has no image in the tar"]


def test_a_tars_columns_are_extensions_or_keys_and_a_name_that_is_neither_is_refused(tmp_path: Path):
    note = json.dumps({"alt": "a described dog", "caption": "a dog"}).encode()
    texts = [("txt", b"a dog of the text"), ("TXTT", b"a second dog"), ("json", note), ("cls", b"dog")]
    members = [("jpg", png(0)), ("left.jpg", png(1)), *texts]
    write_tar(tmp_path / "x.tar", [(f"{key}.{extension}", body) for key in "ab" for extension, body in members])

    def read(**columns: str) -> tuple[list[str], list[bytes | Exception]]:
        rows = open_dataset(Settings(str(tmp_path), **columns)).train
        return rows["caption"].to_pylist()[:1], read_bytes(rows)[:1]

    assert read() == (["a dog of the text"], [png(0)])
    assert read(caption_column="TXTT", image_column="left.jpg") == (["a second dog"], [png(1)])
    assert read(caption_column="alt", image_column="jpg") == (["a described dog"], [png(0)])
    for name in ("txtx", "jpg", "cls", "Alt"):
        told = rf"no sample of the tars has '{name}' \(data.caption_column={name}\). .*: alt, caption, left.jpg, txt, txtt"
        with pytest.raises(ValueError, match=told):
            read(caption_column=name)
    with pytest.raises(ValueError, match=r"has 'right.jpg' \(data.image_column=right.jpg\). .*: cls, jpg, json, left.jpg, txt, txtt"):
        read(image_column="right.jpg")


def test_a_tar_sample_with_an_empty_class_has_none(tmp_path: Path):
    members = [("a.png", png(0)), ("a.cls", b"dog"), ("b.png", png(1)), ("b.cls", b" \n"), ("c.png", png(2)), ("c.json", b'{"class": ""}')]
    write_tar(tmp_path / "x.tar", members)
    data = open_dataset(Settings(str(tmp_path), max_bad=0.7))
    assert data.classes == ["dog"] and data.train["id"].to_pylist() == ["x/a"]
    assert data.quarantine["id"].to_pylist() == ["x/b", "x/c"]


def test_one_bad_value_in_a_tar_costs_one_sample(tmp_path: Path):
    """Quarantined with its reason, or written as UTF-8 can hold it: the others are read as ever."""
    values = {
        "half": ("json", b'{"caption": "\\ud800 dog", "captions": ["\\ud800 dog", "a\\udfff"], "class": "d\\ud800"}'),
        "broken": ("json", b'{"caption": "a dog"'),
        "deep": ("json", b"[" * 200_000),
        "square": ("cls", "²".encode()),
        "dashes": ("cls", b"--5"),
        "huge": ("cls", b"99999999999"),
        "endless": ("cls", b"9" * 5000),
        "large": ("json", b'{"caption": "a dog", "label": 99999999999}'),
        "caf\udce9": ("cls", b"0001"),
    }
    with tarfile.open(tmp_path / "x.tar", "w", errors="surrogateescape") as tar:
        for key, (extension, body) in values.items():
            text = [("txt", b"a dog")] if extension == "cls" else []
            for ending, content in [("png", png(0)), (extension, body), *text]:
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    data = open_dataset(Settings(str(tmp_path), max_bad=0.7))
    captions = dict(zip(data.train["id"].to_pylist(), data.train["caption"].to_pylist(), strict=True))
    assert captions == {"x/half": "\ufffd dog", "x/square": "a dog", "x/dashes": "a dog", "x/caf\\udce9": "a dog"}
    assert data.train["label"].to_pylist() == [-1, -1, -1, 1]
    reasons = dict(zip(data.quarantine["id"].to_pylist(), data.quarantine["reason"].to_pylist(), strict=True))
    assert list(reasons) == ["x/broken", "x/deep", "x/huge", "x/endless", "x/large"]
    assert "its .json is no JSON" in reasons["x/broken"] and "its .json is no JSON" in reasons["x/deep"]
    assert reasons["x/huge"] == reasons["x/large"] == "label 99999999999 is no class number"


def test_split_words():
    train = ("train.csv", "train-00000-of-00002.parquet", "cc3m_train.csv", "train/00000.tar", "training.parquet")
    assert {split_of(name) for name in train} == {"train"}
    validation = ("val.csv", "valid.csv", "data/validation-0.parquet", "val2017/a.tar")
    assert {split_of(name) for name in validation} == {"val"}
    assert split_of("train/test.parquet") == "test"
    assert {split_of(name) for name in ("valentine.csv", "trains.csv", "latest.csv", "contest/a.tar")} == {""}


def test_split_files_are_found_and_a_held_out_one_is_preferred(tmp_path: Path):
    for at, name in enumerate(("train", "val", "test")):
        folder = tmp_path / name
        folder.mkdir()
        parquet(folder, [(f"{name}{key}", raw, f"{text} {at}") for key, raw, text in pairs()])
    data = open_dataset(Settings(str(tmp_path), heldout=4))
    assert data.train.num_rows == 6 and data.heldout.num_rows == 4
    assert all(i.startswith("test") for i in data.heldout["id"].to_pylist())
    assert any("val/a.parquet" in sentence for sentence in data.report)


def test_children_of_uris_keep_their_query():
    assert child("s3://b/my%20set?region=x", "a b/%.png") == "s3://b/my%20set/a%20b/%25.png?region=x"
    with pytest.raises(ValueError, match="cannot be opened"):
        open_file("nonsense://b/c")
