"""The networks of the CIFAR-10 protocol on one device: how long, how fast, how busy it is.

    python benchmarks/gpu_protocol.py --epochs 10 --precision bf16 [--data ROOT]
    python benchmarks/gpu_protocol.py --device cpu --images 512 --epochs 1    # a trial

Teacher CNN-10 on labels; assistants CNN-8, CNN-6 and CNN-4 under it; student CNN-2 under the
three, weighed alike; 50,000 images of 32 x 32 in batches of 128, CIFAR-10's own with --data, else
noise, which takes as long.  Then the assistants are trained again: at once, a process each; at
once in one process, a stream each (on a GPU).  These two come last, since they are likeliest to
fail.  Needs PyTorch alone (torchvision for --data).
"""

import argparse
import multiprocessing
import pickle
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
sys.path.insert(0, str(PROJECT / "benchmarks"))

import torch  # noqa: E402
from side_by_side import machine  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from kd.component import reason  # noqa: E402
from kd.data import Augment, Images  # noqa: E402
from kd.ensemble import Ensemble  # noqa: E402
from kd.methods import KD  # noqa: E402
from kd.models import PlainCNN, build_model  # noqa: E402
from kd.recipe import SGD, Recipe  # noqa: E402
from kd.train import fit  # noqa: E402
from kd.train.device import prepare  # noqa: E402
from kd.train.speed import finish  # noqa: E402

TEACHER, ASSISTANTS, STUDENT = 10, (8, 6, 4), 2
BATCH = 128


@dataclass(frozen=True)
class Task:
    """All that a training needs, also in another process."""

    pixels_NHWC: Tensor
    labels_N: Tensor
    recipe: Recipe
    depth: int
    teacher: dict[str, Tensor] = field(default_factory=dict)
    """State of the teacher; empty where labels alone teach."""


def network(depth: int) -> nn.Module:
    """A plain CNN for 10 classes."""
    torch.manual_seed(depth)
    return build_model(PlainCNN(depth=depth), channels=3, image_size=32, num_classes=10)  # type: ignore[arg-type]


def learn(task: Task, ensemble: Ensemble | None = None) -> nn.Module:
    """One network, trained; under the task's teacher where no ensemble is given."""
    device = prepare(task.recipe)
    images = Images(
        pixels_NHWC=task.pixels_NHWC.to(device),
        labels_N=task.labels_N.to(device),
        mean=(0.49, 0.48, 0.45),
        std=(0.25, 0.24, 0.26),
        augment=task.recipe.augment,
    )
    if task.teacher:
        teacher = network(TEACHER)
        teacher.load_state_dict(task.teacher)
        ensemble = Ensemble((teacher,), (1.0,))
    # Seeds differ: a seed's order of images is kept on the device, for the stream that made it.
    trained, _ = fit(
        network(task.depth),
        images,
        task.recipe,
        seed=task.depth,
        num_classes=10,
        method=KD() if ensemble else None,
        ensemble=ensemble,
    )
    finish(images.labels_N.device)
    return trained


def in_turn(tasks: list[Task]) -> list[nn.Module]:
    """One after the other."""
    return [learn(task) for task in tasks]


