"""pyens._library: what happens when the extension is missing, broken, or built for another torch."""

import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo

import pyens
from pyens import _library

PACKAGE = Path(pyens.__file__).parent
LIBRARY = Path(_library._C.__file__)
COMMANDS = ("pip install --no-build-isolation --force-reinstall --no-deps .", "make build")


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of pyens; its extension is a link to the real one."""
    copy = tmp_path / "pyens"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", LIBRARY.name))
    (copy / LIBRARY.name).symlink_to(LIBRARY)
    return copy


def python(package: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code that imports this copy of pyens."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYENS_CPU_CAPABILITY"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        env={**inherited, "PYTHONPATH": str(package.parent), **environment},
        capture_output=True,
        text=True,
    )


def import_error(package: Path) -> str:
    """The message of the ImportError that `import pyens` ends in."""
    result = python(package, "import pyens")
    assert result.returncode == 1
    _, marker, message = result.stderr.rpartition("\nImportError: ")
    assert marker, result.stderr
    assert all(command in message for command in COMMANDS)
    return message


def test_the_copy_itself_works(package):
    result = python(package, "import pyens; print(pyens.__file__)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(package / "__init__.py")


def test_modules_are_there_without_an_import_of_their_own(package):
    public = sorted(
        m.name for m in pkgutil.iter_modules([str(PACKAGE)]) if m.name not in ("demo",) and m.name[0] != "_"
    )
    code = (
        "import sys, pyens\n"
        "heavy = ('sklearn', 'matplotlib', 'pandas', 'pyens.training', 'pyens.metrics', 'pyens.plots')\n"
        "assert not [name for name in heavy if name in sys.modules]\n"
        f"for name in {public}:\n"
        "    assert name in dir(pyens), name\n"
        "    assert getattr(pyens, name).__name__ == f'pyens.{name}'\n"
        "assert pyens.optim.fused and pyens.nn.EnsembleMLP is pyens.EnsembleMLP\n"
        "assert not hasattr(pyens, 'demos')\n"
    )
    assert len(public) > 10
    result = python(package, code)
    assert result.returncode == 0, result.stderr


def test_star_imports_bring_what_is_public():
    for module in pkgutil.iter_modules([str(PACKAGE)]):
        if module.name not in ("demo",) and module.name[0] != "_" and module.name != "select":
            names = importlib.import_module(f"pyens.{module.name}").__all__
            assert names, module.name
            for name in names:
                public = getattr(importlib.import_module(f"pyens.{module.name}"), name)
                assert getattr(public, "__module__", "pyens").startswith("pyens"), name


def test_sources_that_hide_an_installed_pyens_say_so(package, tmp_path):
    """A checkout is first on the path of a Python that is started in it."""
    installed = tmp_path / "site-packages"
    shutil.copytree(package, installed / "pyens", symlinks=True)
    (package / "_C.build.json").unlink()
    paths = os.pathsep.join([str(package.parent), str(installed)])
    result = python(package, "import pyens", PYTHONPATH=paths)
    assert result.returncode == 1
    for text in (f"the sources in {package.resolve()}", f"installed in {installed.resolve() / 'pyens'}"):
        assert text in result.stderr
    elsewhere = python(installed / "pyens", "import pyens", PYTHONPATH=str(installed))
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert "hide" not in import_error(package)


def test_another_torch(package):
    record = package / "_C.build.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "torch": "2.11.0+other"}))
    message = import_error(package)
    assert "2.11.0+other" in message and torch.__version__ in message


def test_not_built(package):
    (package / "_C.build.json").unlink()
    (package / LIBRARY.name).unlink()
    assert "pyens._C is not built" in import_error(package)


def test_library_missing(package):
    (package / LIBRARY.name).unlink()
    message = import_error(package)
    assert "No module named 'pyens._C'" in message and "does not load" in message


def test_library_broken(package):
    (package / LIBRARY.name).unlink()
    (package / LIBRARY.name).write_bytes(b"not a library" * 100)
    assert "does not load" in import_error(package)


CAPABILITIES = ["base", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16"]


def test_build_info():
    info = pyens.build_info()
    assert info["version"] == pyens.__version__
    assert info["torch"] == torch.__version__
    assert info["python"] == ".".join(map(str, sys.version_info[:2]))
    assert info["cpu_capability"] in CAPABILITIES
    assert info["cuda"] == "yes" or info["cuda"].startswith(("no: ", "built, but "))
    assert info["threads"] == torch.get_num_threads()


def test_cpu_capability_caps_the_instruction_set(package):
    code = "import pyens; print(pyens.build_info()['cpu_capability'])"
    processor = python(package, code, PYENS_CPU_CAPABILITY="").stdout.strip()
    for cap in CAPABILITIES[: CAPABILITIES.index(processor) + 1]:
        used = python(package, code, PYENS_CPU_CAPABILITY=cap).stdout.strip()
        # AVX-VNNI is not part of what comes after it.
        assert used == cap or (cap, used) == ("avx_vnni", "avx2")
    # A cap, not a command: what the processor does not have is never run.
    assert python(package, code, PYENS_CPU_CAPABILITY="avx512_bf16").stdout.strip() == processor


def test_unknown_cpu_capability(package):
    code = """
import torch, pyens
message = (
    "PYENS_CPU_CAPABILITY: expected one of base, avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16, "
    "got nonsense"
)
x, weights = torch.randn(2, 3), [torch.randn(4, 5, 3)]
model = pyens.EnsembleMLP(2, 3, [4], 1)
for call in (
    pyens.build_info,
    lambda: pyens.ops.ensemble_mlp(x, weights),
    lambda: torch.ops.pyens.ensemble_mlp(x, weights, [], [], [], "relu"),
    lambda: model(x),
    model.packed,
):
    try:
        call()
    except ValueError as error:
        assert str(error).startswith(message), error
    else:
        raise SystemExit("nothing raised")
print("all raised")
"""
    result = python(package, code, PYENS_CPU_CAPABILITY="nonsense")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "all raised"


def test_tangents_have_the_dtype_of_autocast():
    model, x = pyens.EnsembleMLP(3, 8, [4], 1), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output, tangent = torch.func.jvp(model, (x,), (x,))
    assert output.dtype == tangent.dtype == torch.bfloat16
    torch.testing.assert_close(tangent.float(), torch.func.jvp(model, (x,), (x,))[1], rtol=5e-2, atol=5e-2)


def test_torch_func_in_compiled_code_is_named_or_runs_eagerly():
    model, x = pyens.EnsembleMLP(3, 8, [4], 1), torch.randn(5, 8)

    def gradient(x):
        return torch.func.grad(lambda x: model(x).square().sum())(x)

    torch._dynamo.reset()
    compiled = torch.compile(gradient, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, gradient(x))
    torch._dynamo.reset()
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"ensemble_mlp: expected torch.func in eager code"
    ):
        torch.compile(gradient, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
