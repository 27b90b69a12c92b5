"""Batches: contents, order, and unreadable images."""

import gc
import itertools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dinotwins_jax.data import make_source
from dinotwins_jax.data.base import BadImage
from dinotwins_jax.data.folder import Folder
from dinotwins_jax.data.pipeline import BadImageLog, eval_batches, fit_canvas, train_batches


class Shades:
    """Record i is a 4 x 6 image of value i; the indices in `broken` are unreadable."""

    class_names = ()
    labels = None

    def __init__(self, count, broken=()):
        self.count, self.broken = count, frozenset(broken)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.broken:
            raise BadImage(self.name(i), "made so")
        return np.full((4, 6, 3), i % 256, np.uint8)

    def name(self, i):
        return f"shades/{i}"

    def default_canvas(self, global_size):
        return 8


def take(batches, n):
    return list(itertools.islice(batches, n))


def stream(source=None, *, batch_size=4, canvas_size=8, seed=0, **kwargs):
    source = source or Shades(10)
    return train_batches(
        source, batch_size=batch_size, canvas_size=canvas_size, seed=seed, **kwargs
    )


def order(batches, n):
    return np.concatenate([b["index"] for b in take(batches, n)])


def assert_same(batches, others):
    assert len(batches) == len(others)
    for a, b in zip(batches, others, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


# The canvas


def test_fit_canvas_leaves_a_small_picture_alone():
    image = np.random.default_rng(0).integers(1, 256, (5, 8, 3), np.uint8)
    canvas, size = fit_canvas(image, 8)
    np.testing.assert_array_equal(canvas[:5], image)
    assert not canvas[5:].any()
    assert size.dtype == np.int32 and size.tolist() == [5, 8]


def test_fit_canvas_shrinks_with_antialiasing_and_keeps_the_aspect():
    stripes = np.zeros((40, 80, 3), np.uint8)
    stripes[:, ::2] = 200  # finer than the canvas can hold: their mean is what must be left
    canvas, size = fit_canvas(stripes, 16)
    assert size.tolist() == [8, 16] and not canvas[8:].any()
    assert np.abs(canvas[:8, 2:-2].astype(int) - 100).max() < 8


@pytest.mark.parametrize("shape", [(1, 1), (500, 1), (1, 500), (300, 2)])
def test_fit_canvas_of_thin_pictures(shape):
    canvas, (height, width) = fit_canvas(np.full((*shape, 3), 9, np.uint8), 16)
    assert height == min(shape[0], 16) and width == min(shape[1], 1 if shape[0] > 16 else 16)
    assert (canvas[:height, :width] == 9).all() and canvas.sum() == 9 * 3 * height * width


# The training stream


def test_a_batch_holds_exactly_what_it_says():
    batch = next(stream(batch_size=3))
    names = ("size", "index", "bad", "place")
    expected = {"image": "uint8"} | dict.fromkeys(names, "int32")
    assert {k: str(v.dtype) for k, v in batch.items()} == expected
    assert batch["image"].shape == (3, 8, 8, 3)
    for image, index in zip(batch["image"], batch["index"], strict=True):
        wanted = np.zeros((8, 8, 3), np.uint8)
        wanted[:4, :6] = index
        np.testing.assert_array_equal(image, wanted)
    assert batch["size"].tolist() == [[4, 6]] * 3 and batch["bad"].tolist() == [-1] * 3


def test_every_epoch_is_a_new_permutation_without_gaps():
    epochs = order(stream(Shades(30), batch_size=7), 13)[:90].reshape(3, 30)
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other_seed = order(stream(Shades(30), batch_size=7, seed=1), 13)[:90].reshape(3, 30)
    assert not {tuple(e) for e in epochs} & {tuple(e) for e in other_seed}


def test_the_order_depends_on_the_seed_alone():
    first = order(stream(seed=3), 5)
    np.testing.assert_array_equal(first, order(stream(seed=3, num_threads=3), 5))
    np.testing.assert_array_equal(first, order(stream(seed=3, batch_size=2), 10))
    assert first.tolist() != order(stream(seed=4), 5).tolist()


def test_batches_of_one():
    assert sorted(order(stream(Shades(3), batch_size=1), 3)) == [0, 1, 2]


def test_a_subclass_that_changes_pixels_is_respected(tmp_path):
    Image.new("RGB", (6, 4), (200, 0, 0)).save(tmp_path / "red.png")

    class Swapped(Folder):
        def __getitem__(self, i):
            return super().__getitem__(i)[:, :, ::-1]

    batch = next(stream(Swapped("pretrain", dir=str(tmp_path)), batch_size=1))
    assert batch["image"][0, 0, 0].tolist() == [0, 0, 200]


def test_a_batch_larger_than_the_source():
    index = next(stream(Shades(3), batch_size=8))["index"]
    assert sorted(index[:3]) == sorted(index[3:6]) == [0, 1, 2]


def test_place_is_epoch_and_position_whatever_the_batch_size():
    """With the order it makes (record, key) a function of (seed, epoch, position) alone."""
    expected = [(epoch, position) for epoch in range(3) for position in range(10)]
    for batch_size in (4, 3):
        batches = take(stream(batch_size=batch_size), 7)
        places = np.concatenate([b["place"] for b in batches])
        assert [tuple(p) for p in places.tolist()] == expected[: len(places)]
    resumed = stream(batch_size=3)
    resumed.set_state({"position": 7, "seed": 0, "num_records": 10})
    assert next(resumed)["place"].tolist() == [[0, 7], [0, 8], [0, 9]]


def test_two_processes_share_every_global_batch():
    whole = take(stream(), 6)
    halves = [take(stream(process_index=p, process_count=2), 6) for p in (0, 1)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
    assert_same(whole, joined)


def test_resume_is_exact_in_the_middle_of_an_epoch():
    whole = take(stream(), 8)
    first = stream()
    assert_same(whole[:3], take(first, 3))
    state = json.loads(json.dumps(first.get_state()))
    assert len(json.dumps(state)) < 200
    second = stream()
    next(second)  # set_state works on an iterator already under way, too
    second.set_state(state)
    assert second.get_state() == state
    assert_same(whole[3:], take(second, 5))
    halves = [stream(process_index=p, process_count=2) for p in (0, 1)]  # and on other hosts
    for half in halves:
        half.set_state(state)
    joined = np.concatenate([next(half)["index"] for half in halves])
    np.testing.assert_array_equal(joined, whole[3]["index"])


def test_state_of_another_stream_is_refused():
    state = stream().get_state()
    with pytest.raises(ValueError, match="num_records 10, this run 11"):
        stream(Shades(11)).set_state(state)
    with pytest.raises(ValueError, match="seed 0, this run 5"):
        stream(seed=5).set_state(state)


def test_worker_processes_give_the_same_stream(tmp_path):
    for k in range(5):
        Image.new("RGB", (6, 4), (k, k, k)).save(tmp_path / f"{k}.png")
    (tmp_path / "3.png").write_bytes(b"")
    source = make_source("folder", "pretrain", dir=str(tmp_path))
    expected = take(stream(source, batch_size=2), 7)
    workers = stream(source, batch_size=2, num_workers=1)
    assert_same(expected[:5], take(workers, 5))
    resumed = stream(source, batch_size=2, num_workers=4)
    resumed.set_state(workers.get_state())
    workers.close()
    assert_same(expected[5:], take(resumed, 2))
    resumed.close()


def test_a_batch_stays_as_it_is_while_somebody_holds_it():
    """Arrays are reused unless a caller, a view or a device still references them."""
    batches, source = stream(Shades(200), batch_size=4), Shades(200)
    held = take(batches, 20)
    views = [next(batches)["image"][1:, 2:] for _ in range(5)]
    on_device = [jax.device_put(next(batches)["image"]) for _ in range(5)]
    copies = [np.array(x) for x in (*views, *on_device)]
    take(batches, 30)
    for batch in held:
        for image, i in zip(batch["image"], batch["index"], strict=True):
            np.testing.assert_array_equal(image, fit_canvas(source[i], 8)[0])
    for array, copy in zip((*views, *on_device), copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_memory_is_used_again():
    batches = stream(Shades(10), canvas_size=300)
    addresses = {next(batches)["image"].ctypes.data for _ in range(30)}
    assert len(addresses) < 15
    batches.close()


@pytest.mark.slow
def test_memory_stays_flat():
    """Resident pages after warming up; 10,000 batches of real images are in the benchmark."""
    batches = stream(Shades(50), batch_size=8, canvas_size=64)
    take(batches, 100)
    before = resident_bytes()
    for _ in range(1500):  # 147 MB of pixels go by
        next(batches)
    assert resident_bytes() - before < 20e6
    batches.close()


def resident_bytes():
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc on this system")
    gc.collect()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": Shades(0)}, "empty"),
        ({"batch_size": 3, "process_count": 2}, "3 does not divide by 2"),
        ({"process_index": 2, "process_count": 2}, r"2 is not in \[0, 2\)"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"seed": -1}, "-1"),
    ],
)
def test_impossible_settings(kwargs, message):
    if "source" in kwargs:
        with pytest.raises(ValueError, match=message):
            train_batches(**kwargs, batch_size=1, canvas_size=8, seed=0)
    else:
        with pytest.raises(ValueError, match=message):
            stream(**kwargs)


