"""What happens to a run on two machines of two processes each: how all of them end, and that it continues bit-equal."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from pyramidclip_hf import __version__
from tests.training.machines import CHECKOUT, SHUTDOWN, Cluster, make_shards, mounting
from tests.training.runs import assert_equal_runs
from training.loop.outcome import read_outcome
from training.loop.record import is_whole
from training.loop.run_folder import list_checkpoints, step_of
from training.loop.watch import GONE

STEPS, SAVED = 36, 4
SET_TIME = 12  # seconds that a silent process is waited for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def patience():
    """Seconds in which two machines surely start and finish: many times what a start of Python with torch takes now."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import training.pretrain, accelerate"], cwd=CHECKOUT, check=True)
    return 120 + 30 * (time.monotonic() - began)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards, patience):
    """The folder of a run that nothing happened to."""
    cluster = Cluster(tmp_path_factory.mktemp("undisturbed"), shards)
    cluster.start(max_steps=STEPS, save_every_steps=SAVED)
    assert cluster.end(patience) == [0, 0], cluster.told()
    return cluster.run


@pytest.fixture
def cluster(tmp_path, shards):
    """Two machines; what is left of them is killed at the end."""
    cluster = Cluster(tmp_path, shards)
    yield cluster
    cluster.clear()


def start(cluster, **options):
    cluster.start(max_steps=STEPS, save_every_steps=SAVED, process_timeout_minutes=SET_TIME / 60, **options)


def finishes(cluster, undisturbed, patience, **options):
    """Launched now, with nothing wrong, it comes to the end of the undisturbed run, with the same bits."""
    start(cluster, **options)
    assert cluster.end(patience) == [0, 0], cluster.told()
    assert_equal_runs(undisturbed, cluster.run, kept=())


def ended(cluster, codes, reason, sentence, step):
    """All said the sentence and ended with its exit code, which is in stopped.json; the checkpoints are whole."""
    assert codes[0] == codes[1], cluster.told()
    for machine in cluster.machines:
        assert sentence in machine.said, cluster.told()
        assert "Traceback" not in machine.said.partition("torch/distributed/elastic")[0], cluster.told()
    outcome = read_outcome(cluster.run)
    assert (outcome["reason"], outcome["exit_code"]) == (reason, codes[0]), cluster.told()
    assert sentence in outcome["message"] and outcome["step"] >= step
    checkpoints = list_checkpoints(cluster.run)
    assert checkpoints and all(map(is_whole, checkpoints)) and step_of(checkpoints[-1]) >= step - SAVED


@contextlib.contextmanager
def shard_lost(cluster):
    lost = cluster.machines[1].disk / "project" / "scenes" / "part-003.tar"
    aside = lost.rename(cluster.folder / lost.name)
    yield "scenes is not the same on all machines: process 0 sees 6 shards, process 2 5"
    aside.rename(lost)


@contextlib.contextmanager
def other_version(cluster):
    package = cluster.machines[1].disk / "project" / "pyramidclip_hf" / "__init__.py"
    text = package.read_text()
    package.write_text(text.replace(__version__, "0.0.1"))
    yield f"pyramidclip-hf: {__version__} in processes 0, 1, 0.0.1 in processes 2, 3"
    package.write_text(text)


@contextlib.contextmanager
def own_output_dir(cluster):
    """So the machine has no list of checkpoints at all."""
    cluster.machines[1].settings = {"output_dir": "run"}
    yield "checkpoints/ is another folder for processes 2, 3 than for process 0"
    assert not (cluster.machines[1].disk / "project" / "run").exists()
    cluster.machines[1].settings = {}


@contextlib.contextmanager
def older_checkpoints(cluster):
    """The machine has a list of checkpoints in which the newest is not."""
    older = cluster.folder / "older"
    shutil.copytree(cluster.run / "checkpoints", older)
    shutil.rmtree(older / list_checkpoints(cluster.run)[-1].name)
    cluster.machines[1].mounted.append((cluster.run / "checkpoints", older))
    yield "checkpoints/ is another folder for processes 2, 3 than for process 0"
    cluster.machines[1].mounted.clear()


def test_machines_that_do_not_see_the_same_end_at_once_and_continue_once_they_do(cluster, undisturbed, patience):
    start(cluster)
    cluster.wait_for_steps(9, patience)
    cluster.clear()  # both at once, as by a loss of power
    checkpoints = list_checkpoints(cluster.run)
    assert len(checkpoints) == 2
    faults = [shard_lost, other_version, own_output_dir, *([older_checkpoints] if mounting() else [])]
    for fault in faults:
        with fault(cluster) as sentence:
            start(cluster)
            codes = cluster.end(patience)
            assert codes == [2, 2], cluster.told()
            ended(cluster, codes, "setting or data", sentence, step=0)
        assert list_checkpoints(cluster.run) == checkpoints and not (cluster.run / "abandoned").exists()
    finishes(cluster, undisturbed, patience)


def test_what_happens_to_one_process_or_one_disk_ends_all_in_the_set_time(cluster, undisturbed, patience):
    """One after the other, in a run that continues after each."""
    for kind, step in ((signal.SIGSTOP, 5), (signal.SIGKILL, 13)):
        start(cluster)
        cluster.wait_for_steps(step, patience)
        cluster.machines[1].process(3).send_signal(kind)
        first, second = cluster.end(SET_TIME + SHUTDOWN + patience / 4)  # and what a busy machine needs
        assert second in (1, -signal.SIGKILL), cluster.told()  # of the one that was killed, in the end by its launcher
        ended(cluster, [first, 1], "another process", f"process 3 {GONE}", step)
    start(cluster)
    cluster.wait_for_steps(21, patience)
    for rank in (2, 3):
        cluster.machines[1].process(rank).rlimit(psutil.RLIMIT_FSIZE, (100, 100))
    codes = cluster.end(patience)
    assert codes == [1, 1], cluster.told()
    ended(cluster, codes, "disk full", "process 2: OSError: [Errno 27] File too large", 21)
    finishes(cluster, undisturbed, patience)


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int code = ((int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime"))(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += 3600;
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec, now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    return now ? (*now = exact.tv_sec) : exact.tv_sec;
}
"""


def test_a_machine_that_is_late_and_whose_clock_is_an_hour_ahead_changes_nothing(
    cluster, undisturbed, patience, tmp_path
):
    if not shutil.which("cc"):
        pytest.skip("a clock that is ahead is compiled, and there is no cc")
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    ahead = {"LD_PRELOAD": str(library)}
    now = [int(subprocess.check_output(["date", "+%s"], env=os.environ | more)) for more in ({}, ahead)]
    assert 3590 < now[1] - now[0] < 3700
    cluster.machines[1].variables = ahead
    finishes(cluster, undisturbed, patience, late=15)
