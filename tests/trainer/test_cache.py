"""Guards the cache of corpora: built once, seen whole or not at all, whoever else builds or dies meanwhile."""

import subprocess
import sys
from pathlib import Path

import pytest

import trainer
from trainer.data.cache import cached_folder, digest_of

BUILDER = """
import sys
from pathlib import Path
from trainer.data.cache import cached_folder

cache, name = Path(sys.argv[1]), sys.argv[2]

def build(folder):
    print("building", flush=True)
    sys.stdin.readline()
    with (cache / "built-by").open("a") as stream:
        stream.write(name)
    (folder / "content").write_text(name)

print("asking", flush=True)
print(cached_folder(cache, "things", "key", build).joinpath("content").read_text(), flush=True)
"""


def fill(folder):
    (folder / "content").write_text("content")


def entries(cache):
    """What a reader of the cache can see."""
    return sorted(str(path.relative_to(cache)) for path in (cache / "things").rglob("*"))


# --- digests ----------------------------------------------------------------------------------------------------------


def test_a_digest_is_128_bits_and_depends_on_every_part():
    assert len(digest_of("a", 1)) == 32
    assert len({digest_of("a", 1), digest_of("a", 2), digest_of("b", 1), digest_of("a"), digest_of(["a", 1])}) == 5


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


# --- one process ------------------------------------------------------------------------------------------------------


def test_a_folder_is_built_once(tmp_path):
    built = []

    def build(folder):
        built.append(folder)
        fill(folder)

    first, second = (cached_folder(tmp_path, "things", "key", build) for _ in range(2))
    assert first == second == tmp_path / "things" / "key"
    assert (first / "content").read_text() == "content"
    assert len(built) == 1
    assert entries(tmp_path) == ["things/key", "things/key/content", "things/key/contents.json"]


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: file.write_text("cont")])
@pytest.mark.parametrize("name", ["content", "contents.json"])
def test_a_folder_that_is_not_whole_any_more_is_built_again(tmp_path, name, harm):
    folder = cached_folder(tmp_path, "things", "key", fill)
    if name == "contents.json":
        harm = lambda file: file.write_text("{")  # noqa: E731  # without that file, a folder is taken as it is
    harm(folder / name)
    again = cached_folder(tmp_path, "things", "key", fill)
    assert again == folder and (folder / "content").read_text() == "content"


def test_other_keys_and_kinds_are_other_folders(tmp_path):
    folders = {cached_folder(tmp_path, kind, key, fill) for kind in ("things", "others") for key in ("one", "two")}
    assert len(folders) == 4


def test_a_folder_is_not_seen_before_it_is_whole(tmp_path):
    def build(folder):
        fill(folder)
        assert folder != tmp_path / "things" / "key"
        assert not (tmp_path / "things" / "key").exists()

    cached_folder(tmp_path, "things", "key", build)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_nothing_and_can_be_tried_again(tmp_path, error):
    def fail(folder):
        fill(folder)
        raise error

    with pytest.raises(error):
        cached_folder(tmp_path, "things", "key", fail)
    assert entries(tmp_path) == []
    cached_folder(tmp_path, "things", "key", fill)
    assert entries(tmp_path) == ["things/key", "things/key/content", "things/key/contents.json"]


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def builder(tmp_path):
    """Start a process that wants the folder; its build goes on when it is sent a line."""
    started = []

    def start(name):
        process = subprocess.Popen(
            [sys.executable, "-c", BUILDER, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(trainer.__file__).parents[1],
        )
        started.append(process)
        assert process.stdout.readline() == "asking\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_processes_that_want_the_same_folder_wait_for_the_one_that_builds_it(builder, tmp_path):
    first = builder("first")
    assert first.stdout.readline() == "building\n"
    others = [builder("second"), builder("third")]
    assert first.communicate("go on\n")[0] == "first\n"
    assert [other.communicate("never read\n")[0] for other in others] == ["first\n", "first\n"]
    assert (tmp_path / "built-by").read_text() == "first"


def test_a_process_that_is_killed_while_it_builds_holds_nobody_up(builder, tmp_path):
    first = builder("first")
    assert first.stdout.readline() == "building\n"
    second = builder("second")
    first.kill()
    assert second.stdout.readline() == "building\n"
    assert second.communicate("go on\n")[0] == "second\n"
    assert (tmp_path / "built-by").read_text() == "second"
