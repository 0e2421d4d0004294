"""The toy tasks that come with opdctl, by name."""

from opdctl.data.toy.calculating import calc
from opdctl.data.toy.sorting import sort12
from opdctl.data.toy.swapping import perm, perm4, perm8

__all__ = ["TASKS", "calc", "perm", "perm4", "perm8", "sort12"]
TASKS = {task.name: task for task in (sort12, perm, perm4, perm8, calc)}