def in_processes(tasks: list[Task]) -> list[nn.Module]:
    """All at once, a process each; their start is counted, as the flow pays for it, too.

    Tensors travel as bytes: PyTorch would put them into /dev/shm, which may be 64 MB.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(tasks), spawn) as pool:
        states = list(pool.map(state_of, map(pickle.dumps, tasks)))
    networks = [network(task.depth) for task in tasks]
    for each, state in zip(networks, states, strict=True):
        each.load_state_dict(pickle.loads(state))
    return networks


def state_of(task: bytes) -> bytes:
    """What in_processes sends back."""
    trained = learn(pickle.loads(task))
    return pickle.dumps({name: tensor.cpu() for name, tensor in trained.state_dict().items()})


def in_streams(tasks: list[Task]) -> list[nn.Module]:
    """All at once, a thread and a stream each."""

    def alone(task: Task) -> nn.Module:
        with torch.cuda.stream(torch.cuda.Stream()):
            return learn(task)

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(alone, tasks))


@contextmanager
def busy(device: str) -> Iterator[Callable[[], str]]:
    """While the block runs, ask the GPU's driver how busy it is; afterwards, what it said."""
    if device != "cuda" or shutil.which("nvidia-smi") is None:
        yield lambda: ""
        return
    ours = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"  # of the GPUs of this machine
    query = ["nvidia-smi", ours, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    found: list[float] = []
    done = threading.Event()

    def ask() -> None:
        while not done.wait(0.3):
            said = subprocess.run(query, capture_output=True, text=True, check=False).stdout
            with suppress(ValueError):  # "[N/A]", or a message
                found.append(float(said))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield lambda: f"{statistics.mean(found):.0f} %" if found else ""
    finally:
        done.set()
        asking.join()


def pixels(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images and labels: CIFAR-10's training split, or noise."""
    if arguments.data is None:
        generator = torch.Generator().manual_seed(0)
        shape = (arguments.images, 32, 32, 3)
        noise = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return noise, torch.arange(len(noise)) % 10
    from torchvision.datasets import CIFAR10

    found = CIFAR10(str(arguments.data), train=True)
    count = slice(arguments.images)
    return torch.from_numpy(found.data[count]), torch.tensor(found.targets[count])


def main() -> int:
    """Train all roles, and print a table in Markdown; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--data", type=Path, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--targets", choices=("auto", "cached", "online"), default="online")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    arguments = parser.parse_args()
    recipe = Recipe(
        epochs=arguments.epochs,
        batch_size=BATCH,
        optimizer=SGD(lr=0.05),
        augment=Augment(shift=4, flip=True),
        precision=arguments.precision,
        targets=arguments.targets,
        compile=arguments.compile,
        device=arguments.device,
        validate_every=arguments.epochs,
    )
    given = pixels(arguments)
    print(
        f"{machine()}; {len(given[0])} images, {recipe.epochs} epochs, {recipe.precision}, ",
        end="",
    )
    print(f"compile {recipe.compile}, targets {recipe.targets}, n = 1\n")
    print("| what | s | images/s | GPU busy |\n| --- | --- | --- | --- |", flush=True)

    def row(what: str, networks: int, seconds: float, used: str = "") -> None:
        speed = networks * recipe.epochs * len(given[0]) / seconds
        print(f"| {what} | {seconds:.1f} | {speed:,.0f} | {used} |", flush=True)

    def timed(what: str, networks: int, case: Callable[[], list[nn.Module]]) -> list[nn.Module]:
        with busy(arguments.device) as said:
            started = time.perf_counter()
            made = case()
            taken.append(time.perf_counter() - started)
        row(what, networks, taken[-1], said())
        return made

    taken: list[float] = []
    warm = Task(given[0][:BATCH], given[1][:BATCH], recipe, STUDENT)
    learn(warm)  # starts the device's libraries
    (teacher,) = timed("teacher", 1, lambda: [learn(Task(*given, recipe, TEACHER))])
    state = {name: tensor.cpu() for name, tensor in teacher.state_dict().items()}
    tasks = [Task(*given, recipe, depth, state) for depth in ASSISTANTS]
    assistants = timed("assistants in turn", 3, lambda: in_turn(tasks))
    ensemble = Ensemble(tuple(assistants), (1 / 3,) * 3)
    timed("student", 1, lambda: [learn(Task(*given, recipe, STUDENT), ensemble)])
    row("all of these", 5, sum(taken))
    ways = {"processes": in_processes}
    if arguments.device == "cuda":
        ways["streams"] = in_streams
    failed = False
    for way, at_once in ways.items():
        try:
            timed(f"assistants at once, {way}", 3, partial(at_once, tasks))
        except Exception as error:  # whatever it is, the other way is measured
            failed = True
            traceback.print_exc()
            print(f"| assistants at once, {way} | failed: {reason(error)} | | |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
