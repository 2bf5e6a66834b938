"""`import pyramidclip_hf` must not cost more than what a user of Transformers pays for CLIP, plus 0.3 s."""

import os
import resource
import statistics
import subprocess
import sys

import pytest

OURS = "import pyramidclip_hf"
THEIRS = "from transformers import CLIPModel"
# What else the machine does disturbs single measurements: one quiet attempt is enough, of medians of so many rounds.
ATTEMPTS = (1, 3, 3)


def processor_seconds(code, checkout):
    """User and system time of a new process that runs `code`: importing is one thread's work, so this is what it
    takes on an idle machine, and it hardly changes on a busy one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # PYTHONPATH and not the working folder, so that an installed package is measured the same way.
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, stdin=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def median_difference(checkout, rounds):
    """Median over rounds of (ours - theirs), each round one process of either, in alternation."""
    return statistics.median(
        processor_seconds(OURS, checkout) - processor_seconds(THEIRS, checkout) for _ in range(rounds)
    )


@pytest.mark.timeout(1800)  # 14 imports at worst, on a machine that may be very busy
def test_import_costs_at_most_0_3_seconds_more_than_clip(checkout):
    differences = []
    for rounds in ATTEMPTS:
        differences.append(median_difference(checkout, rounds))
        if differences[-1] <= 0.3:
            break
    print(f"seconds more than CLIPModel's import, medians of {ATTEMPTS}:", differences)
    assert min(differences) <= 0.3, differences


def test_import_leaves_optional_packages_alone():
    """Over what CLIPModel's import loads anyway, none of the extras' packages is loaded, installed or not."""
    optional = "accelerate datasets torchvision matplotlib sklearn pyarrow clip_benchmark open_clip".split()
    code = f"import sys; {THEIRS}; before = set(sys.modules); {OURS}; "
    code += f"print(*sorted(set({optional}) & (set(sys.modules) - before)))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.split() == []


def test_a_command_that_reads_its_words_leaves_the_classes_for_later(checkout, tmp_path):
    """And has all of them when it begins its work, registered; a package of the same name elsewhere changes nothing."""
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "__init__.py").write_text("from pyramidclip_command import expect_words\n\nexpect_words()\n")
    (tmp_path / "words" / "work.py").write_text(
        "import sys\n\n"
        "import pyramidclip_hf\n"
        "import pyramidclip_hf.files\n"
        "from pyramidclip_command import answer_words\n\n"
        "assert 'torch' not in sys.modules and not hasattr(pyramidclip_hf, 'no_such_name')\n"
        "answer_words(list)\n"
        "from transformers import AutoConfig\n\n"
        "print(AutoConfig.for_model('pyramidclip').model_type, pyramidclip_hf.PyramidCLIPModel.__name__)\n"
    )
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").touch()
    (tmp_path / "training" / "own.py").write_text(
        "import pyramidclip_hf\nfrom transformers import AutoConfig\n\n"
        "print(AutoConfig.for_model('pyramidclip').model_type, 'PyramidCLIPModel' in vars(pyramidclip_hf))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{checkout}"}
    for module, shown in (("words.work", "pyramidclip PyramidCLIPModel\n"), ("training.own", "pyramidclip True\n")):
        command = [sys.executable, "-m", module]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.stdout, done.returncode) == (shown, 0), done.stderr