def test_a_source_that_breaks_its_word_is_named():
    class Grey(Shades):
        def __getitem__(self, i):
            return np.zeros((4, 6), np.uint8)

    with pytest.raises(ValueError, match=r"shades/\d: the source returned uint8\[4, 6\]"):
        next(stream(Grey(10)))


# Unreadable records


def test_unreadable_records_are_replaced_by_the_next_readable_one():
    source = Shades(10, broken=[3, 9])
    rows = [
        (i, b, image[0, 0, 0])
        for batch in take(stream(source, batch_size=5), 2)
        for i, b, image in zip(batch["index"], batch["bad"], batch["image"], strict=True)
    ]
    assert sorted((i, b) for i, b, _ in rows if b >= 0) == [(0, 9), (4, 3)]
    assert sorted(i for i, _, _ in rows) == [0, 0, 1, 2, 4, 4, 5, 6, 7, 8]
    assert all(i == value for i, _, value in rows)


def test_a_run_of_unreadable_records_counts_the_one_that_was_wanted():
    batch = next(stream(Shades(4, broken=[1, 2, 3])))
    assert set(batch["index"]) == {0} and sorted(batch["bad"]) == [-1, 1, 2, 3]


def test_nothing_readable_gives_up():
    with pytest.raises(
        BadImage, match=r"shades/\d: made so; the 2 records before it are unreadable too"
    ):
        next(stream(Shades(3, broken=range(3))))


