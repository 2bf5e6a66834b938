"""Batches of a data set: what is read while another is encoded, and by how many threads."""

import threading

import pytest
import torch

from training.evaluation.embedding import map_batches


def test_the_next_batch_is_read_while_one_is_encoded():
    begun = [threading.Event() for _ in range(4)]

    def read(numbers):
        begun[numbers[0]].set()
        return numbers[0]

    def encode(number):
        assert number == 3 or begun[number + 1].wait(20)
        return number

    found = map_batches(encode, 4, 1, "numbers", alone=True, prepare=read, device=torch.device("cpu"))
    assert found == [0, 1, 2, 3]


def test_a_gpu_has_a_thread_for_each_core_of_its_process(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(6))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    all_three = threading.Barrier(3, timeout=20)

    def read(numbers):
        all_three.wait()
        return list(numbers)

    # The barrier lets nobody pass before three read at once.
    found = map_batches(sum, 12, 2, "numbers", alone=True, prepare=read, device=torch.device("cuda"))
    assert found == [1, 5, 9, 13, 17, 21]


def test_what_cannot_be_read_ends_it():
    def read(numbers):
        if 2 in numbers:
            raise ValueError("picture 2 cannot be read")
        return list(numbers)

    with pytest.raises(ValueError, match="picture 2 cannot be read"):
        map_batches(sum, 9, 2, "numbers", alone=True, prepare=read)
