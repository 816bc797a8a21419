"""The house itself: what is installed, what a bare machine can import, what a bug report says."""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fwpkm_kernels
from fwpkm_kernels import env_report

ROOT = Path(__file__).resolve().parent.parent

# Makes packages look as if they were not installed: find_spec answers None, import raises ModuleNotFoundError.
HIDE = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def run_hidden(code: str, *hidden: str, cwd: Path = ROOT, **environment: str) -> str:
    """Run code in a new Python that cannot find the hidden packages; its standard output."""
    script = f"HIDDEN = {hidden!r}\n{HIDE}\n{code}"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_cpu_path_works_without_triton():
    run_hidden(
        """
import importlib.util
import torch
import fwpkm_kernels as fwpkm
assert importlib.util.find_spec("triton") is None
queries, keys = torch.randn(5, 1, 6), torch.randn(1, 2, 4, 3)
scores, slots = fwpkm.product_key_lookup(queries, keys, 2)
values = torch.randn(16, 7, requires_grad=True)
weights = scores.flatten(1).softmax(-1)
out = fwpkm.sparse_value_gather(values, slots.flatten(1), weights)
new = fwpkm.chunk_value_update(values, slots.flatten(1), weights, torch.randn(5, 7), out)
new.sum().backward()
try:
    fwpkm.product_key_lookup(queries, keys, 2, backend="triton")
except (ImportError, ValueError) as error:
    assert "triton" in str(error), error
else:
    raise AssertionError("backend='triton' ran without Triton")
""",
        "triton",
    )


def test_layers_need_no_transformers():
    hidden = ("transformers", "fla", "safetensors", "tokenizers", "accelerate")
    run_hidden("import fwpkm_kernels.layers, fwpkm_kernels.integrations, fwpkm_kernels.integrations.fla", *hidden)


def test_import_asks_for_no_gpu():
    run_hidden("import torch, fwpkm_kernels; assert not torch.cuda.is_initialized()")


def test_env_report_runs_on_a_bare_machine():
    code = "from fwpkm_kernels import env_report; assert env_report.main(['--json']) == 0"
    report = json.loads(run_hidden(code, "triton", CUDA_VISIBLE_DEVICES="", TRITON_CACHE_DIR="somewhere"))
    assert report["triton"] is None
    assert report["gpus"] == []
    assert report["environment"]["TRITON_CACHE_DIR"] == "somewhere"


def test_env_report_text_and_collect(capsys):
    report = env_report.collect()
    assert report == json.loads(json.dumps(report))
    assert report["fwpkm_kernels"] == fwpkm_kernels.__version__
    assert report["torch"]["version"] == torch.__version__
    assert report["auto_backend"]["cpu_tensors"] == "torch"
    assert env_report.main([]) == 0
    text = capsys.readouterr().out
    assert set(re.findall(r"^(\w+):", text, re.M)) == set(report)
    assert f"  version: {torch.__version__}\n" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_env_report_shows_what_it_is_about(monkeypatch, encoding, arguments):
    """Any bytes that a variable may have, and any lines; the streams of the caller are left alone."""
    place = os.fsdecode("/tmp/josé/ł".encode() + b"/\xe9\n/x")
    monkeypatch.setenv("TRITON_CACHE_DIR", place)
    monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), encoding, "strict"))
    assert env_report.main(arguments) == 0
    assert sys.stdout is out
    text = out.buffer.getvalue().decode(encoding)
    if arguments:
        assert json.loads(text)["environment"]["TRITON_CACHE_DIR"] == place
    else:
        shown = "/tmp/josé/ł/\udce9\\n/x".encode(encoding, "backslashreplace").decode(encoding)
        assert f"  TRITON_CACHE_DIR: {shown}\n" in text


