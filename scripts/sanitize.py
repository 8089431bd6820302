"""The compiled kernels under sanitizers, for every target of this CPU: exit code 0 if they find nothing.

python scripts/sanitize.py                          # all of it, in about half an hour
python scripts/sanitize.py --targets amx --sanitizers thread

AddressSanitizer and UndefinedBehaviorSanitizer run the tests of the kernels; ThreadSanitizer those that use several
threads, which here are not OpenMP's, whose waiting it does not see. GCC compiles the kernels for each target anew, and
its sanitizers are loaded before Python. Output of tests that fail, with the report of the sanitizer, goes to stderr; a
line for each run goes to stdout.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_sparse.errors import UserError
from hf_sparse.kernels.cpu import build, compiler

ROOT = Path(__file__).parents[1]
# Sanitizer -> what it is compiled with, its library, its options, and the tests that it sees.
SANITIZERS = {
    "address": (
        "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all",
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},  # Python frees little as it ends
        [
            *(
                "tests/test_matrix_unit.py",
                "tests/test_engines.py",
                "tests/test_grouped.py",
                "tests/test_lossless_parts.py",
            ),
            "-k",
            "(matrix_unit and 3]) or cpu or threads_change or 4_bits_follow or in_one_call or (no_number and compiled) "
            "or single_query or few_queries",
        ],
    ),
    "thread": (
        "-fsanitize=thread",
        "libtsan.so",
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1"},
        [
            *("tests/test_matrix_unit.py", "tests/test_grouped.py", "tests/test_lossless_parts.py"),
            *("-k", "3] or threads_change or in_one_call or few_queries"),
        ],
    ),
}

# With less optimisation, which takes minutes where every operation is checked.
COMPILE = """
import sys
from pathlib import Path
from hf_sparse.kernels.cpu import build, compiler
compiler._FLAGS = tuple("-O1" if flag == "-O3" else flag for flag in compiler._FLAGS)
for names in ([], sys.argv[1:]):
    build._made(build.find_compiler(), Path(build.__file__).parent, *names)
"""


def supported() -> list[str]:
    """The targets that this CPU can run and the compiler knows."""
    library, command = build.library(), compiler.find_compiler()
    if library is None:
        raise UserError(f"there is nothing to sanitize: {build.unsupported_reason()}")
    every = compiler.targets().items()
    return [name for name, flags in every if library.hfs_supports(name.encode()) and compiler.knows(command, flags)]


def run(sanitizer: str, target: str, folder: str) -> bool:
    """Run the tests of one sanitizer on one target; gives whether it found nothing."""
    flags, preloaded, options, tests = SANITIZERS[sanitizer]
    command = (*compiler.find_compiler(), *shlex.split(flags), "-g", "-fno-omit-frame-pointer")
    asked = subprocess.run([command[0], f"-print-file-name={preloaded}"], capture_output=True, text=True, check=True)
    environment = (
        os.environ
        | options
        | {
            "CXX": shlex.join(command),
            "HF_ASSETS_CACHE": folder,
            "HF_SPARSE_CPU": target,
            "HF_SPARSE_KERNELS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
    )
    # Compiled before the sanitizer is loaded, which would slow down the compiler.
    subprocess.run([sys.executable, "-c", COMPILE, target], env=environment, check=True)
    environment["LD_PRELOAD"] = asked.stdout.strip()
    # Addresses that are not random: ThreadSanitizer knows where memory lies.
    pytest = ["setarch", "-R", sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-rN", "-s"]
    done = subprocess.run([*pytest, *tests], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-20_000:], done.stderr[-20_000:], file=sys.stderr)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    clean = not done.returncode and "skipped" not in last  # They are where the kernels cannot be loaded.
    print(f"{sanitizer}, {target}: {'nothing found' if clean else 'FAILED'} ({last})", flush=True)
    return clean


def main() -> int:
    """Run the sanitizers that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=supported(), default=supported())
    parser.add_argument("--sanitizers", nargs="+", choices=SANITIZERS, default=list(SANITIZERS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [run(sanitizer, target, folder) for sanitizer in args.sanitizers for target in args.targets]
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
