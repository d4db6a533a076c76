"""`python -m kexue_utils.training run NAME`, `confirm NAME` and `list`."""

import argparse

from kexue_utils.training.recorder import RECORDED, confirm, record
from kexue_utils.training.registry import EXPERIMENTS, WAITING, experiment


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m kexue_utils.training", description="Repeat a recorded experiment.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names and titles of the experiments")
    run = commands.add_parser("run", help="run one and write its record; an interrupted run goes on where it was")
    run.add_argument("name", choices=sorted(EXPERIMENTS), metavar="NAME", help="a name that `list` shows")
    run.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    run.add_argument("--seeds", type=int, help="how many, at least 2 (default 5, smoke 2)")
    run.add_argument("--smoke", action="store_true", help="the same steps at a size of seconds on a CPU")
    run.add_argument("--out", help="folder for the record (default: the package's own; smoke: the current one)")
    again = commands.add_parser("confirm", help="accept rewritten sources if the smoke size still gives the same")
    again.add_argument("name", choices=sorted(EXPERIMENTS), metavar="NAME")
    chosen = parser.parse_args(arguments)
    if chosen.command == "list":
        for name in sorted(EXPERIMENTS):
            print(f"{name:24}{experiment(name).title}{' (not recorded yet)' if name in WAITING else ''}")
        return
    if chosen.command == "confirm":
        confirm(RECORDED / f"{chosen.name}.json")
        return
    path = record(chosen.name, device=chosen.device, seeds=chosen.seeds, smoke=chosen.smoke, out=chosen.out)
    if path:
        print(path)


if __name__ == "__main__":
    main()