def test_env_report_where_the_current_folder_is_gone(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    (tmp_path / "gone").rmdir()
    assert env_report.main([]) == 0
    assert capsys.readouterr().out.startswith("fwpkm_kernels: ")


def test_env_report_takes_any_answer_of_a_command():
    say = "import sys; sys.stdout.buffer.write(b'caf\\xe9 ')"
    assert env_report._run(sys.executable, "-c", say) == "caf\\xe9"
    assert env_report._run(sys.executable, "-c", "raise SystemExit(1)") is None
    assert env_report._run("no such command") is None


def test_a_copy_under_another_name_uses_itself(tmp_path):
    """As a project does that carries its own copy; the programs go by its name."""
    shutil.copytree(
        ROOT / "fwpkm_kernels", tmp_path / "vendored" / "memory", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = """
import contextlib, io, json, runpy
from vendored.memory import env_report
from vendored.memory.demo import memory
assert "vendored.memory" in env_report.collect()
with contextlib.redirect_stdout(io.StringIO()) as out:
    assert env_report.main([]) == 0
assert out.getvalue().startswith("vendored.memory: "), out.getvalue()
for name in ("vendored.memory.demo", "vendored.memory.env_report"):
    del sys.modules[name]
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_module(name, run_name="__main__")
    assert out.getvalue().startswith(f"usage: python -m {name} "), out.getvalue()
options = memory.Options(device="cpu", sub_keys=16, query_width=32, value_width=16, chunk_size=64)
memory.set_up(options, "plain")
assert memory.MemoryState.__module__.startswith("vendored.memory.")
assert not [name for name in sys.modules if name.startswith("fwpkm_kernels")]
"""
    run_hidden(code, cwd=tmp_path)


def imported(tree: ast.AST) -> Iterator[str]:
    """The full names of all that is imported in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def test_files_can_be_read_at_a_sitting():
    """At most 450 lines, of a test module 600; the table of planted faults is data."""
    limits = {"fwpkm_kernels": 450, "reference": 450, "benchmarks": 450, "tests": 600}
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for folder, limit in limits.items()
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text("utf-8").splitlines())) > limit and path != ROOT / "tests" / "faults.py"
    ]
    assert not long


def test_nothing_is_imported_from_a_test_module():
    """What two of them share stands in tests/helpers, where it has a name and a reader finds it."""
    assert list(imported(ast.parse("from tests import test_a\ndef f():\n    from .test_b import c"))) == [
        "tests.test_a",
        ".test_b.c",
    ]
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("fwpkm_kernels", "benchmarks", "reference", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for name in imported(ast.parse(path.read_text("utf-8")))
        if re.match(r"(tests\.|\.+)test_", name)
    ]
    assert not found


def names_in_the_tree(text: str) -> Iterator[str]:
    """The paths, perhaps with a *, that a tree names: folders end in a slash, what is in them is indented by two."""
    folders: list[str] = []
    for line in filter(None, text.splitlines()):
        indent = len(line) - len(line.lstrip())
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        folders = folders[: indent // 2]
        if names[0].endswith("/"):
            folders.append(names[0])
        yield from ("".join(folders) if name.endswith("/") else "".join(folders) + name for name in names)


def test_the_tree_in_design_is_the_project():
    """An `__init__.py` needs no line: most of them only export what their folder offers."""
    assert list(names_in_the_tree("a/\n  b.py, c.py     d, e\n  f/    g\nh.py")) == [
        *("a/", "a/b.py", "a/c.py", "a/f/", "h.py"),
    ]
    text = (ROOT / "DESIGN.md").read_text("utf-8")
    tree = text[text.index("## The tree") :].split("```")[1]
    named = {name: set(ROOT.glob(name)) for name in names_in_the_tree(tree)}
    assert {name for name, paths in named.items() if not paths} <= LEFT_OUT
    folders = ("fwpkm_kernels", "reference", "benchmarks", "tests")
    modules = {path for folder in folders for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"}
    lacking = modules - set().union(*named.values())
    assert not lacking


DRIVER_LINES = [
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024",
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (builder@host)",
]


class FakeProperties:
    name, major, minor, total_memory, multi_processor_count = "NVIDIA H100", 9, 0, 80 * 2**30, 132


def test_env_report_lists_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: FakeProperties)
    monkeypatch.setattr(env_report, "_read", lambda path: DRIVER_LINES[0] if "nvidia" in path else "")
    report = env_report.collect()
    gpu = {"name": "NVIDIA H100", "capability": "9.0", "memory_gib": 80.0, "multiprocessors": 132}
    assert report["gpus"] == [gpu, gpu]
    assert report["driver"] == "550.54.15"
    assert env_report.main([]) == 0
    assert "  1:\n    name: NVIDIA H100\n    capability: 9.0\n" in capsys.readouterr().out


@pytest.mark.parametrize("line", DRIVER_LINES)
def test_env_report_reads_the_driver_version(monkeypatch, line):
    monkeypatch.setattr(env_report, "_read", lambda path: line if "nvidia" in path else "")
    assert env_report._driver() == "550.54.15"


def test_env_report_survives_a_broken_import(monkeypatch, tmp_path):
    (tmp_path / "broken_module_of_this_test.py").write_text("raise OSError('libfoo.so not found')")
    monkeypatch.syspath_prepend(tmp_path)
    assert env_report._version("broken_module_of_this_test") == "import failed: OSError: libfoo.so not found"
    assert env_report._version("absent_module_of_this_test") is None


def test_env_report_commit(monkeypatch, tmp_path):
    git = shutil.which("git")
    if git is None:
        pytest.skip("needs git")
    # An installed copy below another project's checkout must not report that project's commit.
    inner = tmp_path / "site-packages" / "fwpkm_kernels"
    inner.mkdir(parents=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    subprocess.run([git, "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([git, "-C", str(tmp_path), "add", "file"], check=True)
    subprocess.run([git, "-C", str(tmp_path), *identity, "commit", "-qm", "x"], check=True)
    monkeypatch.setattr(env_report, "__file__", str(inner / "env_report.py"))
    monkeypatch.delenv("FWPKM_COMMIT", raising=False)
    assert env_report._commit() is None
    monkeypatch.setenv("FWPKM_COMMIT", "a copy's")
    assert env_report._commit() == "a copy's"
    monkeypatch.delenv("FWPKM_COMMIT")
    monkeypatch.setattr(env_report, "__file__", str(tmp_path / "fwpkm_kernels" / "env_report.py"))
    commit = env_report._commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "file").write_text("2")
    assert env_report._commit() == f"{commit}-dirty"
    monkeypatch.setenv("FWPKM_COMMIT", "that of a copy which is built in place")
    assert env_report._commit() == "that of a copy which is built in place"


def test_setup_installs_only_the_package(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("fwpkm_kernels", "reference", "tests", "benchmarks"):
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "golden")
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
            (tmp_path / name / "__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    # It must build where nothing is installed yet.
    run_hidden(
        "sys.argv = ['setup.py', '-q', 'bdist_wheel']; import runpy; runpy.run_path('setup.py', run_name='__main__')",
        *("torch", "triton", "numpy", "fwpkm_kernels"),
        cwd=tmp_path,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        info = f"fwpkm_kernels-{fwpkm_kernels.__version__}.dist-info"
        about = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert {name.split("/")[0] for name in files} == {"fwpkm_kernels", info}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fwpkm_kernels").rglob("*.py")}
    assert sources | {"fwpkm_kernels/py.typed"} <= set(files)
    assert about["Version"] == fwpkm_kernels.__version__
    assert about["Requires-Python"] == ">=3.10"
    assert about["License-Expression"] == "MIT"
    needed = sorted(text for text in about.get_all("Requires-Dist") if "extra ==" not in text)
    assert needed == ["numpy", "torch>=2.8"]  # no Triton: torch brings the one that fits it, or has no use for any
    assert {"dev", "bench", "demo", "triton"} <= set(about.get_all("Provides-Extra"))
    for extra in ("triton", "dev"):
        text = f'triton>=3.4; platform_system == "Linux" and extra == "{extra}"'
        assert text in [re.sub("[()]", "", text) for text in about.get_all("Requires-Dist")]


#: What nobody needs who has no git.
LEFT_OUT = {".gitignore"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The sdist of the project's files as they are now, built where other files lie around."""
    pytest.importorskip("setuptools", minversion="77")
    mutations = pytest.importorskip("tests.mutations", reason="needs tqdm")
    folder = tmp_path_factory.mktemp("sdist")
    try:
        mutations.copy_checkout(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git does not say which files are the project's: {error}")
    junk = ["tests/__pycache__/test_x.pyc", "fuzz-failures/x.py", "gpu-results/results.jsonl", ".venv/x.py", "demo.png"]
    junk += ["benchmarks/results/errors_cpu.jsonl", "fwpkm_kernels/__pycache__/x.pyc", "build/lib/fwpkm_kernels/x.py"]
    junk += [f"tests/{name}/x.py" for name in (".venv", ".hypothesis", "fuzz-failures")]
    for name in junk:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    run_hidden(
        "sys.argv = ['setup.py', '-q', 'sdist']; import runpy; runpy.run_path('setup.py', run_name='__main__')",
        *("torch", "triton", "numpy", "fwpkm_kernels"),
        cwd=folder,
    )
    (path,) = (folder / "dist").glob("*.tar.gz")
    return path


def test_the_sdist_holds_the_project_and_nothing_else(sdist):
    from tests.mutations import project_files

    project = set(project_files())
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert project - packed <= LEFT_OUT
    made = {name for name in packed - project if not name.startswith("fwpkm_kernels.egg-info/")}
    assert made <= {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_the_tests_run_in_an_unpacked_sdist(sdist, tmp_path):
    """All are found there, and some that read other files of the project pass."""
    shutil.unpack_archive(sdist, tmp_path)
    (root,) = tmp_path.iterdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def pytest_there(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "error" not in pytest_there("--collect-only").splitlines()[-1]
    names = "no_golden_file or every_kernel_is_listed or committed_table or installs_only or (test_plan and torch)"
    files = ("golden_chunk", "compiled", "house", "plan")
    pytest_there("-k", names, *(f"tests/test_{name}.py" for name in files))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_that_make_installs_is_pinned():
    if Path(sys.prefix) != ROOT / ".venv" or not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("not the environment that make created")
    packaging = pytest.importorskip("packaging.requirements")
    pins = set()
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = packaging.Requirement(line)
            assert re.fullmatch(r"==[^,*]+", str(pin.specifier)), line
            if pin.marker is None or pin.marker.evaluate():
                assert canonical(pin.name) not in pins, f"two pins for {pin.name} on this Python"
                pins.add(canonical(pin.name))
    todo = {("fwpkm_kernels", extra) for extra in ("", "dev", "bench")}
    seen = set()
    while todo:
        name, extra = todo.pop()
        seen.add((name, extra))
        for text in metadata.requires(name) or []:
            need = packaging.Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                todo |= {(need.name, one) for one in ("", *need.extras)} - seen
    loose = {canonical(name) for name, _ in seen} - pins - {"fwpkm-kernels"}
    assert not loose, f"not in constraints.txt: {loose}"


@pytest.mark.parametrize("page", ["README.md", "docs/layers.md", "docs/memory.md"])
def test_the_examples_of_the_documents_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        exec(block, names)
        memory = names.get("fast")
        keys, values = (names["keys"], names["values"]) if memory is None else (memory.keys, memory.table.weight)
        assert keys.grad.count_nonzero() > 0
        assert values.grad.count_nonzero() > 0
