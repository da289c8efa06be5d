"""Files of strangers: no code in them runs, nothing is written beyond the folder, what is wrong is a ValueError.

torchvision reads the official CIFAR files, which are pickles: the one reader of pickles there is, after their MD5 sums.
"""

import ast
import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vitlab import cli
from vitlab.data import datasets, folders
from vitlab.models import checkpoint
from vitlab.models.vit import ViTConfig
from vitlab.run import notebooks
from vitlab.study import claims
from vitlab.train.loop import fit
from vitlab.train.recipe import Recipe
from vitlab.utils.files import read_json
from vitlab.utils.tensors import load_tensors, save_tensors

ROOT = Path(__file__).parents[1]
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CODE = {"eval", "exec", "os.system", "os.popen", "torch.hub.load", "yaml.unsafe_load", "yaml.full_load", "np.loadtxt",
        "pd.read_pickle", "shutil.unpack_archive", "torch.jit.load"}  # fmt: skip
CONFIG = ViTConfig(image_size=8, patch_size=4, dim=8, depth=1, heads=1, num_classes=2)
ANY = settings(deadline=None, max_examples=60, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


def sources():
    """(name, source) of every file of Python: the package, the benches and tools, the notebooks' code cells."""
    for folder in ("vitlab", "bench", "tools"):
        yield from ((str(p.relative_to(ROOT)), p.read_text()) for p in sorted((ROOT / folder).rglob("*.py")))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                yield path.name, "\n".join(line for line in cell.source.splitlines() if line[:1] != "%")


def loads_code(source):
    """What in a source could run what a file holds: readers of pickles, evaluated text, shells, unpacked archives."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [name for name in names if name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            with_ = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in CODE or name.endswith((".extractall", ".extract")) or with_.get("shell") == "True":
                found.append(name)
            if name == "torch.load" and with_.get("weights_only") != "True":
                found.append(name)
            if name == "np.load" and with_.get("allow_pickle") != "False":
                found.append(name)
            if name == "yaml.load" and ast.unparse(node.args[1]) != "_Loader":  # a SafeLoader
                found.append(name)
    return found


def test_nothing_in_the_project_reads_pickles_or_runs_text():
    assert loads_code("import pickle\ntorch.load(f)\nx.extractall()\nnp.load(f)\nrun(c, shell=True)\neval(t)") == [
        "pickle", "torch.load", "x.extractall", "np.load", "run", "eval"]  # fmt: skip
    assert {name: found for name, source in sources() if (found := loads_code(source))} == {}
    assert issubclass(notebooks._Loader, notebooks.yaml.SafeLoader)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_in_place_of_any_file_is_refused_and_never_run(tmp_path, monkeypatch):
    marker, path = tmp_path / "it ran", tmp_path / "file"
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind in ("CIFAR10", "CIFAR100"):
        monkeypatch.setattr(f"torchvision.datasets.{kind}.url", "http://127.0.0.1:9/nothing")
    torch.save({"weights": Bomb(marker)}, tmp_path / "by torch")
    data = datasets.load("tiny")
    yaml = f"!!python/object/apply:os.mkdir ['{marker}']"
    for content in (pickle.dumps(Bomb(marker)), (tmp_path / "by torch").read_bytes(), yaml.encode()):
        path.write_bytes(content)
        for read in (load_tensors, checkpoint.load, checkpoint.read, read_json,
                     lambda p: notebooks.read_yaml(p.read_text(errors="replace"), "file"),
                     lambda p: fit(ViTConfig(dim=8, depth=1, heads=1).build(), data, Recipe(epochs=1), checkpoint=p)):
            with pytest.raises(ValueError):
                read(path)
        with pytest.raises(Image.UnidentifiedImageError):
            folders.picture(content, 8)
        for name in ("cifar10.npz", "cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/batches.meta"):
            root = tmp_path / "root" / name.replace("/", "-")
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
            with pytest.raises((ValueError, datasets.DatasetMissing)):
                datasets.load("cifar10", root=root)
    np.savez(tmp_path / "cifar10.npz", **{f"{a}_{p}": np.array([Bomb(marker)], object) for a in "xy"
                                         for p in ("train", "test")})  # fmt: skip
    with pytest.raises(ValueError, match="allow_pickle"):
        datasets.load("cifar10", root=tmp_path)
    assert not marker.exists()


def everything(folder):
    return {p: p.lstat().st_mtime_ns for p in folder.rglob("*")}


def test_members_of_archives_stay_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", "http://127.0.0.1:9/nothing")
    monkeypatch.setattr("vitlab.data.sources.ZIP_URL", "http://127.0.0.1:9/nothing")
    root, outside = tmp_path / "root", tmp_path / "secret.JPEG"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(outside)
    names = ["../../evil", "/tmp/vitlab-evil", "cifar-10-batches-py/../../evil", "tiny-imagenet-200/../../evil"]
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "w") as archive:
        top, jpeg = "tiny-imagenet-200/", outside.read_bytes()
        archive.writestr(top + "wnids.txt", "../..\nn02")
        archive.writestr(top + "words.txt", "n02\t$(touch evil)")
        archive.writestr(top + "val/val_annotations.txt", f"../../../../{outside}\tn02\n/etc/passwd\t../..")
        for name in [*names, f"{top}train/n02/images/../../../../evil.JPEG", f"{top}train/n02/images/0.JPEG"]:
            archive.writestr(name, jpeg)
    before = everything(tmp_path)
    with pytest.raises(datasets.DatasetMissing):
        datasets.load("cifar10", root=root)
    with pytest.raises(ValueError):
        datasets.load("tiny-imagenet", root=root)
    after = {p: t for p, t in everything(tmp_path).items() if "cache" not in p.parts}  # which holds locks now
    assert after | {root: 0} == before | {root: 0} and not Path("/tmp/vitlab-evil").exists()


LABELS = ["$(touch evil)", "$\\frac{", "; touch evil #", "..", "<script>alert(1)<", "-rf", "%s{0}|`evil`", "a\nb"]


def test_hostile_labels_and_file_names_are_only_ever_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITLAB_DATA", str(tmp_path / "cache"))
    labels = [label for label in LABELS if label != ".."]  # which is no name of a folder
    data = tmp_path / "data; touch evil $x"
    for k, label in enumerate(labels):
        (data / "train" / label).mkdir(parents=True)
        (data / "test" / label).mkdir(parents=True)
        for part, count in (("train", 3), ("test", 1)):
            for i in range(count):
                Image.new("RGB", (16, 16), (30 * k, i, 0)).save(data / part / label / f"-$(touch evil){i};.png")
    checkpoint.save(ViTConfig(image_size=16, patch_size=8, dim=8, depth=1, heads=1, num_classes=len(labels)).build(),
                    tmp_path / "$m.safetensors")  # fmt: skip
    out = tmp_path / "out"
    assert cli.main(["evaluate", "--checkpoint", "$m.safetensors", "--dataset", f"folder:{data}", "--out", str(out),
                     "--device", "cpu"]) == 0  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {data.name, "$m.safetensors", "out", "cache"}
    assert {p.name for p in out.iterdir()} == {"results.json", "confusion.png", "confusion.pdf"}
    assert set(json.loads((out / "results.json").read_text())["per_class"]) == set(labels)
    (cache,) = (tmp_path / "cache" / "cache").glob("*.safetensors")
    assert re.fullmatch(r"folder-[A-Za-z0-9_-]+\.safetensors", cache.name)


def test_rows_of_hostile_names_stay_in_their_folder(tmp_path):
    from vitlab.study.study import Study

    study = Study("01_baseline", root=tmp_path, device="cpu")
    for name in (*LABELS, "../../../evil", "/etc/evil", "a/b", "\0"):
        study.write_row(name, {"arm": name})
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.parent for p in written} == {study.folder("results")} and len(written) >= 10
    assert all(re.fullmatch(r"[\w.-]+\.json", p.name) for p in written)


def png(width, height):
    """A PNG of a few bytes that says it is so large."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (2**31 - 1, 2**31 - 1), (1, 200_000_000)])
def test_image_bombs_are_refused_before_they_are_decoded(size, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "bomb.png").write_bytes(png(*size))
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read as an image: .*pixels"):
        datasets.load(f"folder:{tmp_path / 'd'}", root=tmp_path)


def test_only_image_formats_that_no_other_program_reads_are_opened(monkeypatch):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    Image.open(io.BytesIO(eps)).close()  # Pillow would take it, and run Ghostscript
    with pytest.raises(Image.UnidentifiedImageError):
        folders.picture(eps, 8)


# ------------------------------------------------------------------------------------------- fuzzing

TEXT = st.text(max_size=60) | st.text("[]{}:,-&*!|>?%@` \n\t0123456789abc'\"#", max_size=60)
JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)


