"""Guards that a write-ahead log is never put on a disk that other machines share."""

from pathlib import Path

import psutil
import pytest

from fitness.filesystem import filesystem, is_network

MOUNTS = [
    ("/", "ext4"),
    ("/home", "nfs4"),
    ("/home/me/fast", "xfs"),
    ("/data", "ext4"),
    ("/data", "lustre"),  # over the first one
    ("/data set", "cifs"),
]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/runs/first/ledger.db", "ext4"),
        ("/home", "nfs4"),
        ("/home/me/runs/ledger.db", "nfs4"),
        ("/home/me/fast/ledger.db", "xfs"),
        ("/home/me/faster/ledger.db", "nfs4"),
        ("/homes/ledger.db", "ext4"),
        ("/data/ledger.db", "lustre"),
        ("/data set/ledger.db", "cifs"),
        ("/runs/../home/ledger.db", "nfs4"),
    ],
)
def test_the_longest_mount_point_says_what_a_path_lies_on(path, kind):
    assert filesystem(Path(path), MOUNTS) == kind


def test_the_order_of_mounting_does_not_matter_but_at_one_place():
    assert filesystem(Path("/home/me/fast/ledger.db"), MOUNTS[::-1]) == "xfs"
    assert filesystem(Path("/data/ledger.db"), MOUNTS[::-1]) == "ext4"


def test_a_link_lies_where_it_leads(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    mounts = [("/", "ext4"), (str(tmp_path.resolve() / "shared"), "nfs")]
    assert filesystem(tmp_path / "link" / "ledger.db", mounts) == "nfs"


def test_a_path_under_no_mount_point(tmp_path):
    assert filesystem(tmp_path, [("/nowhere", "nfs")]) == ""


def test_this_machine_knows_its_own_filesystems(tmp_path):
    assert filesystem(tmp_path) in {mount.fstype for mount in psutil.disk_partitions(all=True)}


@pytest.mark.parametrize(
    "kind",
    [
        *("nfs", "nfs4", "NFS", "cifs", "smb3", "smbfs", "9p", "lustre", "ceph", "glusterfs", "gpfs", "beegfs", "afs"),
        *("fuse.sshfs", "fuse.s3fs", "fuse.glusterfs", "virtiofs", "wekafs", "ocfs2"),
        *("fuse", "FUSE", "fuse3", "osxfuse"),
    ],
)
def test_shared(kind):
    assert is_network(kind)


@pytest.mark.parametrize(
    "kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "apfs", "hfs", "fuseblk", "f2fs", "ntfs", "exfat", ""]
)
def test_local(kind):
    assert not is_network(kind)
