"""Space files that try to hurt: each is refused in words, within two seconds and little memory, and runs nothing.

Files that are hostile as YAML are tried in tests/search_spaces/test_yaml_source.py; these read well and mean harm.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from evolm.config import load_space
from search_spaces.errors import UsageError

HEAD = "version: 1\nfidelity: {tokens: 1M}\ndata: {sources: {web: {path: web}}}\n"


def constrained(text: str) -> str:
    return HEAD + f"constraints: [{text!r}]\n"


def genes(text: str) -> str:
    return HEAD + f"model: {{{text}}}\n"


HOSTILE = {
    # expressions
    "call of the system": constrained("__import__('os').system('touch owned') == 0"),
    "attributes": constrained("model.__class__.__mro__[1].__subclasses__()"),
    "lambda": constrained("(lambda: 1)() == 1"),
    "comprehension": constrained("all([x for x in model.n_heads])"),
    "format string": constrained("'{0.__class__}' == 'x'"),
    "power tower": constrained("9 ** 9 ** 9 ** 9 > 1"),
    "huge power": constrained("10 ** 100000 > 1"),
    "growing product": constrained(" * ".join(["(2 ** 900)"] * 60) + " > 0"),
    "deep brackets": constrained("(" * 900 + "1" + ")" * 900 + " > 0"),
    "deep not": constrained("not " * 450 + "true"),
    "deep minus": constrained("-" * 900 + "1 > 0"),
    "deep index": constrained("model" + "[0]" * 300 + " > 0"),
    "long sum": constrained("+".join(["1"] * 5000) + " > 0"),
    "long name": constrained("a" * 5000 + " > 0"),
    "long text": constrained("'" + "x" * 5000 + "' == 'x'"),
    "nul in text": constrained("'\\x00' == 'x'"),
    "semicolon": constrained("1 == 1; 2 == 2"),
    "assignment": constrained("params = 3"),
    "walrus": constrained("(x := 3) > 1"),
    "star": constrained("max(*model.n_heads) > 1"),
    "unclosed": constrained("max(model.n_heads"),
    "division by zero": constrained("1 / 0 > 0"),
    "nothing": constrained(""),
    "blank": constrained("   "),
    "unicode digits": constrained("params <= \u0663"),
    "look-alike name": constrained("p\u0430rams <= 3M"),
    "many constraints": HEAD + "constraints: [" + "'params > 0', " * 5000 + "]\n",
    "constraint of the wrong kind": HEAD + "constraints: [{a: 1}, 3, null]\n",
    # genes
    "list without end": genes("n_heads: {list: {int: [1, 8]}, length: 1000000000}"),
    "long list": genes("n_layers: {int: [1, 1000000000]}, n_heads: {list: {int: [1, 8]}, length: model.n_layers}"),
    "negative list": genes("n_heads: {list: {int: [1, 8]}, length: -1}"),
    "list of lists": genes("n_heads: {list: {list: {int: [1, 8]}, length: 4}, length: 4}"),
    "nested lists": genes("n_heads: " + "{list: " * 40 + "{int: [1, 2]}" + ", length: 9}" * 40),
    "gene in a choice": genes("n_heads: {choice: [{int: [1, 8]}, 2]}"),
    "many items": genes("n_heads: {choice: [" + ",".join(map(str, range(60_000))) + "]}"),
    "many genes": genes(", ".join(f"g{i}: {{int: [1, 2]}}" for i in range(3000))),
    "many parts": HEAD.replace(
        "data: {", "data: {mix: {simplex: {" + ",".join(f"d{i}: 1" for i in range(9000)) + "}}, "
    ),
    "empty choice": genes("ffn: {choice: []}"),
    "two kinds": genes("d_model: {int: [1, 2], float: [1, 2]}"),
    "all kinds": genes("d_model: {int: [1, 2], float: [1, 2], choice: [1], simplex: {a: 1}, list: {int: [1, 2]}}"),
    "huge bounds": genes("d_model: {int: [1, 9223372036854775807]}"),
    "infinite range": HEAD + "train: {learning_rate: {float: [-1.7e308, 1.7e308]}}\n",
    "logarithm of nothing": HEAD + "train: {learning_rate: {float: [0, 1], log: true}}\n",
    "reversed": genes("d_model: {int: [9, 1]}"),
    "no step": genes("d_model: {int: [1, 9], step: 0}"),
    "negative step": genes("d_model: {int: [1, 9], step: -1}"),
    "floors above one": HEAD.replace("data: {", "data: {mix: {simplex: {web: 1, code: 1}, floor: 0.9}, "),
    "negative weights": HEAD.replace("data: {", "data: {mix: {simplex: {web: -1}}, "),
    "circle": genes("d_model: {expr: model.n_heads}, n_heads: {expr: model.d_model}"),
    "circle of one": genes("d_model: {expr: model.d_model}"),
    "circle of conditions": genes(
        "d_model: {int: [1, 2], when: 'model.n_layers > 1', default: 1}, "
        "n_layers: {int: [1, 2], when: 'model.d_model > 1', default: 1}"
    ),
    "long circle": genes(", ".join(f"g{i}: {{expr: model.g{(i + 1) % 500}}}" for i in range(500))),
    "condition without default": genes("d_model: {int: [1, 2], when: 'true'}"),
    "whole recipe a gene": "version: 1\nfidelity: {tokens: 1M}\ndata: {choice: [{a: 1}, {b: 2}]}\n",
    # recipes too large to be true
    "million layers": genes("n_layers: 1000000"),
    "long recipe list": genes("n_layers: 4, n_heads: [" + "1," * 90_000 + "1]"),
    "vocabulary": HEAD.replace("data: {", "data: {tokenizer: {vocab_size: 1000T}, "),
    # other parts
    "path out of the folder": HEAD + "name: ../../etc/passwd\n",
    "name with a line end": HEAD + 'name: "a\\nb"\n',
    "domain with a path": "version: 1\nfidelity: {tokens: 1M}\ndata: {sources: {../../x: {path: web}}}\n",
    "extends itself": "extends: hostile.yaml\n" + HEAD,
    "extends a device": "extends: /dev/zero\n" + HEAD,
    "extends a folder": "extends: /\n" + HEAD,
    "extends the passwords": "extends: /etc/passwd\n" + HEAD,
    "extends a list": "extends: [a, b]\n" + HEAD,
    "version of a dream": HEAD.replace("version: 1", "version: [1]"),
    "seed without end": HEAD + "search: {seed: 9223372036854775807}\n",
    "algorithm with a path": HEAD + "search: {algorithm: ../../evil}\n",
    "algorithm that is a list": HEAD + "search: {algorithm: [random]}\n",
    "trials without end": HEAD + "budget: {trials: -1}\n",
    "hours that are no number": HEAD + "budget: {hours: soon}\n",
    "rungs downwards": HEAD.replace("1M", "[4M, 1M]"),
    "no rungs": HEAD.replace("1M", "[]"),
    "objectives that are a list": HEAD + "objectives: [a, b]\n",
    "objective of everything": HEAD + "objectives: {" + ", ".join(f"m{i}: min" for i in range(2000)) + "}\n",
    "target of nobody": HEAD + "target: {nobody: 1}\n",
    "target that is a number": HEAD + "target: 5\n",
    "baselines without end": HEAD + "baselines: [" + "{model: {d_model: 7}}, " * 3000 + "]\n",
    "baselines of the wrong kind": HEAD + "baselines: [1, [2], x]\n",
    "command that is text": HEAD + "trial: {command: 'rm -rf /'}\n",
    "command of nothing": HEAD + "trial: {command: []}\n",
    "sections that are lists": "version: 1\nfidelity: [1]\ndata: [1]\nmodel: [2]\ntrain: [3]\n",
    "sections that are text": "version: 1\nfidelity: x\ndata: x\nmodel: x\ntrain: x\nbudget: x\nsearch: x\n",
    "many unknown keys": HEAD + "".join(f"unknown_{i}: 1\n" for i in range(20_000)),
}


def test_there_are_a_hundred_hostile_files_in_all() -> None:
    from tests.search_spaces.test_yaml_source import HOSTILE as YAML

    assert len(YAML) + len(HOSTILE) >= 100


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_space_is_refused_soon_and_in_words(text: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(UsageError) as refused:
        load_space(path)
    assert time.process_time() - began < 2, "seconds of processor time"
    words = str(refused.value)
    assert words.startswith(str(tmp_path)) or words.startswith("/etc/passwd:"), words[:200]
    assert len(words) < 50_000


READ_ALL = """
import sys
from pathlib import Path
from evolm.config import load_space
from search_spaces.errors import UsageError
def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024
before = peak()
for name in sys.argv[1:]:
    try:
        load_space(Path(name))
        print("accepted", name)
    except UsageError:
        pass
print(peak() - before)
"""


def test_all_of_them_take_little_memory_and_write_nothing(tmp_path: Path) -> None:
    for number, text in enumerate(HOSTILE.values()):
        (tmp_path / f"{number}.yaml").write_text(text)
    names = sorted(path.name for path in tmp_path.iterdir())
    command = [sys.executable, "-c", READ_ALL, *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 300, "megabytes"
    assert sorted(path.name for path in tmp_path.iterdir()) == names
