"""Neither learn2learn nor TorchJD is needed, or loaded, before it is asked for."""

import subprocess
import sys


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imported_on_demand():
    loaded = "[m for m in ('learn2learn', 'torchjd', 'gym') if m in sys.modules]"
    program = (
        "import sys, gametalearn, gametalearn.bridges, gametalearn.bridges.learn2learn\n"
        f"print({loaded})\n"
        "import gametalearn.bridges.torchjd\n"
        f"print({loaded})"
    )
    assert run(program).splitlines() == ["[]", "['torchjd']"]


def test_without_torchjd():
    program = (
        "import sys; sys.modules['torchjd'] = None\n"
        "import gametalearn\n"
        "try: import gametalearn.bridges.torchjd\n"
        "except gametalearn.InputError as error: print(error)\n"
    )
    said = run(program)
    assert said.startswith("TorchJD 0.18 or later is not installed (")
    assert said.endswith("); pip install 'torchjd[quadprog-projector]>=0.18'")
