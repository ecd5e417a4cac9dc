"""What students lose when soft targets are cached for a few views: CIFAR-10, several seeds.

    python benchmarks/cached_views.py --data ROOT --records FILE --seeds 5

One teacher and three assistants are trained once; then, for each seed, the same student learns
from their uniform ensemble, on-line (new views in each pass) and from tables of 1, 4, 8, ... views
that recur.  Accuracy is that on the validation split, since it decides a default.  Each student
is a line of FILE, so a run that was stopped goes on; the table on standard output, in Markdown,
is made from FILE alone: `--seeds 0` prints it again.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402

from kd.artifacts import load_model, save_model  # noqa: E402
from kd.data import Augment, Cifar10, Images, Splits, prepare  # noqa: E402
from kd.ensemble import Ensemble  # noqa: E402
from kd.evaluate import predict, scores  # noqa: E402
from kd.methods import KD  # noqa: E402
from kd.models import CifarResNet, Model, PlainCNN, build_model  # noqa: E402
from kd.recipe import SGD, Cosine, Recipe  # noqa: E402
from kd.tables import DiskTables  # noqa: E402
from kd.train import fit  # noqa: E402

TEACHER: Model = PlainCNN(depth=8)
ASSISTANTS: tuple[Model, ...] = (PlainCNN(depth=6), CifarResNet(depth=8), PlainCNN(depth=4))
STUDENT: Model = PlainCNN(depth=2)
METHOD = KD(temperature=4.0, alpha=0.9)


def main() -> None:
    """Train what FILE lacks, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--records", type=Path, required=True, help="a line of JSON per student")
    parser.add_argument("--seeds", type=int, default=5, help="students for each setting")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--per-class", type=int, default=500, help="training images of a class")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.seeds:
        if arguments.data is None:
            parser.error("--data is needed to train")
        torch.set_num_threads(arguments.threads)
        train_all(arguments)
    print("\n".join(table(records(arguments.records))))


def train_all(arguments: argparse.Namespace) -> None:
    """Append a record for each student that has none yet."""
    with tempfile.TemporaryDirectory() as folder:
        splits = Splits(val=0.1, test="official", labels_per_class=arguments.per_class)
        dataset = Cifar10(root=str(arguments.data))
        prepare(dataset, splits, image_size=32, channels=3, seed=0, folder=Path(folder))
        augment = Augment(shift=4, flip=True)
        train = Images.load(Path(folder), "train", augment=augment)
        val = Images.load(Path(folder), "val")
        recipe = Recipe(
            epochs=arguments.epochs,
            batch_size=128,
            optimizer=SGD(lr=0.05),
            schedule=Cosine(warmup=0.1),
            augment=augment,
            validate_every=arguments.epochs,
        )
        models = arguments.records.parent / "cached_views_models"
        models.mkdir(parents=True, exist_ok=True)
        teacher = trained(models / "teacher", TEACHER, train, recipe)
        alone = Ensemble((teacher,), (1.0,))
        members = tuple(
            trained(models / f"assistant{index}", model, train, recipe, alone)
            for index, model in enumerate(ASSISTANTS)
        )
        for name, network in (("teacher", teacher), *zip("123", members, strict=True)):
            print(f"{name}: {accuracy(network, val):.4f}", file=sys.stderr, flush=True)
        ensemble = Ensemble(members, (1 / 3,) * 3)
        for seed in range(arguments.seeds):
            for views in (None, *arguments.views):
                if (views, seed) not in {
                    (r["views"], r["seed"]) for r in records(arguments.records)
                }:
                    record = student(train, val, recipe, ensemble, seed, views)
                    with arguments.records.open("a") as file:
                        file.write(json.dumps(record) + "\n")


def trained(
    path: Path,
    model: Model,
    images: Images,
    recipe: Recipe,
    ensemble: Ensemble | None = None,
) -> torch.nn.Module:
    """A network trained once, and read back from then on."""
    torch.manual_seed(0)
    network = build_model(model, channels=3, image_size=32, num_classes=10)
    file = path.with_suffix(".safetensors")
    if file.exists():
        return load_model(file, network)
    network, _ = fit(
        network, images, recipe, seed=0, num_classes=10, method=METHOD, ensemble=ensemble
    )
    save_model(file, network)
    return network


def student(
    images: Images,
    val: Images,
    recipe: Recipe,
    ensemble: Ensemble,
    seed: int,
    views: int | None,
) -> dict[str, object]:
    """One student's record; `views` None is on-line."""
    torch.manual_seed(seed)
    network = build_model(STUDENT, channels=3, image_size=32, num_classes=10)
    targets = "online" if views is None else "cached"
    kwargs = {**vars(recipe), "targets": targets, "views": views}
    started = time.process_time()
    network, _ = fit(
        network,
        images,
        Recipe(**kwargs),
        seed=seed,
        num_classes=10,
        method=METHOD,
        ensemble=ensemble,
        tables=DiskTables(),
    )
    seconds = time.process_time() - started
    found: dict[str, object] = {
        "views": views,
        "seed": seed,
        "accuracy": accuracy(network, val),
        "cpu_s": seconds,
    }
    print(found, file=sys.stderr, flush=True)
    return found


def accuracy(network: torch.nn.Module, images: Images) -> float:
    """On labelled images."""
    return scores(predict(network, images), images.labels_N).accuracy


def records(path: Path) -> list[dict[str, float]]:
    """All students so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(found: list[dict[str, float]]) -> list[str]:
    """Accuracy by number of views, and paired differences from on-line targets, in points."""
    by_views: dict[float | None, dict[float, float]] = {}
    for record in found:
        by_views.setdefault(record["views"], {})[record["seed"]] = 100 * record["accuracy"]
    lines = [
        "| views | seeds | validation accuracy, % | minus on-line, paired: mean ± s.e. |",
        "| --- | --- | --- | --- |",
    ]
    online = by_views.get(None, {})
    for views, by_seed in by_views.items():
        paired = [value - online[seed] for seed, value in by_seed.items() if seed in online]
        error = statistics.stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else float("nan")
        spread = statistics.stdev(by_seed.values()) if len(by_seed) > 1 else float("nan")
        mean = statistics.mean(by_seed.values())
        gap = "" if views is None else f"{statistics.mean(paired):+.2f} ± {error:.2f}"
        name = "on-line" if views is None else f"{views}"
        lines.append(f"| {name} | {len(by_seed)} | {mean:.2f} ± {spread:.2f} | {gap} |")
    return lines


if __name__ == "__main__":
    main()
