"""A disk of its own for the log: a file system in a file in memory. It can be full, and lose power.

Needs root. `fill` takes its free space (ENOSPC). `lose_power` ends it without another byte, as a power cut
does. It does not fail with I/O errors: a loop device without space under it lost what it had reported as
synced, with SQLite alone as well.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

MEMORY_MB, SIZE_MB = 768, 512
# include/uapi/linux/ext4.h: EXT4_IOC_SHUTDOWN, and the flag that leaves the journal as it is.
SHUTDOWN, NO_FLUSH = 0x8004587D, (2).to_bytes(4, "little")
BLOCK = bytes(1 << 20)


class Drive:
    def __init__(self, home: Path) -> None:
        self.root = home / "drive"
        self._under, self._image = home / "memory", home / "memory" / "image"

    def open(self) -> None:
        """Raises OSError or CalledProcessError if this machine does not allow it."""
        self._under.mkdir()
        self.root.mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"size={MEMORY_MB}m", "tmpfs", str(self._under))
        with self._image.open("wb") as file:
            file.truncate(SIZE_MB << 20)
        _run("mkfs.ext4", "-q", str(self._image))
        self._mount()

    def close(self) -> None:
        for place in (self.root, self._under):
            if place.is_mount():
                _run("umount", "--lazy", str(place))

    def fill(self) -> None:
        try:
            with (self.root / "ballast").open("ab", buffering=0) as ballast:
                while os.write(ballast.fileno(), BLOCK) == len(BLOCK):
                    pass
                while True:
                    os.write(ballast.fileno(), BLOCK[:4_096])
        except OSError:
            return

    def make_room(self) -> None:
        (self.root / "ballast").unlink(missing_ok=True)

    def lose_power(self) -> None:
        top = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(top, SHUTDOWN, NO_FLUSH)
        finally:
            os.close(top)

    def mend(self) -> None:
        """The machine starts again: mounts what reached the disk. No process may use it."""
        _run("umount", str(self.root))
        self._mount()

    def _mount(self) -> None:
        _run("mount", "-o", "loop", str(self._image), str(self.root))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
