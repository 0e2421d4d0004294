"""The walls around model-generated code: a program that confines itself and then starts another one.

    python code_walls.py ROOT SCRIPT PATH...

It imports nothing of opdctl. In new namespaces, it makes a file system at the empty directory ROOT that contains PATHs
read-only, SCRIPT and a private /tmp, changes into it, gives up all rights and executes SCRIPT. `unshare` and `setpriv`
of util-linux cannot remount a directory read-only in a user namespace; bubblewrap, as root, does not change the user.
"""

import ctypes
import os
import re
import shutil
import signal
import sys
from pathlib import Path

NOBODY_ID = 65534
ROOT_BYTES, ROOT_FILES = 64 * 2**20, 4096
"""Limits of all files that the code can write, in /tmp and /dev/shm together."""
WARNING_PREFIX = "warning: "
SCRIPT_PATH = "/code_sandbox.py"
DEVICES = ("null", "zero", "full", "random", "urandom")
NAMESPACES = {
    "user": (0x10000000, "its own rights"),
    "mount": (0x00020000, "its own files"),
    "network": (0x40000000, "no network"),
    "ipc": (0x08000000, "its own shared memory"),
    "pid": (0x20000000, "its own processes"),
}
"""Flag of each namespace for unshare(2), and what it gives the code."""
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 8, 32, 4096, 16384
MS_PRIVATE, MS_RELATIME, ST_RELATIME = 1 << 18, 1 << 21, 4096
KEPT_MOUNT_FLAGS = MS_NOSUID | MS_NODEV | MS_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME
"""Flags that have the same value in statvfs(2) and mount(2). A user namespace may not clear them."""
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38

_libc = ctypes.CDLL(None, use_errno=True)


class MissingWallError(Exception):
    """The kernel refuses a wall."""


def enter(root: Path, script: Path, paths: list[Path]) -> None:
    """Build the walls and execute `script` in them."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _unshare_all()
    child = os.fork()  # the first process of the new process namespace; its end ends all others there
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) % 256)
    _build_root(root, script, paths)
    os.chroot(root)
    os.chdir("/tmp")
    if os.geteuid() != NOBODY_ID:
        os.setgroups([])
        os.setresgid(NOBODY_ID, NOBODY_ID, NOBODY_ID)
        os.setresuid(NOBODY_ID, NOBODY_ID, NOBODY_ID)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of the user clears it
    # Of a user other than root, execve clears all capabilities of the user namespace.
    os.execv(sys.executable, [sys.executable, "-P", SCRIPT_PATH])


def _unshare_all() -> None:
    """Enter the new namespaces, as nobody unless this is root."""
    uid, gid = os.geteuid(), os.getegid()
    for name, (flag, purpose) in NAMESPACES.items():
        if name == "user" and uid == 0:
            continue
        if _libc.unshare(flag):
            raise MissingWallError(f"the kernel refuses a {name} namespace ({purpose}): {_last_error()}")
        if name == "user":
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{NOBODY_ID} {uid} 1")
            Path("/proc/self/gid_map").write_text(f"{NOBODY_ID} {gid} 1")


def _build_root(root: Path, script: Path, paths: list[Path]) -> None:
    os.umask(0o022)
    _mount("none", Path("/"), flags=MS_REC | MS_PRIVATE)
    options = f"size={ROOT_BYTES},nr_inodes={ROOT_FILES},mode=755"
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, options)
    for name in ("tmp", "dev/shm"):
        _inside(root, Path("/", name)).mkdir(parents=True)
        (root / name).chmod(0o1777)
    for path in [*paths, *(Path("/dev", name) for name in DEVICES)]:
        _show(path, _inside(root, path))
    _show(script, _inside(root, Path(SCRIPT_PATH)))
    _make_read_only(root)
    (root / "proc").mkdir()
    try:
        _mount("proc", root / "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY)
    except MissingWallError as error:  # in a container that hides a part of /proc; an empty one shows nothing either
        sys.stderr.write(f"{WARNING_PREFIX}model-generated code gets an empty /proc: {error}\n")


def _show(path: Path, target: Path) -> None:
    """Make the file, directory or link `path` visible at `target`."""
    if target.exists() or not path.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() and path.parent == Path("/"):  # /bin -> usr/bin
        shutil.copy(path, target, follow_symlinks=False)
        return
    target.mkdir() if path.is_dir() else target.touch()
    _mount(str(path), target, flags=MS_BIND | MS_REC)


def _make_read_only(root: Path) -> None:
    """Make every mount below `root` read-only."""
    prefix = os.fsencode(root) + b"/"
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        target = re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8)]), line.split()[4])
        if target.startswith(prefix):
            present = os.statvfs(target).f_flag
            flags = present & KEPT_MOUNT_FLAGS | (MS_RELATIME if present & ST_RELATIME else 0)
            _mount("none", Path(os.fsdecode(target)), flags=MS_REMOUNT | MS_BIND | MS_RDONLY | flags)


def _inside(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _mount(source: str, target: Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    arguments = [os.fsencode(text) or None for text in (source, target, kind)]
    if _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None):
        raise MissingWallError(f"the kernel refuses to mount {kind or source} at {target}: {_last_error()}")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise MissingWallError(f"the kernel refuses prctl {option}: {_last_error()}")


def _last_error() -> str:
    return os.strerror(ctypes.get_errno())


if __name__ == "__main__":
    try:
        enter(Path(sys.argv[1]), Path(sys.argv[2]), [Path(path) for path in sys.argv[3:]])
    except (MissingWallError, OSError) as error:
        sys.exit(str(error))
