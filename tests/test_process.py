"""How the command line's process computes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mirageq.process import ask_for_huge_pages

PROGRAM = """
import resource, torch
from mirageq.process import keep_freed_memory
if {keep} and not keep_freed_memory():
    raise SystemExit("another C library")
torch.set_num_threads(1)
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**24).add(1)  # 64 MiB each, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10)  # until the heap has the holes it needs: how soon depends on where it lies
print(faults(10))
"""


def _faults(*, keep: bool) -> int:
    program = PROGRAM.format(keep=keep)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", program], env=plain, capture_output=True, text=True, check=False)
    if "another C library" in done.stderr:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_used_again_without_faulting_it_in():
    usual = _faults(keep=False)
    if usual < 100_000:
        pytest.skip("the system gives huge pages unasked, and there is nothing to win")
    assert _faults(keep=True) < usual / 10


def test_processes_ask_for_huge_pages_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # put back afterwards, whatever it was
    monkeypatch.delenv("GLIBC_TUNABLES")
    ask_for_huge_pages()
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    ask_for_huge_pages()
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=1"


def test_the_command_line_computes_in_float32():
    program = """
import sys, torch
from mirageq.__main__ import run
sys.argv = ["mirageq", "recipes"]
torch.backends.cuda.matmul.allow_tf32 = True  # as a program's defaults may have it
try:
    run()
except SystemExit as ended:
    assert not ended.code
assert not torch.backends.cudnn.allow_tf32
assert not torch.backends.cuda.matmul.allow_tf32
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


PARENT = """
import multiprocessing, time
from mirageq.process import end_with_parent

def child():
    end_with_parent()
    print("begun", flush=True)
    time.sleep(100)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=child).start()
"""


def test_a_process_ends_with_the_one_that_began_it(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "begun\n"
        parent.kill()
        parent.communicate(timeout=60)  # ends once nobody can write any more, the child neither
