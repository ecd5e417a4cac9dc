"""What `make` does before there is an environment, in folders with names hard on shells."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_environment_is_made_in_a_folder_whose_name_has_spaces_and_umlauts(tmp_path):
    folder = tmp_path / "Übung (zwei) $5 'a'"
    bin_folder = folder / ".venv/bin"
    bin_folder.mkdir(parents=True)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("pip", "python"):
        (bin_folder / name).write_text("#!/bin/sh\n")
    said = '#!/bin/sh\nprintf "%s\\n" "$PREFECT_HOME" "$PREFECT_API_DATABASE_CONNECTION_URL"\n'
    (bin_folder / "prefect").write_text(said)
    for file in bin_folder.iterdir():
        file.chmod(0o755)
    done = subprocess.run(["make", "install"], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / ".kd/prefect.log").read_text().splitlines() == [
        f"{folder}/.kd/prefect",
        f"sqlite+aiosqlite:///{folder}/.kd/prefect/prefect.db",
    ]


def test_the_environments_python_is_the_first_that_runs(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name, status in (("python3.11", 127), ("python3.12", 0), ("python3", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    make = ["/usr/bin/env", f"PATH={tmp_path}", shutil.which("make"), "--dry-run", "install"]
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{tmp_path}/python3.12 -m venv --clear .venv" in done.stdout


def test_a_clone_named_kd_is_imported_from_the_folder_it_lies_in(tmp_path):
    clone, prefix = tmp_path / "kd", tmp_path / "prefix"
    for name in ("kd", "flows"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, clone)
    (options,) = re.findall(r"^EDITABLE := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-build-isolation", "--prefix", str(prefix), *options.split(), "."]
    pip += ["--ignore-installed"]  # or it would uninstall what this environment has
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run(pip, cwd=clone, env=environment, check=True)
    (site,) = prefix.glob("lib/python*/site-packages")
    program = f"import site; site.addsitedir({str(site)!r}); import kd; print(kd.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(clone / "kd/__init__.py"), done.stderr
    assert version("kd"), "this environment keeps its own"


def test_a_wheel_holds_every_module_and_says_its_version(tmp_path):
    tree = tmp_path / "tree"
    for name in ("kd", "flows"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(tree)]
    subprocess.run(pip, env={**os.environ, "PYTHONWARNINGS": "ignore"}, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    ours = {str(path.relative_to(ROOT)) for path in ROOT.glob("[kf]*/**/*.py")}
    held = {each for each in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in each}
    assert held == ours | {"kd/py.typed"}
    shown = subprocess.run(
        [sys.executable, "-m", "kd", "--version"],
        env={**os.environ, "PYTHONPATH": str(wheel)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.split() == ["kd", wheel.name.split("-")[1]]


def test_clean_takes_only_what_can_be_made_again_and_nobody_uses(tmp_path):
    folder = tmp_path / "with spaces"
    seed = "compare/digits/seed-0/.kd"
    going = ["checkpoints/weights/a.log", "targets/.b.npy.1.tmp", f"{seed}/targets/c.npy"]
    staying = ["mlflow.db", "mlruns/1/checkpoints/model", "prefect/prefect.db", "flow.lock"]
    staying += ["stack/supervisord.pid", "stack/artifacts/targets/x", "targets/b.lock"]
    staying += [f"{seed}/mlflow.db", "machine/speed/a.json", "warm.log"]
    used = ["checkpoints/student/d.safetensors"]
    for name in [*going, *staying, *used]:
        path = folder / ".kd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if name not in used:
            os.utime(path, (0, 0))
    shutil.copy(ROOT / "Makefile", folder)
    done = subprocess.run(["make", "clean"], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    left = {path for path in (folder / ".kd").rglob("*") if path.is_file()}
    assert left == {folder / ".kd" / name for name in [*staying, *used]}
    shutil.rmtree(folder / ".kd")
    subprocess.run(["make", "clean"], cwd=folder, check=True)
