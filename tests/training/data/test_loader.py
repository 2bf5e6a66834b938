"""The loader: the same bytes with workers, processes and from anywhere; what a run continues on."""

import shutil

import pytest
import torch

from tests.training.data.same_batches import equal
from tests.training.prepare.small_data import make_sample, write_shards
from training.data.batches import BatchReport, DataError
from training.data.shards import ShardWriter


@pytest.mark.parametrize(
    "start_method", ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))]
)
def test_workers_change_no_byte(shards, reader, start_method):
    alone = reader(shards, seed=1)
    expected = [batch for epoch in range(2) for batch in alone.batches(epoch)]
    with_workers = reader(shards, seed=1, workers=2, start_method=start_method)
    assert equal([batch for epoch in range(2) for batch in with_workers.batches(epoch)], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_continues_from_any_position(shards, reader, workers):
    expected = list(reader(shards).batches(3))
    resumed = reader(shards, workers=workers)
    assert equal(list(resumed.batches(3, 16)), expected[2:])
    assert equal(list(resumed.batches(3, 8)), expected[1:])  # not in turn: started anew
    with pytest.raises(ValueError, match="multiple of the global batch of 8"):
        next(resumed.batches(0, 12))


def test_a_window_of_few_batches_is_warned_of_once(shards, reader, capsys):
    for options in ({"window_samples": 64}, {"window_samples": 40, "batch": 5}, {"window_samples": None}):
        reader(shards, **options)
        assert not capsys.readouterr().err
    reader(shards, window_samples=20)
    assert "within windows of 20 samples, 2.5 global batches" in capsys.readouterr().err
    reader(shards, window_samples=20, process_index=1, num_processes=2)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("device", "pinned", "method"), [("cpu", False, None), ("cuda", True, "forkserver")])
def test_the_device_of_a_run_decides_whether_memory_is_pinned_and_how_workers_start(
    shards, reader, monkeypatch, device, pinned, method
):
    """Whatever the machine has."""
    seen = {}
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda maker, **options: seen.update(options) or [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reader(shards, workers=2, device=device)._start(0, 0)
    assert (seen["pin_memory"], seen["multiprocessing_context"]) == (pinned, method)


def test_all_tensors_of_a_batch_are_pinned_and_the_rest_comes_through(shards, reader, monkeypatch):
    """What the pinning thread does on a machine with a GPU, with copies in the place of pinned memory."""
    made = reader(shards)
    made._start(0, 0)
    batch, pinned = next(made._pipeline), []

    def pin(tensor, *device):
        pinned.append(tensor.data_ptr())
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    found = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert equal([found], [batch]) and type(found["report"]) is BatchReport
    assert sorted(pinned) == sorted(value.data_ptr() for value in batch.values() if torch.is_tensor(value))


def test_epochs_and_seeds_differ(shards, reader):
    keys = [
        [b["sample_keys"] for b in reader(shards, seed=seed).batches(epoch)] for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert keys[0] != keys[1] and keys[0] != keys[2]
    # The same sample is cropped anew each epoch.
    data = reader(shards, batch=44)
    first, second = (next(data.batches(epoch)) for epoch in (0, 1))
    a, b = first["sample_keys"].index("0007"), second["sample_keys"].index("0007")
    assert not torch.equal(first["local_pixel_values"][a], second["local_pixel_values"][b])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batches_of_one(shards, reader, processes):
    alone = list(reader(shards, settings={"pooling": "max"}).batches(0))
    parts = [list(reader(shards, process_index=i, num_processes=processes).batches(0)) for i in range(processes)]
    for number, whole in enumerate(alone):
        for index in range(processes):
            part, share = parts[index][number], slice(8 // processes * index, 8 // processes * (index + 1))
            assert part["sample_keys"] == whole["sample_keys"][share]
            for key in ("pixel_values", "local_pixel_values", "input_ids", "has_tags"):
                assert torch.equal(part[key], whole[key][share])


def test_overfit_batches_repeat(shards, reader):
    data = reader(shards, overfit_batches=2)
    epochs = [list(data.batches(epoch)) for epoch in range(3)]
    assert len(epochs[0]) == 2 and equal(epochs[0], epochs[1]) and equal(epochs[0], epochs[2])
    assert equal(epochs[0], list(reader(shards).batches(0))[:2])


def test_fewer_samples_than_a_global_batch(shards, reader):
    with pytest.raises(ValueError, match=r"44 samples / 64 in a global batch = 0\.69"):
        reader(shards, batch=64)
    with pytest.raises(ValueError, match="global batch of 8 over 3 processes"):
        reader(shards, num_processes=3)
    with pytest.raises(ValueError, match="no training data"):
        reader([])


def test_several_data_sets_one_after_another(shards, tmp_path, reader):
    other = write_shards(tmp_path / "other", range(100, 124))
    visits = set()
    data = reader([shards, other], batch=4)
    for epoch in range(6):
        kinds = [int(key) >= 100 for batch in data.batches(epoch) for key in batch["sample_keys"]]
        assert sum(a != b for a, b in zip(kinds, kinds[1:])) == 1
        visits.add(kinds[0])
    assert visits == {True, False}


def test_fingerprint_follows_the_data_not_its_place(shards, tmp_path, reader):
    first = reader(shards).fingerprint
    moved = shutil.copytree(shards, tmp_path / "moved")
    assert reader(moved).fingerprint == first
    for path in moved.glob("*.index.json"):
        path.unlink()
    assert reader(moved).fingerprint == first
    with ShardWriter(moved / "part-005.tar") as writer:
        for number in (40, 41, 42, 99):
            writer.write(make_sample(number))
    assert reader(moved).fingerprint != first
    assert reader([shards, moved]).fingerprint not in (first, reader(moved).fingerprint)


def test_description(shards, reader):
    (described,) = reader(shards).description
    assert described == {"name": str(shards), "samples": 44, "shards": 6, "made_by": {"regions": "detector 1"}}


def test_regions_of_two_detectors_are_refused(shards, tmp_path, reader):
    other = write_shards(tmp_path / "other", range(8), made_by="detector 2")
    with pytest.raises(ValueError, match="2 detectors.*detector 1.*detector 2"):
        reader([shards, other])
    reader([shards, other], levels=("global", "caption"))
    reader([shards, other], settings={"allow_mixed_regions": True})
    with pytest.raises(ValueError, match="width 8, the model takes 2048"):
        reader(shards, settings={"roi_feature_size": 2048})
    mixed = reader(shards, settings={"roi_feature_size": 2048, "allow_mixed_regions": True})
    assert not any(batch["roi_mask"].any() for batch in mixed.batches(0))
    (other / "dataset.json").unlink()  # nobody says: every sample is checked
    data = reader(other, settings={"roi_feature_size": 2048})
    with pytest.raises(DataError, match="roi-width"):
        list(data.batches(0))


def test_report_of_nothing_bad(shards, reader):
    data = reader(shards)
    list(data.batches(0))
    assert data.report() == ["data: 40 samples, none bad"]
    assert data.metrics()["data/truncated_caption"] == 0
    assert isinstance(data.maker.batch(0, [0])["report"], BatchReport)
