"""The filesystem that a file lies on: whether other machines share it, and how a change of names is made to last."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import psutil

_NETWORK = frozenset(
    {"9p", "afpfs", "afs", "auristorfs", "beegfs", "ceph", "coda", "davfs", "dvs", "gfs", "gfs2", "glusterfs", "gpfs"}
    | {"lustre", "ncpfs", "ocfs2", "orangefs", "panfs", "prl_fs", "pvfs2", "vboxsf", "virtiofs", "vmhgfs", "webdav"}
    | {"wekafs"}
)
_NETWORK_PREFIXES = ("nfs", "cifs", "smb")
"""nfs and nfs4, smbfs and smb3."""


def is_network(filesystem: str) -> bool:
    """Whether a type of filesystem, as the mount table names it, is shared with other machines."""
    name = filesystem.lower()
    # What a program serves (sshfs, s3fs, gcsfuse, ...) counts as shared, be its name given or not: a rollback journal
    # on a local one costs a little time, a write-ahead log on a remote one the ledger. fuseblk is a local disk.
    served = "fuse" in name and name != "fuseblk"
    return served or name in _NETWORK or name.startswith(_NETWORK_PREFIXES)


def filesystem(path: Path, mounts: Iterable[tuple[str, str]] | None = None) -> str:
    """The type of the filesystem under `path`, which need not exist yet; empty where no mount point holds it.

    `mounts` are pairs of mount point and type, in the order of mounting; those of this machine when None.
    """
    if mounts is None:
        mounts = [(mount.mountpoint, mount.fstype) for mount in psutil.disk_partitions(all=True)]
    place = path.resolve()
    found, depth = "", -1
    for point, kind in mounts:
        parts = Path(point).parts
        if place.parts[: len(parts)] == parts and len(parts) >= depth:  # of two at one place the later one covers
            found, depth = kind, len(parts)
    return found


def sync_folder(folder: Path) -> None:
    """Make what was renamed or removed in a folder survive the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
