"""``python -m conadv_lab``: the package's commands."""

COMMANDS = {
    "train": "train one recipe here",
    "submit": "send runs to SLURM, or run them here; tables of what became of them",
    "sharpness": "curvature and sharpness of a model or a run",
    "staleness": "what a stale attack costs and buys: simulator, dynamics, theory",
    "data.pack": "pack a folder of photographs into one file that is read quickly",
    "demo": "the methods compared on digits, in minutes",
}


def main() -> None:
    """Print them."""
    print("usage: python -m conadv_lab.COMMAND; each lists its options with --help\n")
    for name, about in COMMANDS.items():
        print(f"  python -m conadv_lab.{name:9}  {about}")


if __name__ == "__main__":
    main()
