"""Makes the modules of tests/study importable: the study is a directory that Python runs, not a package."""

import sys

from helpers.commands import ROOT

sys.path.append(str(ROOT / "tests" / "study"))
