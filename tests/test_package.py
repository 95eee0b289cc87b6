import subprocess
import sys
from pathlib import Path

import lirefs


def test_import_leaves_heavy_packages_alone():
    code = (
        "import sys, lirefs, kfac; "
        "heavy = {'transformer_lens', 'nnsight', 'datasets', 'matplotlib', 'lm_eval'}; "
        "heavy &= set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_exist():
    assert all(hasattr(lirefs, name) for name in lirefs.__all__)
    assert sorted(lirefs.__all__, key=str) == sorted(set(lirefs.__all__), key=str)


def test_kfac_stands_alone():
    code = "import sys, kfac; sys.exit('lirefs' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_version_matches_the_distribution():
    from importlib.metadata import version

    assert version("lirefs") == lirefs.__version__


def test_what_people_cite_is_this_version():
    root = Path(__file__).parents[1]
    assert f"\nversion: {lirefs.__version__}\n" in (root / "CITATION.cff").read_text("utf-8")
    assert f"\n## {lirefs.__version__}\n" in (root / "CHANGELOG.md").read_text("utf-8")
