"""Students of one architecture trained in one process: stacked, or one after the other.

    python benchmarks/grouped.py --rounds 7 [--device cuda]

Steps on labels with plain SGD, every student on the same images.  "stacked" is torch.func's way:
parameters in one tensor each, the network under vmap, one optimiser step for all.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
sys.path.insert(0, str(PROJECT / "benchmarks"))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from side_by_side import in_turns, machine, ratios  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.func import functional_call, stack_module_state, vmap  # noqa: E402

from kd.models import PlainCNN, build_model  # noqa: E402
from kd.recipe import Recipe  # noqa: E402
from kd.train.device import prepare  # noqa: E402
from kd.train.speed import finish  # noqa: E402

CASES = {
    "digits, 16 x 16, half width": (64, 16, 1, 0.5),
    "digits, 16 x 16": (64, 16, 1, 1.0),
    "CIFAR, 32 x 32": (128, 32, 3, 1.0),
}
STEPS = 5


def one_by_one(
    networks: list[nn.Module], images_B: Tensor, labels_B: Tensor
) -> Callable[[], None]:
    """Steps of each network in its turn."""
    pairs = [(each, torch.optim.SGD(each.parameters(), 0.01, fused=True)) for each in networks]

    def steps() -> None:
        for _ in range(STEPS):
            for network, optimizer in pairs:
                optimizer.zero_grad()
                F.cross_entropy(network(images_B), labels_B).backward()
                optimizer.step()
        finish(images_B.device)

    return steps


def stacked(networks: list[nn.Module], images_B: Tensor, labels_B: Tensor) -> Callable[[], None]:
    """Steps of all networks at once; the sum of losses gives each of them its own gradient."""
    if images_B.is_cuda:  # whose batch norms refuse channels_last under vmap
        for each in networks:
            each.to(memory_format=torch.contiguous_format)
        images_B = images_B.clone(memory_format=torch.contiguous_format)
    parameters, buffers = stack_module_state(networks)
    leaves = {name: each.detach().clone().requires_grad_() for name, each in parameters.items()}
    form = copy.deepcopy(networks[0]).to("meta")
    optimizer = torch.optim.SGD(leaves.values(), 0.01, fused=True)

    def answer(own: dict[str, Tensor], state: dict[str, Tensor], images_B: Tensor) -> Tensor:
        made: Tensor = functional_call(form, (own, state), (images_B,))
        return made

    of_all = vmap(answer, in_dims=(0, 0, None))

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            logits_MBC = of_all(leaves, buffers, images_B)
            losses = [F.cross_entropy(each_BC, labels_B) for each_BC in logits_MBC]
            torch.stack(losses).sum().backward()
            optimizer.step()
        finish(images_B.device)

    return steps


def main() -> None:
    """Time steps in turns, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns that are counted")
    parser.add_argument("--students", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    device = torch.device(prepare(Recipe(device=arguments.device)))
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    print(f"{machine()}; {arguments.students} students CNN-2, n = {arguments.rounds}\n")
    print("| images | one by one: ms | stacked: ms | one by one / stacked |")
    print("| --- | --- | --- | --- |")
    for name, (batch, side, channels, width) in CASES.items():
        shape = {"channels": channels, "image_size": side, "num_classes": 10}
        networks = [
            build_model(PlainCNN(depth=2, width=width), **shape).to(device).train()
            for _ in range(arguments.students)
        ]
        for network in networks:
            network.to(memory_format=torch.channels_last)
        images_B = torch.randn(batch, channels, side, side, device=device)
        images_B = images_B.to(memory_format=torch.channels_last)
        given = (copy.deepcopy(networks), images_B, torch.arange(batch, device=device) % 10)
        cases = {"one by one": one_by_one(*given), "stacked": stacked(networks, *given[1:])}
        seconds = in_turns(cases, arguments.rounds, clock)
        each = [f"{1e3 * statistics.median(seconds[case]) / STEPS:.1f}" for case in cases]
        print(f"| {name} | {each[0]} | {each[1]} | {ratios(seconds, *cases)} |", flush=True)


if __name__ == "__main__":
    main()