@ANY
@given(TEXT | st.sampled_from(["[" * 2000, "2001-99-99", "!!binary x", "? [a]\n: b", "<<: 1", "&a [*a]"]))
def test_any_yaml_is_a_value_or_a_line(text):
    try:
        notebooks.read_yaml(text, "-p x")
    except ValueError as error:
        assert str(error).startswith("-p x: ") and "\n" not in str(error)


@ANY
@given(TEXT | JSONISH.map(json.dumps) | JSONISH.map(lambda value: json.dumps({"common": value, "01_a": value})))
def test_any_preset_is_taken_or_refused_with_its_name(tmp_path, text):
    (tmp_path / "presets").mkdir(exist_ok=True)
    (tmp_path / "presets" / "odd.yaml").write_text(text, encoding="utf-8")
    book = notebooks.Notebook(tmp_path, "A", {"preset": "tiny", "a": 1}, (), False)
    object.__setattr__(book, "path", Path("01_a.ipynb"))
    try:
        assert notebooks.preset_parameters(tmp_path, "odd", [book])["01_a"]["preset"] == "odd"
    except ValueError as error:
        assert "presets/odd.yaml" in str(error)


PACKAGED = Path(claims.__file__).with_name("claims.csv").read_bytes()
HEAD = PACKAGED.splitlines(keepends=True)[:12]


