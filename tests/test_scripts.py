"""What every script of launch/ and benchmarks/ has in common: how it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from co3d_ensemble.assembly import compose_experiment
from co3d_ensemble.scripts import READER_GONE, first_line, run_script
from tests.children import environment_of_child
from tests.conftest import REPOSITORY

SCRIPTS = [path for folder in ("launch", "benchmarks") for path in sorted((REPOSITORY / folder).glob("*.py"))]
RUN = [path for path in SCRIPTS if '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_every_script_ends_through_run_script(path):
    end = path.read_text().partition('if __name__ == "__main__":\n')[2].strip()
    assert end in ("run_script(main)", "run_script(worker)"), end


def test_all_scripts_were_found():
    assert len(RUN) >= 20


def first_line_of(command: str) -> tuple[str, str, int]:
    """What is shown of a script whose reader goes after a line, its complaints, and its exit code."""
    program = f"import sys\nfrom co3d_ensemble.scripts import reported, run_script\n{command}"
    environment = environment_of_child(threads=None)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    line = process.stdout.readline()
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    return line, told, process.wait(60)


@pytest.mark.parametrize(
    "command",
    [
        "def main(arguments):\n    print('line\\n' * 100_000)\n    return 0\nrun_script(main)",
        "def main(arguments):\n    return reported(lambda: print('line\\n' * 100_000) or 0)\nrun_script(main)",
        "def main(arguments):\n    print('line\\n' * 100_000)\n    sys.exit(0)\nrun_script(main)",
    ],
)
def test_a_reader_that_goes_early_gets_no_traceback(command):
    assert first_line_of(command) == ("line\n", "", READER_GONE)


@pytest.mark.parametrize(("ends", "code"), [(0, 0), (3, 3), (SystemExit(2), 2), (SystemExit(None), 0), (SystemExit("why"), 1)])
def test_a_script_ends_with_its_own_code(ends, code, capsys):
    def main(arguments):
        if isinstance(ends, SystemExit):
            raise ends
        return ends

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == ("why\n" if code == 1 else "")


def test_an_error_of_the_grammar_says_how_to_quote():
    with pytest.raises(Exception) as caught:
        compose_experiment(["model.kind=nerf (mine)"])
    assert "KEY='a (b)'" in first_line(caught.value)

