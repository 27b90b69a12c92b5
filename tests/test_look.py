"""Search, duplicates, clusters and the map: against plain loops, and as commands on real features."""

import csv
import itertools
import json
import re
import shutil
import subprocess
from html import unescape

import jax
import numpy as np
import pytest
from PIL import Image
from shrunk import shrunk
from wide_files import files, random_pixels, reading, tiff

import dinotwins_jax as dt
from dinotwins_jax import clusters as clusters_command
from dinotwins_jax import duplicates as duplicates_command
from dinotwins_jax import search as search_command
from dinotwins_jax.data import open_source, shards
from dinotwins_jax.data.store import Settings, union
from dinotwins_jax.evals import clusters, duplicates, flat_map, sheets
from dinotwins_jax.features.gallery import Gallery
from dinotwins_jax.models.torch_weights import vit_to_torch
from dinotwins_jax.models.vit import VisionTransformer


def blobs(sizes, dim=6, spread=0.05, seed=0):
    """(features f32[M, dim], group of each) around orthogonal directions, of different lengths."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.eye(dim)[group] + spread * rng.normal(size=(len(group), dim))
    order = rng.permutation(len(group))
    rows *= rng.uniform(0.1, 9.0, (len(group), 1))
    return rows[order].astype(np.float32), group[order]


def cosine(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


@pytest.mark.parametrize("block", [5, 4096])
@pytest.mark.parametrize("across", [False, True])
def test_pairs_are_those_of_a_plain_loop(monkeypatch, block, across):
    monkeypatch.setattr(duplicates, "BLOCK", block)
    features, _ = blobs((9, 4, 4), spread=0.3)
    features[3] = 2 * features[11]
    others, _ = blobs((5, 5, 1), spread=0.3, seed=1)
    pairs = duplicates.near_pairs(features, 0.8, others if across else None)
    if across:
        expected = {
            (a, b): cosine(x, y) for a, x in enumerate(features) for b, y in enumerate(others)
        }
    else:
        expected = {
            (a, b): cosine(features[a], features[b])
            for a, b in itertools.combinations(range(len(features)), 2)
        }
    expected = {pair: value for pair, value in expected.items() if value >= 0.8}
    found = dict(
        zip(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True), pairs.cosine, strict=True)
    )
    assert found.keys() == expected.keys() and 5 < len(expected) < 100
    assert all(found[pair] == pytest.approx(value, abs=1e-5) for pair, value in expected.items())
    assert (np.diff(pairs.cosine) <= 0).all() and pairs.cosine.max() <= 1


def test_copies_are_pairs_at_threshold_one():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, 300)).astype(np.float32)
    features[7] = 3.7 * features[2]
    pairs = duplicates.near_pairs(features, 1.0)
    assert pairs.a.tolist() == [2] and pairs.b.tolist() == [7] and pairs.cosine.tolist() == [1.0]


def test_groups_are_what_pairs_connect():
    a, b = [4, 0, 8, 1, 4], [6, 1, 9, 2, 7]
    pairs = duplicates.Pairs(np.array(a), np.array(b), np.array([0.99, 0.98, 0.97, 0.96, 0.95]))
    assert [g.tolist() for g in duplicates.groups(pairs)] == [[4, 6, 7], [0, 1, 2], [8, 9]]
    across = duplicates.Pairs(np.array([0, 1, 3]), np.array([1, 1, 3]), np.array([0.9, 0.8, 0.7]))
    assert [g.tolist() for g in duplicates.groups(across, 5)] == [[0, 6, 1], [3, 8]]
    none = duplicates.near_pairs(np.eye(3, dtype=np.float32), 0.9)
    assert duplicates.groups(none) == []


def test_pairs_that_cannot_be_are_refused(monkeypatch):
    features, _ = blobs((6, 6))
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 10)
    with pytest.raises(ValueError, match=r"more than 10 pairs have a cosine of 0\.5 or more"):
        duplicates.near_pairs(features, 0.5)
    with pytest.raises(ValueError, match=r"threshold=0.0 must be above 0 and at most 1"):
        duplicates.near_pairs(features, 0.0)
    with pytest.raises(ValueError, match="the same width"):
        duplicates.near_pairs(features, 0.9, features[:, :3])
    features[5, 0] = np.nan
    with pytest.raises(ValueError, match="images 0 to 11: not finite"):
        duplicates.near_pairs(features, 0.9)


@pytest.mark.parametrize("large", [10, 10**6])
def test_k_means_finds_groups_of_directions_the_largest_first(monkeypatch, large):
    monkeypatch.setattr(clusters, "LARGE", large)
    features, group = blobs((5, 30, 12))
    found = clusters.k_means(features, 3, starts=5)
    assert np.bincount(found.cluster).tolist() == [30, 12, 5]
    assert clusters.agreement(found.cluster, group) == {
        "nmi": 100.0,
        "ari": 100.0,
        "accuracy": 100.0,
    }
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for k, members in enumerate(clusters.typical(found, 4)):
        inside = np.flatnonzero(found.cluster == k)
        centre = unit[inside].mean(axis=0)
        if large > 10:  # small batches do not move a centre quite to the mean
            values = [cosine(unit[i], centre) for i in inside]
            np.testing.assert_allclose(found.cosine[inside], values, atol=1e-5)
        order = inside[np.argsort(-found.cosine[inside], kind="stable")]
        assert members.tolist() == order[:4].tolist()
    again = clusters.k_means(features, 3, starts=5)
    assert np.array_equal(again.cluster, found.cluster)


def test_k_means_of_few_pictures():
    twice = np.repeat(np.eye(2, dtype=np.float32), 3, axis=0)
    assert np.bincount(clusters.k_means(twice, 4).cluster).tolist() == [3, 3]
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"k={k} must be from 1 to 6, the number of pictures"):
            clusters.k_means(twice, k)
    twice[4, 1] = np.inf
    with pytest.raises(ValueError, match="features of image 4: not finite"):
        clusters.k_means(twice, 2)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_agreement_is_that_of_plain_formulas(k):
    rng = np.random.default_rng(k)
    labels = rng.integers(-1, 3, 60)
    cluster = np.where(rng.random(60) < 0.5, np.maximum(labels, 0) % k, rng.integers(0, k, 60))
    found = clusters.agreement(cluster, labels)
    c, y = cluster[labels >= 0], labels[labels >= 0]
    names = [*range(max(3, k))]  # every way to name the clusters
    best = max(np.mean(np.array(way)[c] == y) for way in itertools.permutations(names))
    assert found["accuracy"] == pytest.approx(100 * best)
    p = np.array([[np.mean((c == i) & (y == j)) for j in range(3)] for i in range(k)])
    of_c, of_y = p.sum(axis=1), p.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mutual = np.nansum(p * np.log(p / np.outer(of_c, of_y)))
        entropies = [-np.nansum(q * np.log(q)) for q in (of_c, of_y)]
    assert found["nmi"] == pytest.approx(100 * mutual / np.mean(entropies))
    pairs = list(itertools.combinations(range(len(c)), 2))
    together = np.array([[c[i] == c[j], y[i] == y[j]] for i, j in pairs])
    chance = together.mean(axis=0).prod()
    rand = (together.all(axis=1).mean() - chance) / (together.mean() - chance)
    assert found["ari"] == pytest.approx(100 * rand)
    with pytest.raises(ValueError, match="no labelled images: all 4 labels are -1"):
        clusters.agreement(np.zeros(4, int), np.full(4, -1))


def test_cluster_scores_have_as_many_clusters_as_classes_with_images():
    features, group = blobs((8, 12, 10))
    labels = np.where(group == 1, 7, np.where(group == 0, -1, 3))
    scores = clusters.cluster_scores(features, labels, (0, 1))
    assert scores["num_clusters"] == 2 and scores["protocol"] == "kmeans-cosine-v1"
    assert scores["accuracy_mean"] == 100.0 and scores["nmi_std"] == 0.0
    assert [split["seed"] for split in scores["splits"]] == [0, 1]
    with pytest.raises(ValueError, match="no labelled images"):
        clusters.cluster_scores(features, np.full(len(features), -1), (0,))


def test_the_map_keeps_groups_apart_and_is_reproducible():
    features, group = blobs((20, 20, 20))
    places = flat_map.flat_map(features)
    assert np.array_equal(places, flat_map.flat_map(features))
    assert places.shape == (60, 2) and places.min() >= 0 and places.max() <= 1
    assert np.ptp(places, axis=0).max() == pytest.approx(1)
    distance = np.linalg.norm(places[:, None] - places[None], axis=2) + 9 * np.eye(60)
    assert (group[distance.argmin(axis=1)] == group).all()
    assert np.isfinite(flat_map.flat_map(np.ones((5, 3), np.float32))).all()
    with pytest.raises(ValueError, match="a map needs at least 5 pictures, not 4"):
        flat_map.flat_map(features[:4])


@pytest.fixture(scope="module")
def map_page(tmp_path_factory):
    """A page with the map of 30 pictures: grey levels of their own, the last one missing."""
    path = tmp_path_factory.mktemp("map") / "map.html"
    features, group = blobs((12, 10, 8))

    def picture(i):
        return None if i == 29 else np.full((8, 12, 3), 8 * i, np.uint8)

    names = [f"a<b>{i}.png" for i in range(30)]
    group[4] = -1
    count = flat_map.write_map(path, features, group, ["x & y", "c2", "c3"], names, picture)
    assert count == 30
    return path


def test_the_map_is_one_page_that_needs_nothing(map_page):
    page = map_page.read_text()
    assert page.count("<circle") == 30 and "x &amp; y: a&lt;b&gt;" in page and "<b>" not in page
    assert page.count("<button") == 4 and "none <small>1</small>" in page
    assert not re.search(r"(src|href)=|url\((?!data:)|http", page)
    part = flat_map.read_map(map_page)
    assert part.startswith("<style>") and "<body" not in part and part.count("<circle") == 30
    map_page.with_name("torn.html").write_text(page[:500])
    with pytest.raises(ValueError, match=r"torn\.html is damaged: it is no map"):
        flat_map.read_map(map_page.with_name("torn.html"))


def test_a_large_set_is_drawn_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(flat_map, "MOST", 10)
    features, group = blobs((12, 10))
    taken = []
    names = [str(i) for i in range(22)]
    options = (group, ["a", "b"], names, lambda i: taken.append(i))
    assert flat_map.write_map(tmp_path / "map.html", features, *options) == 10
    said = re.findall(r"<title>[ab]: (\d+)</title>", (tmp_path / "map.html").read_text())
    assert sorted(map(int, said)) == taken and len(set(taken)) == 10


FRAMES = """<!DOCTYPE html>
<iframe src="probed.html?390" style="border: 0; width: 390px; height: 900px"></iframe>
<iframe src="probed.html?1280" style="border: 0; width: 1280px; height: 900px"></iframe>
<script>const found = []; addEventListener("message", m => {
  found.push(m.data); document.documentElement.dataset.found = JSON.stringify(found);
})</script>"""
PROBE = """<script>addEventListener("load", () => {
  const svg = document.querySelector(".map svg"), box = document.querySelector(".map .shown");
  const points = [...svg.querySelectorAll("circle")], said = [];
  const over = p => p.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
  const inside = points.every(p => { over(p); const b = box.getBoundingClientRect();
    return b.left >= 0 && b.right <= innerWidth && b.width > 100; });
  over(points[7]); said.push(box.textContent);
  svg.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"})); said.push(box.textContent);
  const place = getComputedStyle(box.firstChild).backgroundPosition;
  svg.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
  document.querySelector(".map button").focus();
  parent.postMessage({
    width: innerWidth, said, inside, hidden: box.hidden, titles: svg.querySelectorAll("title").length,
    place: [points[8].dataset.k, place], far: svg.querySelectorAll("g.far").length,
    overflows: document.documentElement.scrollWidth > innerWidth,
    requests: performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length,
  }, "*");
});</script>"""


def test_a_browser_shows_the_picture_of_a_point(map_page):
    """On a phone's and on a desktop's width, by pointer and by key, without requests."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("no chromium on the PATH")
    page = map_page.read_text()
    map_page.with_name("probed.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    map_page.with_name("frames.html").write_text(FRAMES)
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--hide-scrollbars",
         "--window-size=1800,1000", "--virtual-time-budget=4000",
         f"--user-data-dir={map_page.with_name('profile')}", f"file://{map_page.with_name('frames.html')}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    (found,) = re.findall('data-found="(.*?)"', done.stdout)
    reports = sorted(json.loads(unescape(found)), key=lambda report: report["width"])
    titles = [unescape(text) for text in re.findall("<title>(.*?)</title></circle>", page)]
    assert [report.pop("width") for report in reports] == [390, 1280]
    for report in reports:
        k, place = report.pop("place")
        column, row = int(k) % 6, int(k) // 6
        assert place.replace("px", "").split() == [str(-120 * column), str(-120 * row)]
        assert report == {
            "said": titles[7:9], "inside": True, "hidden": True, "titles": 0, "far": 3,
            "overflows": False, "requests": 0,
        }  # fmt: skip
    assert "CONSOLE" not in done.stderr


def test_a_sheet_shows_what_is_missing_in_grey(tmp_path):
    red = np.full((4, 6, 3), (250, 0, 0), np.uint8)
    tile = sheets.Tile(lambda: red, caption="0.9")
    missing = sheets.Tile(lambda: None, name="gone $x$.jpg")
    sheets.tile_grid(tmp_path / "a.png", [[tile, missing], [missing]], titles=["one", "two"])
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    middles = [
        pixels[round(150 * (0.12 + 0.22 + y)), round(150 * x)].tolist()
        for x, y in (
            (0.12 + 0.55, 0.55),
            (0.12 + 1.3, 0.05),
            (0.12 + 0.1, 1.1 + 0.1 + 0.17 + 0.22 + 0.05),
        )
    ]
    assert middles == [[250, 0, 0], [0xE3, 0xE6, 0xEA], [0xE3, 0xE6, 0xEA]]
    assert sheets.shortened("abcdefghijklmnop", 9) == "abc…lmnop"
    with pytest.raises(ValueError, match="no images to draw"):
        sheets.tile_grid(tmp_path / "b.png", [[tile], []])
    with pytest.raises(ValueError, match="1 titles for 2 rows"):
        sheets.tile_grid(tmp_path / "b.png", [[tile], [tile]], titles=["a"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with weights, 12 pictures of noise, a larger copy of one, and their features.

    Labels are not there: pictures of a folder have none.
    """
    folder = tmp_path_factory.mktemp("look")
    vit = VisionTransformer(embed_dim=64, depth=1, num_heads=1, patch_size=8, image_size=16)
    for seed in (0, 1):
        params = jax.jit(vit.init)(jax.random.key(seed), np.zeros((1, 16, 16, 3)))["params"]
        np.savez(folder / f"weights{seed}.npz", **vit_to_torch(params))
    rng = np.random.default_rng(0)
    (folder / "set").mkdir()
    (folder / "other").mkdir()
    for k in range(12):
        image = Image.fromarray(rng.integers(0, 255, (5, 5, 3), np.uint8)).resize((40, 40), 2)
        image.save(folder / "set" / f"{k:02d}.png")
        if k == 4:
            image.resize((80, 80), 2).save(folder / "other" / "larger.png")
    options = {"tokens": ("cls", "mean_patch"), "batch_size": 16}
    dt.embed(folder / "weights0.npz", folder / "set", folder / "set.npz", **options)
    dt.embed(folder / "weights0.npz", folder / "other", folder / "other.parquet", **options)
    dt.embed(folder / "weights1.npz", folder / "other", folder / "foreign.npz", **options)
    return folder


def lines(capsys):
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("tokens", ["cls", "mean_patch"])
def test_search_finds_a_copy_first_and_leaves_out_the_query_itself(place, tmp_path, capsys, tokens):
    larger, itself = place / "other" / "larger.png", place / "set" / "04.png"
    arguments = [f"--features={place / 'set.npz'}", f"--tokens={tokens}", "--count=3"]
    arguments += [f"--query={larger}", f"--query={itself}"]
    arguments += [f"--out={tmp_path / name}" for name in ("s.png", "s.csv", "s.json")]
    assert search_command.run(arguments) == 0
    out = lines(capsys)
    assert out[0] == str(larger) and out[1].split()[0] == "1" and out[1].endswith("04.png")
    assert float(out[1].split()[1]) > 0.99 and out[4] == str(itself)
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * 2
    assert json.loads((tmp_path / "s.json").read_text())[0] == {
        "query": str(larger), "rank": 1, "cosine": float(rows[0]["cosine"]), "name": str(itself),
    }  # fmt: skip
    assert str(itself) not in [row["name"] for row in rows[3:]]
    arrays = np.load(place / "set.npz")
    names = arrays["names"].tolist()
    features = arrays[tokens]
    values = sorted((-cosine(features[4], x), n) for x, n in zip(features, names, strict=True))
    assert [row["name"] for row in rows[3:]] == [name for _, name in values[1:4]]
    assert Image.open(tmp_path / "s.png").size > (600, 300)


def test_queries_of_prepared_data_have_the_channels_of_the_model(tmp_path, capsys):
    vit = VisionTransformer(
        embed_dim=64, depth=1, num_heads=1, patch_size=8, image_size=16, in_channels=4
    )
    params = jax.jit(vit.init)(jax.random.key(0), np.zeros((1, 16, 16, 4)))["params"]
    np.savez(tmp_path / "weights.npz", **vit_to_torch(params))
    pictures = [tiff(random_pixels((20, 20, 4), seed=k)) for k in range(3)]
    source = files(tmp_path / "set", pictures, reading(4))
    shards.write(
        union({"pretrain": source}), tmp_path / "prepared", Settings(channels=4),
        description={}, command="", workers=1,
    )  # fmt: skip
    shutil.copytree(tmp_path / "set", tmp_path / "copy")  # under their own names they are left out
    dt.embed(tmp_path / "weights.npz", tmp_path / "copy", tmp_path / "copy.npz")
    arguments = [f"--features={tmp_path / 'copy.npz'}", "--count=1"]
    assert search_command.run([*arguments, f"--query={tmp_path / 'prepared'}"]) == 0
    found = [line.split() for line in lines(capsys) if line.startswith("   1 ")]
    assert len(found) == 3 and all(float(cosine) > 0.99 for _, cosine, _ in found)


def test_pictures_have_the_channels_and_window_that_an_export_states(tmp_path):
    window = {"mode": "fixed", "range": [0, 4095]}
    stated = {"dinotwins_jax": {"in_channels": 4, "window": window}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    (tmp_path / "a.tif").write_bytes(tiff(np.full((20, 20, 4), 2048, np.uint16)))
    arrays = {"names": np.array([str(tmp_path / "a.tif")]), "cls": np.ones((1, 3)), "model": "m"}
    np.savez(tmp_path / "f.npz", **arrays, source=str(tmp_path))
    assert (Gallery(tmp_path / "f.npz").picture(0) == np.full((20, 20, 3), 128)).all()


def test_duplicates_across_two_sets_and_inside_one(place, tmp_path, capsys):
    options = [f"--features={place / 'set.npz'}", "--threshold=0.99"]
    across = [f"--against={place / 'other.parquet'}", f"--out={tmp_path / 'd.csv'}"]
    assert duplicates_command.run([*options, *across, f"--out={tmp_path / 'd.png'}"]) == 0
    out = lines(capsys)
    assert out[0].startswith("group 1  ") and out[0].endswith("larger.png")
    assert out[1].startswith("1 pairs with a cosine of 0.99 or more: 2 pictures in 1 groups")
    (row,) = csv.DictReader((tmp_path / "d.csv").open())
    assert row["name"].endswith("04.png") and row["other"].endswith("larger.png")
    assert Image.open(tmp_path / "d.png").size > (300, 150)
    inside = [f"--features={place / 'other.parquet'}", f"--out={tmp_path / 'none.png'}"]
    assert duplicates_command.run([*inside, f"--out={tmp_path / 'none.json'}"]) == 0
    assert "no pairs, so" in lines(capsys)[-1] and not (tmp_path / "none.png").exists()
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_clusters_of_a_folder(place, tmp_path, capsys):
    files = [f"--out={tmp_path / name}" for name in ("c.png", "c.csv", "c.html")]
    assert clusters_command.run([f"--features={place / 'set.npz'}", "--k=3", *files]) == 0
    out = lines(capsys)
    sizes = [
        int(re.match(r"cluster \d: (\d+) pictures; most typical ", line)[1]) for line in out[:3]
    ]
    assert sum(sizes) == 12 and sizes == sorted(sizes, reverse=True)
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [sum(row["cluster"] == str(k) for row in rows) for k in (1, 2, 3)] == sizes
    assert {row["class"] for row in rows} == {""} and len(rows) == 12
    assert Image.open(tmp_path / "c.png").size > (150, 400)
    assert "cluster 3 <small>" in (tmp_path / "c.html").read_text()


def test_clusters_of_a_run_s_test_split_are_scored_and_shown(tmp_path, capsys):
    """Labels come from the features; pictures of made-up data from the run that the features name."""
    config = shrunk()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_dict()))
    source = open_source(config.data.to_dict(), "test")
    labels = np.asarray(source.labels, np.int32)
    features = np.eye(16, dtype=np.float32)[labels]
    labels[3] = -1
    arrays = {
        "names": np.array([source.name(i) for i in range(len(source))]),
        "cls": features, "labels": labels,
        "class_names": np.array(source.class_names), "model": "m",
        "source": str(tmp_path / "run"), "place": "split test",
    }  # fmt: skip
    np.savez(tmp_path / "f.npz", **arrays)
    gallery = Gallery(tmp_path / "f.npz")
    np.testing.assert_array_equal(gallery.picture(5), source[5])
    assert clusters_command.run([f"--features={tmp_path / 'f.npz'}"]) == 0
    out = lines(capsys)
    assert len(out) == 1 + len(np.unique(labels[labels >= 0])) and ", 100% " in out[0]
    assert "accuracy of clusters matched to classes 100.0%" in out[-1]
    np.savez(tmp_path / "moved.npz", **arrays | {"source": str(tmp_path / "gone")})
    assert Gallery(tmp_path / "moved.npz").picture(5) is None
    assert "the pictures of" in capsys.readouterr().err


def test_what_is_wrong_is_said_in_a_line(place, tmp_path, capsys):
    def error(command, *arguments):
        assert command.run(list(arguments)) == 2
        *before, line = capsys.readouterr().err.splitlines()
        assert all("does not state its preprocessing" in text for text in before)
        return line

    def saved(name, **changes):
        arrays = dict(np.load(place / "set.npz")) | changes
        np.savez(tmp_path / name, **{k: v for k, v in arrays.items() if v is not None})
        return f"--features={tmp_path / name}"

    (tmp_path / "a.json").write_text("{}")
    assert error(clusters_command, f"--features={tmp_path / 'a.json'}").count("not an .npz")
    assert "Unknown command line flag" in error(clusters_command, "--config.data.dir=/x")
    features, query = f"--features={place / 'set.npz'}", f"--query={place / 'set'}"
    search, near, groups = search_command, duplicates_command, clusters_command
    assert "--features and --query are required" in error(search, features)
    assert "--features is required" in error(near) and "--features is required" in error(groups)
    assert "no file of features" in error(near, f"--features={tmp_path / 'none.npz'}")
    assert "no such folder, file or pattern" in error(
        search, features, f"--query={tmp_path / 'no.jpg'}"
    )
    (tmp_path / "empty").mkdir()
    assert "no images under" in error(search, features, f"--query={tmp_path / 'empty'}")
    (tmp_path / "bad.jpg").write_bytes(b"no")
    assert "bad.jpg: not an image" in error(search, features, f"--query={tmp_path / 'bad.jpg'}")
    other = f"--workdir={place / 'weights1.npz'}"
    assert "holds features of another model than" in error(search, features, query, other)
    foreign = f"--against={place / 'foreign.npz'}"
    assert "hold features of two different models" in error(near, features, foreign)
    assert "does not say which model made it: give --workdir" in error(
        search, saved("old.npz", source=None), query
    )
    assert "is not there: give --workdir" in error(
        search, saved("moved.npz", source=np.array(str(tmp_path / "gone"))), query
    )
    assert "holds no features: it has cls" in error(groups, saved("nameless.npz", names=None))
    assert "has no features mean_patch, it has cls" in error(
        groups, saved("cls.npz", mean_patch=None), "--tokens=mean_patch"
    )
    short = saved("short.npz", cls=np.zeros((3, 64), np.float32))
    assert "is damaged: features (3, 64) of 12 names" in error(near, short)
    nan = saved("nan.npz", cls=np.full((12, 64), np.nan, np.float32))
    assert "00.png are not finite" in error(groups, nan)
    labels = saved("labels.npz", labels=np.arange(12), class_names=np.array(["a"]))
    assert "is damaged: label 11 of 1 class names" in error(groups, labels)
    data = (place / "set.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(data[: len(data) // 2])
    assert "torn.npz is damaged" in error(near, f"--features={tmp_path / 'torn.npz'}")
    assert "k=13 must be from 1 to 12" in error(groups, features, "--k=13")
    assert "threshold=1.5" in error(near, features, "--threshold=1.5")
    assert "a sheet .png or a list .csv" in error(near, features, "--out=x.pdf")
    assert "no such directory" in error(near, features, f"--out={tmp_path / 'no' / 'x.png'}")
    assert "given twice as .csv" in error(near, features, "--out=a.csv", "--out=b.csv")
