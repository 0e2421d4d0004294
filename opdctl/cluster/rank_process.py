"""The process of a rank: `python -m opdctl.cluster.rank_process PARENT ARGUMENTS…`. It ends with the worker of Ray that
started it."""

import os
import runpy
import sys

from opdctl.engines.host_process import die_with_parent

if __name__ == "__main__":
    parent = int(sys.argv.pop(1))
    die_with_parent(lambda: os.getppid() == parent)
    runpy.run_module("opdctl", run_name="__main__")
