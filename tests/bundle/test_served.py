"""Exports in MLflow: each a model of its own that runs the real file, also behind a server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kd import tracking
from kd.exporters import ExecuTorch, LiteRT, Onnx
from tests.bundle.toys import CLASSES, bundled
from tests.test_tracking import SOURCES

pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17 with SQLAlchemy 2.1, in the client that these tests look at the store with.
    "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"
)


def log(one, val_accuracy, example):
    """Log a bundle in a run of its own, as the exports stage does."""
    params, tags = {"seed": 0}, {"kd.role": "exports"}
    with tracking.run("exports", one.folder.name, params=params, tags=tags) as run:
        run.log_export(
            one.folder,
            registered_name="kd-toy",
            metrics={"val_accuracy": val_accuracy, "size_mb": 0.01},
            val_hash="v" * 64,
            example=example,
        )
    assert run.error is None
    return run.id


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A store with a registered student and two of its exports."""
    root = tmp_path_factory.mktemp("served")
    (root / "dvc.yaml").write_text("stages: {}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("KD_RECORDER_IDLE", "20")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        one = bundled(root, Onnx())
        with tracking.run("student", None, params={}, tags={}) as run:
            run.log_model(
                root / "student",
                registered_name="kd-toy",
                val_accuracy=0.75,
                val_hash="v" * 64,
                example=one.images_NHWC[:2],
            )
            version = run.registered("kd-toy", one.student.sha256)
            assert run.promote("kd-toy", version, None, "champion: the first of its name", True)
        exported = log(one, 0.75, one.images_NHWC[:2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of MLflow's many dependencies
            import mlflow
        client = mlflow.MlflowClient(tracking.tracking_uri())
        yield SimpleNamespace(root=root, client=client, onnx=one, student=run.id, run=exported)


@pytest.fixture
def in_home(home, monkeypatch):
    monkeypatch.chdir(home.root)
    return home


def champion(home):
    return home.client.get_model_version_by_alias("kd-toy", "champion")


def exports_of(home):
    found = home.client.search_logged_models(["1"], "tags.`kd.export` LIKE '%'")
    return {model.tags["kd.export"]: model for model in found}


def test_the_champion_points_at_its_export_which_stands_below_the_students_run(in_home):
    tags = champion(in_home).tags
    model = in_home.client.get_logged_model(tags["kd.export.onnx"].removeprefix("models:/"))
    assert model.source_run_id == in_home.student
    assert tags["kd.export.onnx.sha256"] == in_home.onnx.parity["sha256"]
    assert model.tags["kd.student_sha256"] == in_home.onnx.student.sha256
    assert model.status == "READY"


def test_the_run_that_exported_shows_the_model(in_home):
    made = in_home.client.get_run(in_home.run).outputs.model_outputs
    assert [each.model_id for each in made] == [exports_of(in_home)["onnx"].model_id]


def test_an_exports_metrics_are_its_models_on_the_validation_images(in_home):
    model = exports_of(in_home)["onnx"]
    found = {metric.key: metric for metric in model.metrics}
    assert {key: metric.value for key, metric in found.items()} == {
        "val_accuracy": 0.75,
        "size_mb": 0.01,
    }
    assert found["val_accuracy"].dataset_digest == "v" * 36
    assert found["val_accuracy"].run_id == in_home.run


def test_the_student_has_the_figure_that_its_exports_are_compared_with(in_home):
    (student,) = in_home.client.search_logged_models(["1"], "name = 'student'")
    assert [(each.key, each.value) for each in student.metrics] == [("val_accuracy", 0.75)]


def test_the_same_bundle_is_logged_once_and_its_metrics_are_the_last(in_home):
    before = exports_of(in_home)["onnx"].model_id
    log(in_home.onnx, 0.5, in_home.onnx.images_NHWC[:2])
    found = in_home.client.search_logged_models(["1"], "tags.`kd.export` = 'onnx'")
    assert [model.model_id for model in found] == [before]


def test_an_export_of_a_student_that_is_not_registered_stands_below_its_own_run(in_home, tmp_path):
    other = bundled(tmp_path, Onnx(), "lonely", seed=1)
    run_id = log(other, 0.1, other.images_NHWC[:2])
    assert exports_of(in_home)["lonely"].source_run_id == run_id
    assert "kd.export.lonely" not in champion(in_home).tags


LOAD = """
import json, sys
class Gate:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("kd", "torch"):
            raise ImportError("not needed: " + name)
sys.meta_path.insert(0, Gate())
import mlflow, numpy
model = mlflow.pyfunc.load_model(sys.argv[1])
found = model.predict(numpy.load(sys.argv[2]))
signature = model.metadata.signature
print(json.dumps({
    "label": found["label"].tolist(),
    "example": model.predict(model.input_example)["probabilities"].tolist(),
    "outputs": signature.outputs.to_dict(), "inputs": signature.inputs.to_dict(),
}))
"""


def test_mlflow_runs_the_real_file_without_kd_and_torch(in_home, tmp_path):
    np.save(tmp_path / "images.npy", in_home.onnx.images_NHWC)
    uri = champion(in_home).tags["kd.export.onnx"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, uri, str(tmp_path / "images.npy")],
        env={**os.environ, "MLFLOW_TRACKING_URI": tracking.tracking_uri(), "PYTHONPATH": ""},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = in_home.onnx.logits_NC.argmax(1)
    assert found["label"] == [CLASSES[index] for index in expected]
    assert len(found["example"]) == 2
    assert [output["name"] for output in found["outputs"]] == ["label", "probabilities"]
    assert found["inputs"][0]["tensor-spec"] == {"dtype": "uint8", "shape": [-1, 8, 8, 3]}


@pytest.fixture
def server(in_home, tmp_path):
    """Starts `mlflow models serve` on a model; its address."""
    started = []

    def start(uri):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", uri,
                   "--port", str(port), "--env-manager", "local"]  # fmt: skip
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": tracking.tracking_uri(),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": SOURCES,
        }
        with (tmp_path / "server.log").open("wb") as said:
            process = subprocess.Popen(
                command, env=environment, stdout=said, stderr=said, cwd=tmp_path,
                start_new_session=True,
            )  # fmt: skip
        started.append(process)
        until = time.monotonic() + 180
        while not alive(port):
            said = (tmp_path / "server.log").read_text()
            assert process.poll() is None, said
            assert time.monotonic() < until, said
            time.sleep(0.5)
        return f"http://127.0.0.1:{port}"

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def alive(port):
    try:
        return ask(f"http://127.0.0.1:{port}/ping") == (200, "\n")
    except OSError:
        return False


def ask(address, body=None):
    """Status and text that an address answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
@pytest.mark.parametrize("exporter", [Onnx(), ExecuTorch(), LiteRT()], ids=lambda each: each.kind)
def test_mlflows_server_answers_requests_from_the_real_file(in_home, server, tmp_path, exporter):
    one = in_home.onnx if exporter.kind == "onnx" else bundled(tmp_path, exporter)
    if exporter.kind != "onnx":
        log(one, 0.75, one.images_NHWC[:2])
    address = server(champion(in_home).tags[f"kd.export.{exporter.kind}"]) + "/invocations"
    status, text = ask(address, {"inputs": one.images_NHWC.tolist()})
    assert status == 200, text
    found = json.loads(text)["predictions"]
    assert found["label"] == [CLASSES[index] for index in one.logits_NC.argmax(1)]
    powers_NC = np.exp(one.logits_NC.astype(np.float64))
    expected_NC = powers_NC / powers_NC.sum(1, keepdims=True)
    np.testing.assert_allclose(found["probabilities"], expected_NC, atol=1e-5)

    with ThreadPoolExecutor(8) as pool:  # at once: each caller gets the answer to its own picture
        bodies = [{"instances": [picture]} for picture in one.images_NHWC.tolist()]
        answers = list(pool.map(lambda body: ask(address, body), bodies))
    alone = [json.loads(text)["predictions"]["probabilities"][0] for _, text in answers]
    np.testing.assert_allclose(alone, expected_NC, atol=1e-5)

    for body in ({"inputs": [[1, 2], [3, 4]]}, {"inputs": "cat"}, {"pictures": []}):
        status, text = ask(address, body)
        assert status == 400, text