def mutated(whole, most=4):
    """Strategy: `whole` with a few bytes set to others, or a piece cut out."""
    at = st.integers(0, len(whole) - 1)

    def change(edits, cut):
        made = bytearray(whole)
        for place, value in edits:
            made[place] = value
        return bytes(made[: cut[0]] + made[cut[1] :]) if cut and cut[0] < cut[1] else bytes(made)

    return st.builds(change, st.lists(st.tuples(at, st.integers(0, 255)), max_size=most), st.none() | st.tuples(at, at))


@ANY
@given(mutated(b"".join(HEAD)))
def test_any_table_of_claims_is_taken_or_refused(tmp_path, content):
    (tmp_path / "claims.csv").write_bytes(content)
    claims.load.cache_clear()
    try:
        assert all(isinstance(claim, claims.Claim) for claim in claims.load(tmp_path / "claims.csv"))
    except ValueError:
        pass
    finally:
        claims.load.cache_clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "m.safetensors"
    checkpoint.save(CONFIG.build(), path, {"val_accuracy": 87.25})
    return path.read_bytes()


@ANY
@given(data=st.data())
def test_any_checkpoint_is_the_model_or_refused(tmp_path, whole, data):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data.draw(mutated(whole)))
    try:
        assert checkpoint.load(path).config == CONFIG and checkpoint.read(path).about == {"val_accuracy": 87.25}
    except ValueError as error:
        assert "m.safetensors holds no model" in str(error)


@ANY
@given(JSONISH | st.fixed_dictionaries({"kind": st.sampled_from(["vit", "resnet", "reduced", "gated", "favit"])},
                                       optional={n: JSONISH for n in ("dim", "depth", "heads", "base", "tokens",
                                                                      "widths", "blocks", "stem")}))  # fmt: skip
def test_any_config_is_taken_or_refused(tmp_path, value):
    path = tmp_path / "m.safetensors"
    save_tensors(path, {"a": torch.zeros(1)}, {"format": checkpoint.FORMAT, "config": json.dumps(value), "about": "{}"})
    with pytest.raises(ValueError, match="holds no model"):
        checkpoint.load(path)


@ANY
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM"]))
def test_any_image_is_decoded_or_refused_in_any_archive(data, kind):
    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, kind)
    try:
        found = folders.picture(data.draw(mutated(file.getvalue(), 8)), 8)
        assert found.shape == (3, 8, 8) and found.dtype == np.uint8
    except Exception as error:
        assert not isinstance(error, (MemoryError, RecursionError))  # `decode` names the file for every other


@ANY
@given(data=st.data())
def test_any_npz_and_zip_is_refused(tmp_path, data):
    file = io.BytesIO()
    np.savez(file, **{f"x_{p}": np.zeros((2, 32, 32, 3), np.uint8) for p in ("train", "test")},
             **{f"y_{p}": np.zeros(2, np.int64) for p in ("train", "test")})  # fmt: skip
    content = data.draw(mutated(file.getvalue(), 8))
    for name, path in (("cifar10", "cifar10.npz"), ("tiny-imagenet", "tiny-imagenet-200.zip")):
        (tmp_path / path).write_bytes(content)
        with pytest.raises(ValueError):
            datasets.load(name, root=tmp_path)