def test_truncated_file_in_a_folder_is_replaced_and_logged(tmp_path, caplog):
    rng = np.random.default_rng(0)
    for k in range(6):
        noise = rng.integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{k}.jpg")
    broken = Path(tmp_path, "2.jpg")
    broken.write_bytes(broken.read_bytes()[:500])
    source = make_source("folder", "pretrain", dir=str(tmp_path))
    log = BadImageLog(source)
    for batch in take(stream(source, batch_size=6, canvas_size=32), 3):
        log.add(batch)
    assert log.indices == [2]
    lines = [r.getMessage() for r in caplog.records if "2.jpg" in r.getMessage()]
    assert len(lines) == 1 and "truncated" in lines[0]


def bad(*indices):
    return {"bad": np.array(indices, np.int32)}


def test_bad_image_log_counts_distinct_records_and_stops_above_the_limit():
    log = BadImageLog(Shades(300, broken=[5, 6, 7, 8]), limit=0.01)
    for _ in range(3):
        log.add(bad(-1, 5, 6, -1, 5))
    log.add(bad(7))  # 3 of 300 is 1%, not more
    assert log.indices == [5, 6, 7]
    with pytest.raises(ValueError, match=r"4 of 300 images unreadable \(1\.3%\), more than 1") as e:
        log.add(bad(8))
    assert "shades/5: made so" in str(e.value) and "\n" not in str(e.value)


def test_one_bad_image_never_stops_a_small_set():
    log = BadImageLog(Shades(5, broken=[1, 2]))
    log.add(bad(1, 1))
    with pytest.raises(ValueError, match="2 of 5"):
        log.add(bad(2))


# Evaluation


def test_eval_batches_are_in_order_padded_and_marked():
    batches = list(eval_batches(Shades(10, broken=[5]), batch_size=4, canvas_size=8))
    assert [b["index"].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    valid = [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0]]
    assert [b["valid"].astype(int).tolist() for b in batches] == valid
    assert [b["bad"].tolist() for b in batches] == [[-1] * 4, [-1, 5, -1, -1], [-1] * 4]
    assert not batches[1]["image"][1].any() and batches[1]["size"][1].tolist() == [8, 8]
    np.testing.assert_array_equal(batches[2]["image"][3], fit_canvas(Shades(10)[9], 8)[0])
    assert all(b["image"].shape == (4, 8, 8, 3) and b["valid"].dtype == bool for b in batches)


def test_eval_batches_of_some_indices():
    (batch,) = eval_batches(Shades(10), batch_size=3, canvas_size=8, indices=[7, 2, 7])
    assert batch["index"].tolist() == [7, 2, 7] and batch["valid"].all()
    assert list(eval_batches(Shades(10), batch_size=3, canvas_size=8, indices=[])) == []
    with pytest.raises(ValueError, match=r"index 10 is not in \[0, 10\)"):
        eval_batches(Shades(10), batch_size=3, canvas_size=8, indices=[1, 10])


def test_large_jpegs_come_through_the_reduced_decoder_at_full_canvas(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 512, dtype=np.uint8), (256, 1))
    Image.fromarray(ramp).save(tmp_path / "large.jpg", quality=95)
    source = make_source("folder", "test", dir=str(tmp_path))
    (batch,) = eval_batches(source, batch_size=1, canvas_size=100)
    assert batch["size"].tolist() == [[50, 100]]
    exact = np.asarray(Image.fromarray(ramp).resize((100, 50), Image.Resampling.BICUBIC))
    assert np.abs(batch["image"][0, :50, :, 0].astype(int) - exact).max() <= 4
